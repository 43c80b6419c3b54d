"""Rows converted on the way: what arrives is what the pair of commlib.quantize would bring, bit for bit."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reference import make_world

import commlib
from commlib import CallMismatch, ExpertParallel, HandleError
from commlib.quantization import FORMATS, SOURCES, named

if not hasattr(torch, "float8_e8m0fnu"):
    pytest.skip("PyTorch has no float8_e8m0fnu", allow_module_level=True)

HIDDEN = 256
INF, NAN = float("inf"), float("nan")
LAYOUTS = [("rank", {}), ("expert", {"align": 3})]
BOUNDED = [*((layout, more | {"bounded": True}) for layout, more in LAYOUTS), ("batched", {"bounded": True})]


def raw(tensor):
    return tensor.contiguous().cpu().view(torch.uint8)


def same(got, wanted):
    assert (got.dtype, got.shape) == (wanted.dtype, wanted.shape)
    assert torch.equal(raw(got), raw(wanted))


def of_every_kind(tokens, hidden, dtype, seed=0):
    """Rows of many magnitudes, and of any bits; zeros, denormal numbers, infinities and NaNs among them."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, hidden, generator=g) * torch.exp(4 * torch.randn(tokens, 1, generator=g))
    x = x.to(dtype)
    info = torch.finfo(dtype)
    special = [0.0, -0.0, INF, -INF, NAN, info.max, info.min, info.tiny, -info.smallest_normal / 4, 1e-5]
    for t, value in zip(range(0, tokens, 2), special, strict=False):
        x[t, (37 * t) % hidden] = value
    for t in range(5, tokens, 7):
        x[t] = [0.0, -0.0, info.tiny, info.max, INF, NAN][t % 6]
    bits = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    for t in range(3, tokens, 11):
        limit = 2 ** (8 * dtype.itemsize - 1)
        x[t] = torch.randint(-limit, limit, (hidden,), generator=g).to(bits).view(dtype)
    return x


def apart(x, device):
    """The same rows, a stride apart, and from an address that no vector likes."""
    wide = torch.zeros(len(x), x.shape[1] + 13, dtype=x.dtype, device=device)
    wide[:, 5 : 5 + x.shape[1]] = x
    return wide[:, 5 : 5 + x.shape[1]]


def with_room(world, **options):
    return ExpertParallel(**world.config() | dict(hidden=HIDDEN, dtype=torch.bfloat16, num_sms=2) | options)


def check_alike(d, pair, rows=slice(None)):
    same(d.x[rows], pair.x[rows])
    same(d.scales[rows], pair.scales[rows])
    for name in ("topk_idx", "topk_weights", "source", "tokens_per_expert", "offsets"):
        mine, theirs = getattr(d, name), getattr(pair, name)
        assert (mine is None) == (theirs is None)
        if mine is not None:
            assert torch.equal(mine, theirs), name


def compare(world, xs, format, layout, options, **room):
    """On every rank: with quantize, against the pair, fresh and along a handle of either."""

    def rank_main(rank):
        with with_room(world, **room) as ep:
            x, idx, weights = xs[rank], world.topk_idx[rank], world.topk_weights[rank]
            pair = ep.dispatch(commlib.quantize(x, format), idx, weights, layout=layout, **options)
            d = ep.dispatch(x, idx, weights, layout=layout, quantize=format, **options)
            # What is behind the last row of a bounded dispatch is undefined.
            rows = pair.source[..., 0] >= 0 if options.get("bounded") else slice(None)
            check_alike(d, pair, rows)
            for handle in (d.handle, pair.handle):
                again = ep.dispatch(x, None, weights, handle=handle, quantize=format)
                check_alike(again, pair, rows)

    commlib.run_ranks(rank_main, world.size, device=world.device.type)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", SOURCES)
@pytest.mark.parametrize(("layout", "options"), [*LAYOUTS, *BOUNDED])
def test_what_arrives_is_the_pair_of_the_reference(device, format, dtype, layout, options):
    world = make_world([40, 0, 23], num_experts=6, topk=3, hidden=HIDDEN, device=device)
    xs = [of_every_kind(len(idx), HIDDEN, dtype, r).to(device) for r, idx in enumerate(world.topk_idx)]
    compare(world, xs, format, layout, options)
    compare(world, [apart(x, device) for x in xs], format, layout, options | {"zero_copy": True})


@pytest.mark.parametrize("grouping", ["direct", "once"])
@pytest.mark.parametrize("format", FORMATS)
def test_rows_of_a_real_width_however_they_are_grouped(device, grouping, format):
    """3 kilobytes and more: several stages of a GPU's ring."""
    world = make_world([17, 30], num_experts=6, topk=3, hidden=HIDDEN, device=device)
    xs = [of_every_kind(len(idx), 7168, torch.bfloat16, r).to(device) for r, idx in enumerate(world.topk_idx)]
    for layout, options in LAYOUTS:
        compare(world, xs, format, layout, options, hidden=7168, grouping=grouping)


@st.composite
def cases(draw):
    format = draw(st.sampled_from(FORMATS))
    block = named(format).block or draw(st.sampled_from([1, 3, 16, 100]))
    hidden = block * draw(st.integers(1, 5))
    size = draw(st.integers(1, 4))
    tokens = draw(st.lists(st.integers(0, 12), min_size=size, max_size=size))
    topk = draw(st.integers(1, 4))
    world = make_world(
        tokens, 5, topk, hidden, seed=draw(st.integers(0, 99)), holes=draw(st.sampled_from([0.0, 0.3]))
    )
    dtype = draw(st.sampled_from(SOURCES))
    layout, options = draw(st.sampled_from(LAYOUTS + BOUNDED))
    return format, world, dtype, layout, options, draw(st.booleans())


@given(cases())
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_world_in_any_format(device, case):
    format, world, dtype, layout, options, strided = case
    world = world.to(device)
    xs = [of_every_kind(len(idx), world.hidden, dtype, r).to(device) for r, idx in enumerate(world.topk_idx)]
    if strided:
        xs = [apart(x, device) for x in xs]
    # Wide enough for a tiny row and its scales.
    compare(
        world,
        xs,
        format,
        layout,
        options,
        hidden=world.hidden,
        dtype=torch.float64 if world.hidden < 4 else torch.float32,
    )


@pytest.mark.parametrize("format", FORMATS)
def test_ranks_on_several_nodes(format):
    world = make_world([23, 0, 40, 17], num_experts=12, topk=4, hidden=HIDDEN)
    xs = [of_every_kind(len(idx), HIDDEN, torch.bfloat16, r) for r, idx in enumerate(world.topk_idx)]
    for routing in ("hierarchical", "direct"):
        for layout, options in LAYOUTS:
            compare(world, xs, format, layout, options, ranks_per_node=2, routing=routing)


def test_asynchronous_and_combined(device):
    """Half the bytes go, and sums come back in bfloat16, by the same handle."""
    world = make_world([20, 11], num_experts=6, topk=2, hidden=HIDDEN, device=device, dtype=torch.bfloat16)

    def rank_main(rank):
        with with_room(world) as ep:
            inputs = world.x[rank], world.topk_idx[rank], world.topk_weights[rank]
            d = ep.dispatch(*inputs, layout="expert", quantize="fp8_e4m3", async_op=True).finish()
            rows = commlib.dequantize(d.x, d.scales)
            sums = ep.combine(rows, d.handle, weights=d.topk_weights)
            own = ep.dispatch(*inputs, layout="expert")
            wanted = ep.combine(own.x, own.handle, weights=own.topk_weights)
            torch.testing.assert_close(sums, wanted, rtol=0.1, atol=0.05)
            back = commlib.dequantize(*commlib.quantize(own.x, "fp8_e4m3"))
            assert torch.equal(rows, back)

    commlib.run_ranks(rank_main, world.size, device=device)


def test_no_tokens_and_no_experts(device):
    world = make_world([0, 4], num_experts=4, topk=2, hidden=HIDDEN, device=device)
    world.topk_idx[1][:] = -1
    for layout, options in LAYOUTS:
        compare(world, [x.bfloat16() for x in world.x], "mxfp8", layout, options)


# -- bad input ----------------------------------------------------------------------------------------------

IDX = torch.zeros(4, 1, dtype=torch.int64)
X = torch.randn(4, HIDDEN).bfloat16()


@pytest.fixture
def alone():
    with ExpertParallel(num_experts=4, hidden=HIDDEN, topk=1, max_tokens=8, device="cpu") as ep:
        yield ep
        pair = commlib.quantize(X, "int8")  # nothing was sent, and the communicator is as it was
        same(ep.dispatch(X, IDX, quantize="int8").x, pair[0])


@pytest.mark.parametrize(
    ("x", "format", "text"),
    [
        (
            X,
            "fp4",
            'there is no format \'fp4\' to quantize to; there are "fp8_e4m3", "fp8_e4m3_ue8m0", "mxfp8"',
        ),
        (X, 8, "there is no format 8 to quantize to"),
        (X.double(), "int8", r"x must be bfloat16, float16 or float32 to be quantized, got torch\.float64"),
        (X.to(torch.int8), "int8", r"to be quantized, got torch\.int8"),
        ((X, X), "int8", r'x is a pair \(rows, scales\) already, and quantize="int8" makes one of rows'),
        (X[:, :128], "int8", r"x must be \[rows, 256\], got \[4, 128\]"),
        (X[0], "int8", r"x must be \[rows, 256\], got \[256\]"),
        (X[:, ::2].repeat(1, 2)[:, ::1].t().contiguous().t(), "int8", "must lie side by side"),
    ],
)
def test_what_cannot_be_quantized_is_named_before_anything_is_sent(alone, x, format, text):
    with pytest.raises(ValueError, match=text):
        alone.dispatch(x, IDX, quantize=format)


def test_a_width_of_no_whole_blocks_names_the_formats_that_do():
    with ExpertParallel(num_experts=4, hidden=96, topk=1, max_tokens=8, device="cpu") as ep:
        text = 'needs rows of a multiple of 128 elements, got 96; "mxfp8" and "int8" would do'
        with pytest.raises(ValueError, match=text):
            ep.dispatch(X[:, :96], IDX, quantize="fp8_e4m3")
        with pytest.raises(ValueError, match=text):
            commlib.quantize(X[:, :96], "fp8_e4m3")
        d = ep.dispatch(X[:, :96], IDX, quantize="mxfp8")
        with pytest.raises(ValueError, match=r"rows of 512 bytes and scales of 4 have no room"):
            ep.dispatch(torch.zeros(4, 512), handle=d.handle, quantize="int8")
        assert ep.dispatch(X[:, :128], handle=d.handle, quantize="fp8_e4m3").x.shape == (4, 128)


def test_rows_too_narrow_for_their_scale_have_no_room():
    with (
        ExpertParallel(num_experts=4, hidden=2, topk=1, max_tokens=8, device="cpu") as ep,
        pytest.raises(ValueError, match="rows of 2 bytes and scales of 4 have no room"),
    ):
        ep.dispatch(X[:, :2], IDX, quantize="int8")


def test_no_gradient_goes_through(alone):
    text = r"rows that are quantized have no gradient here.*detach\(\)"
    x, weights = X.clone().requires_grad_(), torch.ones(4, 1, requires_grad=True)
    for inputs in ((x, IDX), (X, IDX, weights)):
        for options in ({}, {"async_op": True}, {"bounded": True}):
            with pytest.raises(ValueError, match=text):
                alone.dispatch(*inputs, quantize="int8", **options)
            with torch.no_grad():
                d = alone.dispatch(*inputs, quantize="int8", **options).finish()
                same(d.x[:4], commlib.quantize(X, "int8")[0])


def test_waves_do_not_go_with_it(alone):
    with pytest.raises(ValueError, match="goes with neither a handle nor bounded nor quantize"):
        alone.dispatch(X, IDX, layout="expert", async_op=True, in_waves=True, quantize="int8")


def test_a_released_handle(alone):
    d = alone.dispatch(X, IDX)
    d.handle.release()
    with pytest.raises(HandleError):
        alone.dispatch(X, handle=d.handle, quantize="int8")


@pytest.mark.parametrize(
    ("mine", "theirs", "text"),
    [
        ("fp8_e4m3", "fp8_e4m3_ue8m0", "and scales of 2 bytes of float8_e8m0fnu"),
        ("mxfp8", "fp8_e4m3_ue8m0", "256 bytes of float8_e4m3fn, and scales of 8 bytes of float8_e8m0fnu"),
        ("int8", "fp8_e4m3", "256 bytes of int8, and scales of 4 bytes of float32"),
        ("int8", None, "Rows and scales must be of one type and width on all ranks"),
    ],
)
def test_formats_that_differ_are_a_mismatch(device, mine, theirs, text):
    differ(device, mine, theirs, text, along=False)


def test_formats_that_differ_along_a_handle_are_a_mismatch_too():
    differ("cpu", "int8", "fp8_e4m3", "256 bytes of int8, and scales of 4 bytes of float32", along=True)


def differ(device, mine, theirs, text, along):
    """Both ranks hear of both formats."""
    world = make_world([4, 4], num_experts=4, topk=1, hidden=HIDDEN, device=device, dtype=torch.bfloat16)

    def rank_main(rank):
        with with_room(world) as ep:
            x, idx = world.x[rank], world.topk_idx[rank]
            handle = ep.dispatch(x, idx).handle if along else None
            with pytest.raises(CallMismatch) as caught:
                ep.dispatch(x, None if along else idx, handle=handle, quantize=(mine, theirs)[rank])
                ep.synchronize()
            return str(caught.value)

    for said in commlib.run_ranks(rank_main, 2, device=device):
        assert text in said and "Rows and scales must be of one type" in said


def test_a_pair_and_rows_that_become_one_go_together():
    """Each rank may convert its rows as it likes: what travels is the same."""
    world = make_world([5, 6], num_experts=4, topk=2, hidden=HIDDEN, dtype=torch.bfloat16)

    def rank_main(rank):
        with with_room(world) as ep:
            x, idx = world.x[rank], world.topk_idx[rank]
            mixed = (
                ep.dispatch(x, idx, quantize="mxfp8")
                if rank
                else ep.dispatch(commlib.quantize(x, "mxfp8"), idx)
            )
            check_alike(mixed, ep.dispatch(x, idx, quantize="mxfp8"))

    commlib.run_ranks(rank_main, 2)


# -- the reference itself -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", SOURCES)
@pytest.mark.parametrize("format", FORMATS)
def test_what_comes_back_is_as_near_as_the_format_allows(format, dtype):
    """The bounds of docs/quantize.md."""
    x = of_every_kind(200, 512, torch.float32).clamp(-6e4, 6e4).nan_to_num().to(dtype)
    q = named(format)
    rows, scales = commlib.quantize(x, format)
    back = commlib.dequantize(rows, scales, torch.float64).unflatten(1, (scales.shape[1], -1))
    blocks = x.double().unflatten(1, (scales.shape[1], -1))
    greatest = blocks.abs().amax(-1, keepdim=True).clamp(min=1e-4)
    error = (back - blocks).abs()
    if format == "int8":
        assert bool((error <= greatest / 254 * (1 + 1e-5)).all())
    else:
        coarser = 2 if q.has_powers else 1
        least = greatest * coarser / 448 * 2**-10
        assert bool((error <= torch.maximum(blocks.abs() * 2**-4, least) * (1 + 1e-5)).all())
    assert bool((scales.double().unsqueeze(-1) * (1 + 1e-6) >= greatest / q.most).all())


def test_powers_of_two_lose_nothing():
    x = torch.tensor([448.0, -224, 2**-6, 2**-9, 1, -1.75, 0, 0]).repeat(2, 16)
    for format in ("fp8_e4m3", "fp8_e4m3_ue8m0", "mxfp8"):
        rows, scales = commlib.quantize(x, format)
        assert bool((scales.float() == 1).all())
        assert torch.equal(commlib.dequantize(rows, scales, torch.float32), x)


@pytest.mark.parametrize("format", FORMATS)
def test_a_block_that_is_not_finite_comes_back_as_nan(format):
    x = torch.ones(3, 256)
    x[0, 3], x[1, 250] = NAN, -INF
    back = commlib.dequantize(*commlib.quantize(x, format))
    block = named(format).block or 256
    assert bool(back[0, :block].isnan().all()) and bool(back[1, 256 - block :].isnan().all())
    assert bool(back[2].isfinite().all())
    assert block == 256 or bool(back[0, block:].isfinite().all())


def test_bad_input_of_the_reference():
    with pytest.raises(ValueError, match="there is no format"):
        commlib.quantize(X, "fp9")
    with pytest.raises(ValueError, match="at least one dimension"):
        commlib.quantize(torch.tensor(1.0), "int8")
    with pytest.raises(ValueError, match="multiple of 1 elements, got 0"):
        commlib.quantize(torch.zeros(3, 0), "int8")
    rows, scales = commlib.quantize(X, "mxfp8")
    for bad in (scales[:2], scales[:, :3], scales[:, :0], scales[0]):
        with pytest.raises(ValueError, match=r"scales must be \[\.\.\., S\]"):
            commlib.dequantize(rows, bad)
    assert commlib.quantize(X.view(2, 2, HIDDEN), "mxfp8")[1].shape == (2, 2, 8)


# -- torch.compile ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("layout", "options"), [*LAYOUTS, ("rank", {"bounded": True})])
def test_a_compiled_layer_gives_the_same(device, format, layout, options):
    world = make_world([6], num_experts=4, topk=2, hidden=HIDDEN, device=device, dtype=torch.bfloat16)

    def layer(x, idx):
        d = ep.dispatch(x * 2, idx, layout=layout, quantize=format, **options)
        again = ep.dispatch(x * 2, handle=d.handle, quantize=format)
        return (
            d.x.view(torch.uint8),
            d.scales.view(torch.uint8),
            again.x.view(torch.uint8),
            d.tokens_per_expert,
        )

    with with_room(world) as ep:
        inputs = world.x[0], world.topk_idx[0]
        eager = layer(*inputs)
        rows = int(eager[3].sum()) if options.get("bounded") else None
        torch._dynamo.reset()
        compiled = torch.compile(layer, fullgraph=True)(*inputs)
        unique = int((world.topk_idx[0] >= 0).any(1).sum()) if options.get("bounded") else rows
        for a, b in zip(compiled[:3], eager[:3], strict=True):
            assert a.shape == b.shape and torch.equal(a[:unique], b[:unique])


@pytest.mark.parametrize("format", FORMATS)
def test_ops_pass_torchs_own_checks(device, format):
    world = make_world([6], num_experts=4, topk=2, hidden=HIDDEN, device=device, dtype=torch.bfloat16)
    number = named(format).number
    with with_room(world) as ep:
        d = ep.dispatch(world.x[0], world.topk_idx[0], quantize=format)
        bounds = (0, 0, 0, 0, 0, False)
        sizes = ep._sizes
        arguments = (
            world.x[0],
            world.topk_idx[0],
            None,
            ep._name,
            *sizes,
            False,
            1,
            False,
            False,
            None,
            *bounds,
            number,
        )
        tests = ("test_schema", "test_faketensor")
        torch.library.opcheck(torch.ops.commlib.dispatch.default, arguments, test_utils=tests)
        assert d.scales is not None


def test_subnormal_halves_are_not_lost_where_the_processor_flushes_others(alone):
    x = torch.full((4, HIDDEN), 6e-8, dtype=torch.float16)
    x[:, 0] = 1e-4
    rows, scales = commlib.quantize(x, "fp8_e4m3")
    if not torch.set_flush_denormal(True):
        pytest.fail("this processor cannot flush subnormal numbers")
    try:
        d = alone.dispatch(x, torch.zeros(4, 1, dtype=torch.int64), quantize="fp8_e4m3")
    finally:
        torch.set_flush_denormal(False)
    same(d.x, rows)
    same(d.scales, scales)
    assert rows.view(torch.uint8).count_nonzero() == rows.numel()
