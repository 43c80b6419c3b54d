"""Every vector path gives the bits of the plain one, and the plain one those of PyTorch."""

import itertools
from pathlib import Path

import pytest
import torch

from commlib import _core
from commlib.quantization import FORMATS, SOURCES, named, quantize
from commlib.settings import CORE_DTYPES

PATHS = _core.available_vector_ops()
SIZES = [1, 3, 16, 31, 64, 100, 128, 256, 1000]


def reduce(path, rows, weights=None):
    dtype = rows[0].dtype if rows else torch.float32
    out = torch.full_like(rows[0], float("nan"))
    _core.reduce(
        path,
        CORE_DTYPES[dtype],
        out.data_ptr(),
        [r.data_ptr() for r in rows],
        []
        if weights is None
        else [weights.data_ptr() + i * weights.element_size() for i in range(len(rows))],
        rows[0].numel(),
    )
    return out


def accumulator(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def aligned(n, dtype, offset=0):
    """n elements whose address is `offset` elements past a multiple of 64 bytes."""
    raw = torch.empty(n * dtype.itemsize + 128 + offset * dtype.itemsize, dtype=torch.uint8)
    start = -raw.data_ptr() % 64 + offset * dtype.itemsize
    return raw[start : start + n * dtype.itemsize].view(dtype)


def test_this_machine_runs_more_than_the_plain_path_if_it_has_vectors():
    flags = Path("/proc/cpuinfo").read_text()
    assert PATHS[-1] == "plain"
    assert ("avx2" in PATHS) == (" avx2 " in flags and " f16c " in flags)
    assert ("avx512" in PATHS) == (" avx512bw " in flags)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", list(CORE_DTYPES))
@pytest.mark.parametrize("weighted", [False, True])
def test_reduce_is_the_sum_in_order_with_one_rounding(path, dtype, weighted):
    g = torch.Generator().manual_seed(0)
    acc = accumulator(dtype)
    for n, sources, offset in itertools.product(SIZES, [1, 2, 5], [0, 1]):
        rows = []
        for _ in range(sources):
            rows.append(aligned(n, dtype, offset))
            rows[-1].copy_(torch.randn(n, generator=g, dtype=torch.float64).to(dtype))
        weights = torch.randn(sources, generator=g, dtype=acc) if weighted else None
        want = torch.zeros(n, dtype=acc)
        for j, row in enumerate(rows):
            want = want + (row.to(acc) * weights[j] if weighted else row.to(acc))
        assert torch.equal(reduce(path, rows, weights), want.to(dtype))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_sixteen_bit_value_survives(path, dtype):
    values = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype)
    out = reduce(path, [values])
    nan = values.isnan()
    assert torch.equal(out.isnan(), nan)
    # -0 + 0 is 0: sums start from +0.
    same = out.view(torch.int16) == values.view(torch.int16)
    assert bool((same | nan | (values == 0)).all())


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_is_to_nearest_even_as_in_torch(path, dtype):
    """A 16-bit value times an fp32 weight: products all over the range, including ties and subnormals."""
    g = torch.Generator().manual_seed(1)
    bits = torch.randint(-(2**15), 2**15, (4096,), generator=g).to(torch.int16)
    values = bits.view(dtype)
    for exponent in range(-20, 20, 3):
        weight = (torch.rand(1, generator=g) + 0.5) * 2.0**exponent
        for w in (weight, torch.tensor([2.0**exponent])):
            want = (values.float() * w + 0.0).to(dtype)
            got = reduce(path, [values], w)
            assert torch.equal(got.isnan(), want.isnan())
            assert torch.equal(got.nan_to_num(), want.nan_to_num())


@pytest.mark.parametrize("path", PATHS)
def test_no_source_gives_zeros(path):
    out = torch.full((100,), float("nan"))
    _core.reduce(path, _core.DType.f32, out.data_ptr(), [], [], 100)
    assert torch.equal(out, torch.zeros(100))


def weigh(path, row, weight, y):
    out, dot = torch.full_like(row, float("nan")), torch.full_like(weight, float("nan"))
    operands = (t.data_ptr() for t in (out, row, weight, y))
    _core.weigh(path, CORE_DTYPES[row.dtype], *operands, row.numel(), dot.data_ptr())
    return out, dot


def sum_in_parts(products):
    """Of 32 parts, each summed in order, and then as a tree."""
    parts = torch.zeros(32, dtype=products.dtype)
    for some in products.split(32):
        parts[: len(some)] += some
    while len(parts) > 1:
        lower, upper = parts.chunk(2)
        parts = lower + upper
    return parts


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", list(CORE_DTYPES))
def test_weigh_rounds_once_and_sums_products_in_the_order_of_its_parts(path, dtype):
    g = torch.Generator().manual_seed(2)
    acc = accumulator(dtype)
    for n, offset in itertools.product([*SIZES, 7168], [0, 1]):
        row, y = (aligned(n, dtype, offset) for _ in range(2))
        for t in (row, y):
            t.copy_(torch.randn(n, generator=g, dtype=torch.float64).to(dtype))
        row[0] = -0.0
        weight = torch.randn(1, generator=g, dtype=acc)
        out, dot = weigh(path, row, weight, y)
        want = (row.to(acc) * weight).to(dtype)
        assert torch.equal(out, want)
        assert torch.equal(out.signbit(), want.signbit())
        assert torch.equal(dot, sum_in_parts(row.to(acc) * y.to(acc)))


@pytest.mark.parametrize("path", PATHS)
def test_weigh_writes_nothing_beside_its_row(path):
    for dtype, n, offset in itertools.product(CORE_DTYPES, [1, 31, 64, 100], [0, 1]):
        frame = aligned(n + 256, dtype, offset).fill_(7)
        row, y = torch.zeros(2, n, dtype=dtype)
        weight, dots = (torch.full((n,), 7.0, dtype=accumulator(dtype)) for n in (1, 3))
        inside = frame[128 : 128 + n]
        addresses = (t.data_ptr() for t in (inside, row, weight, y))
        _core.weigh(path, CORE_DTYPES[dtype], *addresses, n, dots[1:].data_ptr())
        assert bool((inside == 0).all())
        assert bool((frame[:128] == 7).all())
        assert bool((frame[128 + n :] == 7).all())
        assert dots.tolist() == [7.0, 0.0, 7.0]


@pytest.mark.parametrize("path", PATHS)
def test_multicast_copies_to_every_target_and_nowhere_else(path):
    for n, targets, offset in itertools.product([1, 63, 64, 100, 128, 960, 4096], [0, 1, 3, 8], [0, 1]):
        source = torch.randint(0, 255, (n,), dtype=torch.uint8)
        frames = [aligned(n + 128, torch.uint8) for _ in range(targets)]
        for frame in frames:
            frame.fill_(7)
        _core.multicast(path, [f.data_ptr() + 64 + offset for f in frames], source.data_ptr(), n)
        for frame in frames:
            inside = frame[64 + offset : 64 + offset + n]
            assert torch.equal(inside, source)
            assert bool((frame[: 64 + offset] == 7).all())
            assert bool((frame[64 + offset + n :] == 7).all())


def test_an_unknown_path_names_the_known_ones():
    with pytest.raises(ValueError, match="plain"):
        _core.multicast("sse9", [], 0, 0)


@pytest.mark.skipif(not hasattr(torch, "float8_e8m0fnu"), reason="PyTorch has no float8_e8m0fnu")
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", SOURCES)
@pytest.mark.parametrize("format", FORMATS)
def test_quantize_has_the_bits_of_the_reference(path, dtype, format):
    """For every 16 bits there are, in blocks of neighbours and of strangers; for fp32, with more below."""
    q = named(format)
    bits = torch.arange(2**16).to(torch.int16)
    shuffled = bits[torch.randperm(2**16, generator=torch.Generator().manual_seed(0))]
    everything = torch.cat([bits, shuffled])
    if dtype == torch.float32:
        below = torch.randint(0, 2**16, everything.shape, generator=torch.Generator().manual_seed(1))
        everything = (everything.to(torch.int32) << 16) + below.to(torch.int32)
    for offset, width in ((0, 512), (1, 128), (3, 1024)):
        x = aligned(everything.numel(), dtype, offset).copy_(everything.view(dtype)).view(-1, width)
        rows = torch.empty(x.shape, dtype=q.row_dtype)
        scales = torch.empty(len(x), q.scales_of(width), dtype=q.scale_dtype)
        how = _core.Conversion(_core.Quantization(q.number), CORE_DTYPES[dtype], width)
        for row, scale, given in zip(rows, scales, x, strict=True):
            _core.quantize(path, how, row.data_ptr(), scale.data_ptr(), given.data_ptr())
        for got, wanted in zip((rows, scales), quantize(x, format), strict=True):
            assert torch.equal(got.view(torch.uint8), wanted.view(torch.uint8))


def test_float64_rows_are_not_converted():
    how = _core.Conversion(_core.Quantization.int8, _core.DType.f64, 8)
    with pytest.raises(ValueError, match="float64 rows are not converted"):
        _core.quantize("plain", how, 0, 0, 0)
