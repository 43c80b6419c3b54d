"""Rows of other types and widths than the communicator's own, and scales beside them."""

import numpy as np
import pytest
import torch
from exchange import worlds
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reference import expected_rank_layout, make_world

import commlib
from commlib import CallMismatch, ExpertParallel
from commlib.formats import _NUMBERS, _TYPES
from commlib.startup.conversation import gather

FLOATS = [torch.bfloat16, torch.float16, torch.float32]
HIDDEN = 64  # bfloat16 elements: 128 bytes
FP8 = getattr(torch, "float8_e4m3fn", torch.uint8)


def rows_of(dtype, rank, tokens, width, device):
    """Rows that tell their rank and token."""
    raw = torch.arange(tokens * width * 16).view(tokens, width * 16) * 7 + 31 * rank
    if dtype.is_floating_point and dtype in FLOATS:
        return (raw[:, :width] % 61 - 30).to(dtype).to(device)
    count = width * dtype.itemsize
    return (raw[:, :count] % 251).to(torch.uint8).contiguous().to(device).view(dtype)


def raw(t):
    if t.numel() == 0:  # its strides may be 0
        return torch.empty(len(t), t.shape[1] * t.element_size(), dtype=torch.uint8)
    return t.contiguous().view(torch.uint8).cpu()


def with_room(world, **options):
    return ExpertParallel(**world.config() | dict(hidden=HIDDEN, dtype=torch.bfloat16) | options)


def gathered(ep, t):
    return [
        torch.tensor(said, dtype=torch.uint8).view(-1, raw(t).shape[1])
        for said in gather(ep.group, "rows", raw(t).tolist())
    ]


def check_received(got, sent, source):
    """Each row is the one that its source sent; padding is zero."""
    for row, (rank, token) in zip(raw(got), source.tolist(), strict=True):
        wanted = sent[rank][token] if rank >= 0 else torch.zeros_like(row)
        assert torch.equal(row, wanted)


def pair(rank, tokens, dtype, width, scales, device):
    return rows_of(dtype, rank, tokens, width, device), rows_of(
        torch.float32, rank + 5, tokens, scales, device
    )


TYPES = [torch.int8, FP8, torch.float32, torch.int32, torch.float16]


@given(
    worlds(),
    st.sampled_from(["rank", "expert"]),
    st.sampled_from(TYPES),
    st.integers(1, 16),
    st.integers(1, 9),
)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_rows_and_scales_of_any_type_and_width_arrive(world, layout, dtype, width, scales):
    """With their own dispatch, and along the routing of another."""
    device = world.device

    def rank_main(rank):
        tokens = len(world.topk_idx[rank])
        with with_room(world) as ep:
            align = 3 if layout == "expert" else 1
            x, s = pair(rank, tokens, dtype, width, scales, device)
            sent = gathered(ep, x), gathered(ep, s)
            d = ep.dispatch((x, s), world.topk_idx[rank], layout=layout, align=align)
            own = torch.randn(tokens, HIDDEN, device=device).bfloat16()
            e = ep.dispatch(own, world.topk_idx[rank], layout=layout, align=align)
            assert e.scales is None
            again = ep.dispatch((x, s), handle=e.handle)
            for got in (d, again):
                assert (got.x.dtype, got.scales.dtype) == (dtype, torch.float32)
                assert (got.x.shape[1], got.scales.shape[1]) == (width, scales)
                check_received(got.x, sent[0], d.source)
                check_received(got.scales, sent[1], d.source)
            back = ep.dispatch(own, handle=d.handle)  # the communicator's own rows along a routing of others
            check_received(back.x, gathered(ep, own), d.source)
            return None

    commlib.run_ranks(rank_main, world.size, device=device.type)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("width", [32, 7])
@pytest.mark.parametrize("layout", ["rank", "expert"])
def test_sums_are_those_of_a_communicator_of_that_type_and_width(device, dtype, width, layout):
    """Forward and backward, by a handle of rows of another type."""
    world = make_world([6, 9, 0], num_experts=5, topk=3, hidden=width, device=device)

    def run(ep, rank, handle):
        x = rows_of(dtype, rank, len(world.topk_idx[rank]), width, device).requires_grad_()
        d = ep.dispatch(x, world.topk_idx[rank] if handle is None else None, handle=handle, layout=layout)
        weights = torch.linspace(0.5, 1.5, len(d.x), device=device) if layout == "expert" else None
        bias = torch.ones(len(x), width, dtype=dtype, device=device)
        sums = ep.combine(torch.sin(d.x), d.handle, weights=weights, bias=bias)
        assert (sums.dtype, sums.shape) == (dtype, x.shape)
        sums.float().square().sum().backward()
        return d.x.detach(), sums.detach(), x.grad

    def rank_main(rank):
        options = dict(num_experts=5, topk=3, max_tokens=9, device=device, timeout=30.0)
        with (
            ExpertParallel(hidden=HIDDEN, dtype=torch.bfloat16, **options) as ep,
            ExpertParallel(hidden=width, dtype=dtype, **options) as own,
        ):
            tokens = len(world.topk_idx[rank])
            x = torch.zeros(tokens, HIDDEN, dtype=torch.bfloat16, device=device)
            d = ep.dispatch(x, world.topk_idx[rank], layout=layout)
            return run(ep, rank, d.handle), run(own, rank, None)

    for got, wanted in commlib.run_ranks(rank_main, world.size, device=device):
        for a, b in zip(got, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_quantised_rows_are_combined_in_the_communicators_type(device):
    """What a user of 8-bit rows does: half the bytes go, and sums come back in bfloat16."""
    world = make_world([20, 11], num_experts=6, topk=2, hidden=HIDDEN, device=device)

    def rank_main(rank):
        with with_room(world) as ep:
            x = world.x[rank].float()
            scale = x.abs().amax(1, keepdim=True) / 127
            d = ep.dispatch(((x / scale).round().to(torch.int8), scale), world.topk_idx[rank])
            y = (d.x.float() * d.scales).bfloat16()
            return ep.combine(y, d.handle).float(), x, d.x.dtype

    for rank, (sums, x, dtype) in enumerate(commlib.run_ranks(rank_main, world.size, device=device)):
        assert dtype == torch.int8
        owners = world.topk_idx[rank].clamp(min=0) * world.size // 6
        used = torch.tensor(
            [
                len({o for o, e in zip(a, b, strict=True) if e >= 0})
                for a, b in zip(owners.tolist(), world.topk_idx[rank].tolist(), strict=True)
            ],
            device=sums.device,
        )
        wanted = x * used.unsqueeze(1)
        assert (sums - wanted).abs().max() <= 0.05 * x.abs().max() * 2


def test_results_of_any_format_stay_in_their_slot(device):
    def rank_main(rank):
        config = dict(num_experts=4, hidden=HIDDEN, topk=1, max_tokens=8, device=device, timeout=30.0)
        with ExpertParallel(**config) as ep:
            x, s = pair(rank, 4, torch.int8, HIDDEN, 2, device)
            idx = torch.tensor([[0], [1], [2], [3]], device=device)
            d = ep.dispatch((x, s), idx, zero_copy=True)
            e = ep.dispatch((x, s), handle=d.handle, zero_copy=True)
            for got in (d, e):
                check_received(got.x, gathered(ep, x), d.source)
                check_received(got.scales, gathered(ep, s), d.source)
            held = ep.memory_report().slots_in_use
            del d, e, got
            return held, ep.memory_report().slots_in_use

    assert commlib.run_ranks(rank_main, 2, device=device) == [(2, 0)] * 2


def test_scales_may_lie_apart_and_arrays_of_numpy_stay_arrays():
    def rank_main(rank):
        with ExpertParallel(num_experts=4, hidden=HIDDEN, topk=1, max_tokens=8, device="cpu") as ep:
            x, wide = np.ones((4, 8), np.int8), np.arange(24, dtype=np.float32).reshape(4, 6)
            d = ep.dispatch((x, wide[:, 2:4]), np.array([[0], [1], [2], [3]]))
            assert isinstance(d.x, np.ndarray) and isinstance(d.scales, np.ndarray)
            return d.scales, d.source

    for scales, source in commlib.run_ranks(rank_main, 2):
        assert (scales == np.stack([source[:, 1] * 6 + 2, source[:, 1] * 6 + 3], 1)).all()


@pytest.mark.skipif(FP8 is torch.uint8, reason="this PyTorch has no float8")
def test_a_type_that_numpy_lacks_stays_a_tensor():
    with ExpertParallel(num_experts=4, hidden=HIDDEN, topk=1, max_tokens=8, device="cpu") as ep:
        scales = torch.ones(4, 2).to(FP8)
        d = ep.dispatch((np.ones((4, 8), np.int8), scales), np.array([[0], [1], [2], [3]]))
        assert isinstance(d.x, np.ndarray)
        assert torch.equal(d.scales.float(), scales.float())


@pytest.mark.parametrize("nodes", ["direct", "hierarchical"])
def test_between_nodes(nodes):
    world = make_world([5, 0, 7, 4], num_experts=8, topk=3, hidden=HIDDEN)

    def rank_main(rank):
        with with_room(world, ranks_per_node=2, routing=nodes) as ep:
            x, s = pair(rank, len(world.topk_idx[rank]), torch.int8, 40, 3, "cpu")
            d = ep.dispatch((x, s), world.topk_idx[rank], layout="expert", align=2)
            check_received(d.x, gathered(ep, x), d.source)
            check_received(d.scales, gathered(ep, s), d.source)
            y = rows_of(torch.float32, rank, len(d.x), 20, "cpu")
            assert ep.combine(y, d.handle).shape == (len(x), 20)

    commlib.run_ranks(rank_main, world.size)


def test_compiled_code_takes_pairs():
    def rank_main(rank):
        with ExpertParallel(num_experts=4, hidden=HIDDEN, topk=1, max_tokens=8, device="cpu") as ep:
            idx = torch.tensor([[0], [1], [2], [3]])

            def f(x, s):
                d = ep.dispatch((x, s), idx)
                return ep.combine((d.x.float() * d.scales).bfloat16(), d.handle), d.scales + 1

            x, s = torch.full((4, HIDDEN), 3, dtype=torch.int8), torch.full((4, 1), 0.5)
            torch._dynamo.reset()
            return torch.compile(f, backend="aot_eager", fullgraph=True)(x, s), f(x, s)

    ((got, wanted),) = commlib.run_ranks(rank_main, 1)
    torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("operation", ["dispatch", "dispatch with a handle", "combine"])
def test_ranks_whose_rows_differ_get_an_error(device, operation):
    """As many bytes of another type, and scales of another width, differ as well."""
    different = {
        "dispatch": [(torch.int8, 8, 2), (torch.int8, 8, 3)],
        "dispatch with a handle": [(torch.int8, 8, 2), (torch.uint8, 8, 2)],
        "combine": [(torch.float16, 8, 0), (torch.bfloat16, 8, 0)],
    }[operation]

    def rank_main(rank):
        config = dict(num_experts=4, hidden=HIDDEN, topk=1, max_tokens=8, device=device, timeout=30.0)
        with ExpertParallel(**config) as ep:
            idx = torch.tensor([[0], [1], [2], [3]], device=device)
            d = ep.dispatch(torch.zeros(4, HIDDEN, device=device).bfloat16(), idx)
            dtype, width, scales = different[rank]
            with pytest.raises(CallMismatch, match="Rows and scales must be of one type and width") as raised:
                if operation == "combine":
                    ep.combine(torch.ones(len(d.x), width, dtype=dtype, device=device), d.handle)
                else:
                    x = pair(rank, 4, dtype, width, scales, device)
                    ep.dispatch(x, idx) if operation == "dispatch" else ep.dispatch(x, handle=d.handle)
                ep.synchronize()
            return str(raised.value)

    for text in commlib.run_ranks(rank_main, 2, device=device):
        assert operation in text and " bytes of " in text


X, S, IDX = torch.zeros(4, 8, dtype=torch.int8), torch.ones(4, 2), torch.tensor([[0], [1], [2], [3]])
BAD = {
    "too wide": (
        (torch.zeros(4, 129, dtype=torch.int8), S),
        "x must be torch.bfloat16, got torch.int8 .*at most 128",
    ),
    "no room beside": (
        (torch.zeros(4, 126, dtype=torch.int8), S),
        "rows of 126 bytes and scales of 8 have no room",
    ),
    "no columns": ((torch.zeros(4, 0, dtype=torch.int8), S), r"x must be"),
    "scales of other rows": ((X, torch.ones(3, 2)), r"scales must be \[4, 1 or more\], got \[3, 2\]"),
    "one dimension": ((X, torch.ones(4)), r"scales must be \[4, 1 or more\], got \[4\]"),
    "scales apart": ((X, torch.ones(4, 4)[:, ::2]), "scales of a row must lie side by side"),
    "no scales": ((X, None), "x must be torch.bfloat16"),
    "no number": ((X, torch.ones(4, 1, dtype=torch.complex32)), "rows and scales cannot be torch.complex32"),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.filterwarnings("ignore:ComplexHalf")
def test_what_does_not_fit_is_refused_before_anything_is_sent(name):
    x, text = BAD[name]
    with ExpertParallel(num_experts=4, hidden=HIDDEN, topk=1, max_tokens=8, device="cpu") as ep:
        with pytest.raises(ValueError, match=text):
            ep.dispatch(x, IDX)
        d = ep.dispatch((X, S), IDX)
        assert torch.equal(d.scales, S)


@pytest.mark.parametrize("x", [(), (X,), (X, S, S)])
def test_a_tuple_that_is_no_pair_is_named(x):
    with (
        ExpertParallel(num_experts=4, hidden=HIDDEN, topk=1, max_tokens=8, device="cpu") as ep,
        pytest.raises(ValueError, match=rf"a pair \(rows, scales\), got a tuple of {len(x)}"),
    ):
        ep.dispatch(x, IDX)


def test_tensors_whose_values_are_not_at_their_address():
    """They are never summed as what lies there."""
    with ExpertParallel(num_experts=4, hidden=HIDDEN, topk=1, max_tokens=8, device="cpu") as ep:
        d = ep.dispatch((X, S), IDX)
        negated, out = torch.full((4, 1), 1 + 2j).conj().imag, torch.empty(4, 1)
        assert negated.is_neg()
        wanted = torch.full((4, 1), -2.0)
        assert torch.equal(ep.combine(negated, d.handle), wanted)
        assert torch.equal(ep.combine(negated, d.handle, out=out), wanted)
        assert torch.equal(ep.combine(wanted, d.handle, bias=negated, out=out), 2 * wanted)
        with pytest.raises(ValueError, match="out is a negated or conjugated view"):
            ep.combine(wanted, d.handle, out=negated)
        freed = torch.zeros(4, 1)
        freed.untyped_storage().resize_(0)
        for bad, text in ((torch.zeros(4, 1).to_sparse(), "a dense tensor"), (freed, "no memory of its own")):
            for options in ({}, {"out": out}, {"async_op": True}):
                with pytest.raises(ValueError, match=text):
                    ep.combine(bad, d.handle, **options)


def test_a_row_and_its_scales_may_fill_the_room():
    with ExpertParallel(num_experts=4, hidden=HIDDEN, topk=1, max_tokens=8, device="cpu") as ep:
        x = torch.arange(4 * 117, dtype=torch.int16).view(4, 117).to(torch.int8)
        s = torch.arange(4 * 11, dtype=torch.int16).view(4, 11).to(torch.int8)
        d = ep.dispatch((x, s), IDX, zero_copy=True)
        assert torch.equal(d.x, x) and torch.equal(d.scales, s)


def test_rows_without_a_gradient_say_so():
    with ExpertParallel(num_experts=4, hidden=HIDDEN, topk=1, max_tokens=8, device="cpu") as ep:
        weights = torch.ones(4, 1, requires_grad=True)
        with pytest.raises(ValueError, match="rows that come with scales have no gradient"):
            ep.dispatch((X, S), IDX, weights)
        with pytest.raises(ValueError, match="rows that come with scales have no gradient"):
            ep.dispatch((X, S.clone().requires_grad_()), IDX)
        d = ep.dispatch((X, S), IDX, weights.detach())
        with pytest.raises(ValueError, match=r"rows of torch\.int8 have no gradient"):
            ep.dispatch(X, None, weights, handle=d.handle)
        with pytest.raises(ValueError, match=r"rows of torch\.float64 have no gradient here"):
            ep.dispatch(torch.zeros(4, 8, dtype=torch.float64, requires_grad=True), handle=d.handle)
        with torch.no_grad():
            assert torch.equal(ep.dispatch(X, None, weights, handle=d.handle).x, X)
        with pytest.raises(ValueError, match="y must be of a floating type that can be summed"):
            ep.combine(d.x, d.handle)
        with pytest.raises(ValueError, match="bias must be as y is"):
            ep.combine(torch.zeros(4, 8), d.handle, bias=torch.zeros(4, 8).half())
        with pytest.raises(ValueError, match="out must be as y is"):
            ep.combine(torch.zeros(4, 8), d.handle, out=torch.zeros(4, 8).half())
        with pytest.raises(ValueError, match="float64 rows are summed in float64"):
            ep.combine(torch.zeros(4, 8, dtype=torch.float64), d.handle)


def test_types_have_numbers_that_fit():
    assert len(set(_TYPES)) == len(_TYPES) < 256
    assert _NUMBERS[torch.bfloat16] == 1 and _NUMBERS[torch.float32] == 3
    assert torch.int8 in _NUMBERS


def test_plain_rows_of_another_type_are_still_refused_in_a_fresh_dispatch():
    """Where no handle says that they are meant to differ, they are a mistake."""
    world = make_world([4], hidden=HIDDEN)
    with with_room(world) as ep:
        for x in (torch.zeros(4, HIDDEN).half(), torch.zeros(4, 32).bfloat16()):
            with pytest.raises(ValueError, match="x must be"):
                ep.dispatch(x, world.topk_idx[0])
        d = ep.dispatch(world.x[0].bfloat16(), world.topk_idx[0])
        torch.testing.assert_close(d.x, expected_rank_layout(world, 0).x.bfloat16())
