"""torch.compile, fake kernels, activation checkpointing."""

import contextlib
import gc
import itertools
import operator

import pytest
import torch
from reference import make_world
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters
from torch._functorch.aot_autograd import make_boxed_func
from torch.utils.checkpoint import checkpoint

import commlib
from commlib import ExpertParallel
from commlib.ops import compiling


def layer(ep, x, idx, weights, layout, bounded=False):
    d = ep.dispatch(x * 2, idx, weights, layout=layout, align=4, bounded=bounded)
    if layout != "rank":
        return ep.combine(d.x.sin(), d.handle, weights=d.topk_weights)
    return ep.combine(d.x.sin() * d.topk_weights.sum(-1, keepdim=True), d.handle)


def run(f, world, rank):
    x = world.x[rank].clone().requires_grad_()
    w = world.topk_weights[rank].clone().requires_grad_()
    out = f(x, world.topk_idx[rank], w)
    out.square().sum().backward()
    return out.detach(), x.grad, w.grad


@pytest.mark.parametrize(
    ("layout", "bounded"),
    [("rank", False), ("expert", False), ("rank", True), ("expert", True), ("batched", True)],
)
def test_a_compiled_layer_gives_the_same_values_and_gradients(device, layout, bounded):
    world = make_world([6], num_experts=4, topk=2, device=device)
    with ExpertParallel(**world.config()) as ep:
        eager = run(lambda *a: layer(ep, *a, layout, bounded), world, 0)
        torch._dynamo.reset()
        compiled = torch.compile(lambda *a: layer(ep, *a, layout, bounded), fullgraph=True)
        for a, b in zip(run(compiled, world, 0), eager, strict=True):
            torch.testing.assert_close(a, b)


def test_ops_pass_torchs_own_checks(device):
    world = make_world([6], num_experts=4, topk=2, device=device)
    with ExpertParallel(**world.config()) as ep:
        x = world.x[0].clone().requires_grad_()
        w = world.topk_weights[0].clone().requires_grad_()
        d = ep.dispatch(x.detach(), world.topk_idx[0], w.detach())
        tests = ("test_schema", "test_autograd_registration", "test_faketensor")
        torch.library.opcheck(
            torch.ops.commlib.dispatch.default,
            (
                x,
                world.topk_idx[0],
                w,
                ep._name,
                *ep._sizes,
                False,
                1,
                False,
                False,
                None,
                0,
                0,
                0,
                0,
                0,
                False,
                0,
            ),
            test_utils=tests,
        )
        torch.library.opcheck(
            torch.ops.commlib.combine.default,
            (d.x.clone().requires_grad_(), None, None, None, *d.handle._plan[:-1], False),
            test_utils=tests,
        )
        torch.library.opcheck(
            torch.ops.commlib.redispatch.default,
            (x, w, *d.handle._plan[:-1], False, False, None, None, None, 0),
            test_utils=tests,
        )


def test_async_is_refused_inside_a_graph(device):
    world = make_world([6], device=device)
    with ExpertParallel(**world.config()) as ep:
        torch._dynamo.reset()
        f = torch.compile(lambda x: ep.dispatch(x, world.topk_idx[0], async_op=True).x, fullgraph=True)
        with pytest.raises(Exception, match="async_op cannot be traced"):
            f(world.x[0])


def test_activation_checkpointing_dispatches_again_in_backward(device):
    world = make_world([6, 9], device=device)

    def rank_main(rank):
        with ExpertParallel(**world.config()) as ep:
            plain = run(lambda *a: layer(ep, *a, "expert"), world, rank)
            before = ep.stats()["dispatches"]
            saved = run(
                lambda *a: checkpoint(lambda *b: layer(ep, *b, "expert"), *a, use_reentrant=False),
                world,
                rank,
            )
            assert ep.stats()["dispatches"] - before == 2
            return plain, saved

    for plain, saved in commlib.run_ranks(rank_main, 2, device=device):
        for a, b in zip(plain, saved, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_layers_with_a_communicator_each_share_one_graph(device):
    world = make_world([6], num_experts=4, topk=2, device=device)
    torch._dynamo.reset()
    counters.clear()
    x, w = world.x[0], world.topk_weights[0]
    with contextlib.ExitStack() as stack:
        eps = [stack.enter_context(ExpertParallel(**world.config())) for _ in range(12)]

        def forward(ep, x, idx, w):
            return layer(ep, x, idx, w, "expert")

        for ep in eps:
            compiled = torch.compile(forward, fullgraph=True, backend="aot_eager")
            assert torch.equal(compiled(ep, x, world.topk_idx[0], w), forward(ep, x, world.topk_idx[0], w))
            assert ep.stats()["dispatches"] == 2
    assert counters["stats"]["unique_graphs"] == 1


def test_a_compiled_graph_keeps_its_communicator(device):
    world = make_world([6], num_experts=4, topk=2, holes=0.0, device=device)
    torch._dynamo.reset()

    def forward(x):
        ep = ExpertParallel(**world.config())

        @torch.compile(fullgraph=True, backend="aot_eager")
        def f(x):
            d = ep.dispatch(x, world.topk_idx[0])
            return ep.combine(d.x.sin(), d.handle)

        return f(x)

    x = world.x[0].clone().requires_grad_()
    out = forward(x)
    torch._dynamo.reset()
    gc.collect()
    out.sum().backward()
    torch.testing.assert_close(x.grad, x.detach().cos())


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_checkpointing_inside_of_compiled_code(device, backend):
    world = make_world([6], num_experts=4, topk=2, device=device)
    with ExpertParallel(**world.config()) as ep:

        def saved(*a):
            return checkpoint(lambda *b: layer(ep, *b, "expert"), *a, use_reentrant=False)

        eager = run(saved, world, 0)
        torch._dynamo.reset()
        for a, b in zip(
            run(torch.compile(saved, fullgraph=True, backend=backend), world, 0), eager, strict=True
        ):
            torch.testing.assert_close(a, b)


def test_compiled_code_writes_out(device):
    world = make_world([6], num_experts=4, topk=2, device=device)
    with ExpertParallel(**world.config()) as ep:
        d = ep.dispatch(world.x[0], world.topk_idx[0])
        out = torch.zeros_like(world.x[0])
        torch._dynamo.reset()
        f = torch.compile(
            lambda y, out: ep.combine(y, d.handle, out=out), fullgraph=True, backend="aot_eager"
        )
        f(d.x, out)
        assert torch.equal(out, ep.combine(d.x, d.handle))


has_effects = pytest.mark.skipif(not compiling.HAS_EFFECTS, reason="this PyTorch has no effects of ops")


@has_effects
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_an_operation_whose_result_is_not_used_is_not_left_out(device, backend):
    """One rank may not need it, but the others wait."""
    world = make_world([6], num_experts=4, topk=2, device=device)
    with ExpertParallel(**world.config()) as ep:
        d = ep.dispatch(world.x[0], world.topk_idx[0])

        def f(y):
            ep.combine(y, d.handle)
            ep.dispatch(y, handle=d.handle)
            return y + 1

        torch._dynamo.reset()
        torch.compile(f, fullgraph=True, backend=backend)(torch.ones_like(d.x))
        stats = ep.stats()
        assert (stats["combines"], stats["redispatches"]) == (1, 1)


@has_effects
def test_operations_are_chained_in_the_programs_order(device):
    """In forward and backward, also those of two unrelated communicators."""
    graphs = []

    def keep(graph, example_inputs):
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    def effects(graph):
        """Names of our ops, each of which must take the token of the previous one."""
        found = [n for n in graph.graph.nodes if n.target is torch.ops.higher_order.with_effects]
        for before, after in itertools.pairwise(found):
            token = after.args[0]
            assert token.target is operator.getitem and token.args == (before, 0)
        return [n.args[1].name().removeprefix("commlib::") for n in found]

    world = make_world([6], num_experts=4, topk=2, device=device)
    with ExpertParallel(**world.config()) as one, ExpertParallel(**world.config()) as other:

        def f(x, idx, w):
            a = one.dispatch(x, idx, w, layout="expert")
            b = other.dispatch(x * 2, idx, w)
            second = other.combine(b.x.sin(), b.handle)
            return one.combine(a.x, a.handle) + second

        torch._dynamo.reset()
        backend = aot_autograd(fw_compiler=keep, bw_compiler=keep)
        compiled, eager = run(torch.compile(f, fullgraph=True, backend=backend), world, 0), run(f, world, 0)
        for a, b in zip(compiled, eager, strict=True):
            torch.testing.assert_close(a, b)
    forward, backward = map(effects, graphs)
    assert forward == ["traced_dispatch", "traced_dispatch", "combine", "combine"]
    assert sorted(backward) == ["combine", "combine", "redispatch", "redispatch"]


@pytest.mark.skipif(not hasattr(torch.Tag, "cudagraph_unsafe"), reason="this PyTorch has no such tag")
@pytest.mark.parametrize("name", ["dispatch", "redispatch", "combine"])
def test_cuda_graphs_of_the_compiler_leave_the_ops_out(name):
    assert torch.Tag.cudagraph_unsafe in getattr(torch.ops.commlib, name).default.tags


def test_compiled_autograd_compiles_a_backward_through_the_ops(device):
    world = make_world([5], device=device)
    with ExpertParallel(**world.config()) as ep:

        def loss_of(x):
            return layer(ep, x, world.topk_idx[0], world.topk_weights[0], "expert").square().sum()

        x, y = (world.x[0].clone().requires_grad_() for _ in range(2))
        loss = loss_of(x)
        with torch._dynamo.config.patch(compiled_autograd=True):
            torch.compile(lambda loss: loss.backward(), backend="eager")(loss)
        loss_of(y).backward()
        torch.testing.assert_close(x.grad, y.grad)
