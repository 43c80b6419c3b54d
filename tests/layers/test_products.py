"""Experts whose first and last products meet the heap: where rows lie changes no bit of a layer's results."""

import threading
from dataclasses import dataclass, field
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import commlib
from commlib import ExpertParallel, operations
from commlib.communicator import Communicator
from commlib.nn import Experts, GptOssExperts, MoELayer, Products, TopKRouter, expert_parameters, grouped_mm
from commlib.overlap import TwoBatch

HIDDEN, FFN, EXPERTS, TOPK, TOKENS = 32, 48, 6, 3, (9, 0, 14)
seeding = threading.Lock()  # torch.manual_seed is the process's, and ranks are threads here


class PlainExperts(Experts):
    """As the base class, but with products of its own."""

    def compute(self, x, offsets, w1, w3, w2):
        return grouped_mm(F.silu(grouped_mm(x, w1, offsets)) * grouped_mm(x, w3, offsets), w2, offsets)


@dataclass
class Spied:
    """Where rows were that combines have summed, and where the heap has given room for some."""

    buffers: set = field(default_factory=set)
    summed: list = field(default_factory=list)

    @property
    def in_place(self):
        """Of each combine, in order; of all ranks."""
        return [y in self.buffers for y in self.summed]


@pytest.fixture
def spied(monkeypatch):
    spied, lend, combine = Spied(), Communicator.lend_rows, operations.combine

    def lend_rows(self, rows, once):
        buffer = lend(self, rows, once)
        if rows > 0:
            spied.buffers.add(buffer.data_ptr())
        return buffer

    def combine_rows(a, call, *rest):
        if len(call.y):
            spied.summed.append(call.y.data_ptr())
        return combine(a, call, *rest)

    monkeypatch.setattr(Communicator, "lend_rows", lend_rows)
    monkeypatch.setattr(operations, "combine", combine_rows)
    return spied


def make_layer(ep, dtype, **options):
    with seeding:
        torch.manual_seed(5)
        router = TopKRouter(HIDDEN, EXPERTS, TOPK, dtype=torch.promote_types(dtype, torch.float32))
        layer = MoELayer(HIDDEN, FFN, EXPERTS, TOPK, ep, router, dtype=dtype, **options)
        for p in expert_parameters(layer):
            if p.dim() == 2:  # a bias, which begins as 0
                first = 0 if ep is None else ep.first_expert
                with torch.no_grad():
                    p += torch.arange(first, first + len(p)).unsqueeze(1) / 20
    return layer


def inputs(rank, dtype):
    g = torch.Generator().manual_seed(rank)
    x, upstream = torch.randn(2, TOKENS[rank], HIDDEN, generator=g, dtype=torch.float64).to(dtype)
    return x.requires_grad_(), upstream


def called(layer, x):
    return layer(x)[0]


def as_steps(layer, x):
    half = len(x) // 2
    return torch.cat([out for out, _ in TwoBatch(layer.steps)(x[:half], x[half:])])


def recomputed(layer, x):
    return checkpoint(called, layer, x, use_reentrant=False)


def results(layer, rank, dtype, apply=called):
    """The output, and gradients: of x, of the router, of this rank's experts."""
    x, upstream = inputs(rank, dtype)
    out = apply(layer, x)
    out.backward(upstream)
    return out.detach(), x.grad, layer.router.weight.grad, *(p.grad for p in expert_parameters(layer))


def over_ranks(dtype, grouping, apply=called, slots=None, **options):
    def rank_main(rank):
        sizes = dict(num_experts=EXPERTS, hidden=HIDDEN, topk=TOPK, max_tokens=16, dtype=dtype)
        with ExpertParallel(timeout=30.0, grouping=grouping, slots=slots, **sizes) as ep:
            return results(make_layer(ep, dtype, **options), rank, dtype, apply)

    return commlib.run_ranks(rank_main, len(TOKENS))


def check_equal(got, wanted):
    for mine, theirs in zip(got, wanted, strict=True):
        for a, b in zip(mine, theirs, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("weights_at", ["output", "hidden"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("experts", [Experts, GptOssExperts])
def test_bits_are_those_of_rows_that_are_copied(spied, experts, dtype, weights_at):
    options = dict(experts=experts, weights_at=weights_at)
    wanted = over_ranks(dtype, "once", **options)
    assert not any(spied.in_place) and len(spied.in_place) == 6
    spied.summed.clear()
    check_equal(over_ranks(dtype, "direct", **options), wanted)
    assert spied.in_place == [True] * 6  # forward and backward of each rank


@pytest.mark.parametrize("grouping", ["once", "direct"])
@pytest.mark.parametrize(
    ("experts", "weights_at"),
    [
        (Experts, "output"),
        (Experts, "hidden"),
        (GptOssExperts, "output"),
        (GptOssExperts, "hidden"),
        (PlainExperts, "output"),  # which leave no product to the layer
    ],
)
def test_bounded_layers_have_the_same_bits(experts, grouping, weights_at):
    """Results of one size, of which experts see rows that are none."""
    options = dict(experts=experts, weights_at=weights_at)
    wanted = over_ranks(torch.bfloat16, grouping, **options)
    check_equal(over_ranks(torch.bfloat16, grouping, bounded=True, **options), wanted)


@pytest.mark.parametrize(
    ("apply", "options"), [(as_steps, {}), (recomputed, {}), (called, dict(overlap_chunks=2))]
)
def test_bounded_layers_overlap_as_others_do(apply, options):
    wanted = over_ranks(torch.float32, "direct", apply, **options)
    check_equal(over_ranks(torch.float32, "direct", apply, bounded=True, **options), wanted)


def test_a_bounded_layer_compiles_to_static_shapes():
    def rank_main(rank):
        sizes = dict(num_experts=EXPERTS, hidden=HIDDEN, topk=TOPK, max_tokens=16, dtype=torch.float32)
        with ExpertParallel(**sizes) as ep:
            layer = make_layer(ep, torch.float32, bounded=True)
            wanted = results(layer, rank, torch.float32)
            layer.zero_grad()
            torch._dynamo.reset()
            compiled = torch.compile(layer, fullgraph=True, dynamic=False)
            x, upstream = inputs(rank, torch.float32)
            out = compiled(x)[0]
            out.backward(upstream)
            torch.testing.assert_close(out, wanted[0])
            torch.testing.assert_close(x.grad, wanted[1])

    commlib.run_ranks(rank_main, 1)


@pytest.mark.parametrize(("apply", "options"), [(as_steps, {}), (called, dict(overlap_chunks=2))])
def test_asynchronous_operations_copy_nothing_either(spied, apply, options):
    wanted = over_ranks(torch.bfloat16, "once", apply, **options)
    spied.summed.clear()
    check_equal(over_ranks(torch.bfloat16, "direct", apply, **options), wanted)
    assert spied.in_place == [True] * 12  # two parts


def test_a_layer_that_is_computed_again_for_backward(spied):
    check_equal(over_ranks(torch.float32, "direct", recomputed), over_ranks(torch.float32, "direct"))
    assert all(spied.in_place)


@pytest.mark.parametrize("slots", [2, 3, 4, 5])
def test_rows_are_copied_where_slots_run_out(spied, slots):
    wanted = over_ranks(torch.bfloat16, "once")
    spied.summed.clear()
    check_equal(over_ranks(torch.bfloat16, "direct", slots=slots), wanted)
    assert any(spied.in_place) == (slots > 3)  # one to receive, one to combine, d.x, and y


def test_many_layers_with_few_slots():
    """Each keeps what came and what it has made for its backward, in slots as long as there are some."""
    wanted = None
    for grouping in ("once", "direct"):

        def rank_main(rank, grouping=grouping):
            sizes = dict(num_experts=EXPERTS, hidden=HIDDEN, topk=TOPK, max_tokens=16, dtype=torch.bfloat16)
            with ExpertParallel(timeout=30.0, grouping=grouping, slots=6, **sizes) as ep:
                layers = [make_layer(ep, torch.bfloat16) for _ in range(5)]
                x, upstream = inputs(rank, torch.bfloat16)
                out = x
                for layer in layers:
                    out = out + layer(out)[0]
                most = ep.memory_report().slots_in_use
                out.backward(upstream)
                assert ep.memory_report().slots_in_use == 0
                return most, (out.detach(), x.grad, *(p.grad for p in expert_parameters(layers[0])))

        most, got = zip(*commlib.run_ranks(rank_main, len(TOKENS)), strict=True)
        if wanted is None:
            wanted = got
            assert max(most) == 0
        else:
            check_equal(got, wanted)
            assert max(most) == 4


@pytest.mark.parametrize("experts", [Experts, GptOssExperts])
def test_weights_at_hidden_are_the_same_sums(experts):
    def close(got, wanted):
        for mine, theirs in zip(got, wanted, strict=True):
            for a, b in zip(mine, theirs, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)

    wanted = over_ranks(torch.float64, "direct", experts=experts)
    close(over_ranks(torch.float64, "direct", experts=experts, weights_at="hidden"), wanted)
    for rank in range(len(TOKENS)):  # without communication
        layers = [
            make_layer(None, torch.float64, experts=experts, weights_at=at) for at in ("output", "hidden")
        ]
        close(*[[results(layer, rank, torch.float64)] for layer in layers])
        torch.testing.assert_close(results(layers[0], rank, torch.float64)[1], wanted[rank][1])


def test_weights_at_hidden_keep_nothing_of_the_last_product():
    def rank_main(rank):
        sizes = dict(num_experts=EXPERTS, hidden=HIDDEN, topk=TOPK, max_tokens=16, dtype=torch.float32)
        held = []
        with ExpertParallel(timeout=30.0, **sizes) as ep:
            for at in ("output", "hidden"):
                layer = make_layer(ep, torch.float32, weights_at=at)
                out, _ = layer(inputs(rank, torch.float32)[0])
                held.append(ep.memory_report().slots_in_use)
                del out
        return held

    assert commlib.run_ranks(rank_main, len(TOKENS)) == [[2, 1]] * len(TOKENS)


def test_experts_may_multiply_by_themselves(spied):
    wanted = over_ranks(torch.float32, "direct")
    spied.summed.clear()
    got = over_ranks(torch.float32, "direct", experts=PlainExperts)
    for mine, theirs in zip(got, wanted, strict=True):
        for a, b in zip(mine, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert not any(spied.in_place)


def test_nothing_is_written_in_place_that_is_of_another_type(spied):
    """Rows travel in float32, and are computed on in bfloat16."""

    def rank_main(rank):
        sizes = dict(num_experts=EXPERTS, hidden=HIDDEN, topk=TOPK, max_tokens=16, dtype=torch.float32)
        with ExpertParallel(timeout=30.0, **sizes) as ep:
            layer = make_layer(ep, torch.bfloat16)
            out, _, *_ = results(layer, rank, torch.bfloat16)
            return out

    for rank, out in enumerate(commlib.run_ranks(rank_main, len(TOKENS))):
        wanted = make_layer(None, torch.bfloat16)(inputs(rank, torch.bfloat16)[0])[0]
        torch.testing.assert_close(out, wanted, rtol=0.05, atol=0.02)
    assert len(spied.in_place) == 6 and not any(spied.in_place)


@pytest.mark.parametrize("backward", [False, True])
def test_what_hooks_have_kept_is_theirs(backward):
    """Other ranks have read it when the layer returns."""

    def everything_to_both(x):
        idx = torch.tensor([[0, 1]]).expand(len(x), 2)
        return idx, torch.full(idx.shape, 0.5), x.new_zeros(())

    def rank_main(rank):
        sizes = dict(num_experts=2, hidden=4096, topk=2, max_tokens=512, dtype=torch.float32)
        with ExpertParallel(timeout=30.0, grouping="direct", **sizes) as ep:
            with seeding:
                torch.manual_seed(0)
                layer = MoELayer(4096, 8, 2, 2, ep, router=everything_to_both)
            kept, seen = [], []
            if backward:
                layer.experts.register_full_backward_hook(lambda module, grads, _: kept.append(grads[0]))
            else:
                layer.experts.register_forward_hook(lambda module, _, out: kept.append(out.detach()))
            for _ in range(10):
                x = torch.ones(2 if rank == 0 else 512, 4096, requires_grad=True)
                out, _ = layer(x)
                if backward:
                    out.mean().backward()
                if rank == 0:  # it has little to read, and is done first
                    kept.pop().zero_()
                ep.group.barrier()
                seen.append(x.grad if backward else out.detach())
            return seen

    first, *others = commlib.run_ranks(rank_main, 2)[1]
    assert first.any()
    for again in others:
        assert torch.equal(again, first)


@pytest.mark.parametrize("weights_at", ["output", "hidden"])
def test_gradients_of_gradients_are_those_without_communication(weights_at):
    found = []
    for ranks in (None, 1):
        ep = None
        if ranks:
            sizes = dict(num_experts=EXPERTS, hidden=HIDDEN, topk=TOPK, max_tokens=16, dtype=torch.float64)
            ep = ExpertParallel(device="cpu", **sizes)
        layer, (x, _) = make_layer(ep, torch.float64, weights_at=weights_at), inputs(0, torch.float64)
        for p in expert_parameters(layer):
            p.requires_grad_(False)  # a weight's gradient has none
        (g,) = torch.autograd.grad(layer(x)[0].sum(), x, create_graph=True)
        found.append(torch.autograd.grad(g.square().sum(), x)[0])
        if ep is not None:
            ep.close()
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-12)


def test_a_mode_that_keeps_results_sees_one_product():
    """As selective checkpointing does: what it has kept must not be written to."""
    save = partial(create_selective_checkpoint_contexts, lambda *_, **__: CheckpointPolicy.PREFER_SAVE)

    class Selective(Experts):
        def forward(self, x, offsets, products=None):
            again = super().forward
            return checkpoint(again, x, offsets, products, use_reentrant=False, context_fn=save)

    check_equal(over_ranks(torch.float32, "direct", experts=Selective), over_ranks(torch.float32, "direct"))


def test_a_forward_of_ones_own_may_know_no_products():
    class Own(Experts):
        def forward(self, x, offsets):
            return super().forward(x, offsets)

    got, wanted = (
        results(make_layer(None, torch.float32, experts=kind), 0, torch.float32) for kind in (Own, Experts)
    )
    check_equal([got], [wanted])
    with pytest.raises(TypeError, match="forward if it has its own, of Own a parameter products"):
        make_layer(None, torch.float32, experts=Own, weights_at="hidden")


@pytest.mark.parametrize("times", [0, 2])
def test_weights_are_applied_once_or_the_layer_says_so(times):
    class Forgetful(Experts):
        def compute(self, x, offsets, products, w1, w3, w2):
            (inner,) = products.first(x, offsets, w1)
            y = grouped_mm(inner, w2, offsets)
            for _ in range(times):
                y = products.last(inner, offsets, w2)
            return y

    layer = make_layer(None, torch.float32, experts=Forgetful, weights_at="hidden")
    with pytest.raises(ValueError, match=f"products.last, which Forgetful called {times} times"):
        layer(inputs(0, torch.float32)[0])


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        (dict(weights_at="last"), ValueError, r'weights_at must be "output" or "hidden", got \'last\''),
        (dict(weights_at=["hidden"]), ValueError, "weights_at must be"),
        (
            dict(weights_at="hidden", experts=PlainExperts),
            TypeError,
            "of PlainExperts a parameter products",
        ),
    ],
)
def test_where_weights_cannot_be(options, error, text):
    with pytest.raises(error, match=text):
        MoELayer(HIDDEN, FFN, EXPERTS, TOPK, None, **options)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_product_in_memory_that_is_there(device, dtype, bias):
    g = torch.Generator().manual_seed(0)
    x, w, b = (torch.randn(s, generator=g, dtype=torch.float64) for s in ((5, 8), (3, 8, 16), (3, 16)))
    given = [t.to(dtype).to(device).requires_grad_() for t in (x, w, b)][: 3 if bias else 2]
    offsets = torch.tensor([0, 2, 2, 5], device=device)
    out, upstream = torch.empty(2, 5, 16, dtype=dtype, device=device)
    upstream.fill_(0.5)
    results = []
    for more in ({}, dict(out=out)):
        x, w, *b = given
        got = grouped_mm(x, w, offsets, *b, **more)
        results.append((got, *torch.autograd.grad(got, given, upstream)))
    assert results[1][0].data_ptr() == out.data_ptr()
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("out", "text"),
    [
        (torch.empty(5, 15), r"out must be \[5, 16\] of torch.float32 on cpu, got \[5, 15\]"),
        (torch.empty(5, 16, dtype=torch.bfloat16), "got .* of torch.bfloat16"),
        (torch.empty(5, 16, device="meta"), "on meta"),
        (torch.empty(5, 16, requires_grad=True), "out must not require grad"),
    ],
)
def test_memory_that_a_product_does_not_fit(out, text):
    with pytest.raises(ValueError, match=text):
        grouped_mm(torch.zeros(5, 8), torch.zeros(3, 8, 16), torch.tensor([0, 2, 2, 5]), out=out)


@pytest.mark.parametrize("name", ["x", "w", "bias"])
def test_memory_that_is_read_is_not_written(name):
    read = dict(x=torch.zeros(5, 8), w=torch.zeros(3, 8, 8), bias=torch.zeros(3, 8))
    memory = torch.zeros(200)
    read[name] = memory[: read[name].numel()].view(read[name].shape)
    with pytest.raises(ValueError, match=f"out shares memory with {name}"):
        grouped_mm(**read, offsets=torch.tensor([0, 2, 2, 5]), out=memory[16:56].view(5, 8))


@pytest.mark.parametrize("bias", [False, True])
def test_a_compiled_product_has_its_gradients(bias):
    offsets = torch.tensor([0, 2, 2, 5])
    x, w, b = (torch.randn(s, requires_grad=True) for s in ((5, 8), (3, 8, 8), (3, 8)))
    given = [x, w, b][: 3 if bias else 2]
    found, out = [], torch.empty(5, 8)
    for f in (grouped_mm, torch.compile(grouped_mm, backend="aot_eager", fullgraph=True)):
        y = f(x, w, offsets, *given[2:], out=out.zero_())
        assert torch.equal(out, y)
        found.append(torch.autograd.grad(y.square().sum(), given))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def test_no_products_of_nothing():
    with pytest.raises(ValueError, match="first takes weights, and as many biases or none, got 0, 0"):
        Products().first(torch.zeros(5, 8), torch.tensor([0, 5]))


@pytest.mark.parametrize("offsets", [[1, 2, 2, 5], [0, 3, 2, 5], [0, 2, 2, 6]])
def test_groups_that_are_not_those_of_the_rows(offsets):
    x, w = torch.zeros(5, 8, requires_grad=True), torch.zeros(3, 8, 16)
    with pytest.raises(ValueError, match=r"offsets must go from 0 up, at most to the 5 rows of x, got \["):
        grouped_mm(x, w, torch.tensor(offsets))
