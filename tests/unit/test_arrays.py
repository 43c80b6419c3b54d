"""NumPy (and CuPy) arrays through DLPack."""

import numpy as np
import pytest
import torch
from reference import expected_rank_layout, make_world

import commlib
from commlib import ExpertParallel


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("read_only", [False, True])
def test_numpy_in_numpy_out(dtype, read_only):
    world = make_world([5, 7], dtype=dtype)

    def rank_main(rank):
        inputs = [t[rank].numpy().copy() for t in (world.x, world.topk_idx, world.topk_weights)]
        for array in inputs:
            array.flags.writeable = not read_only
        with ExpertParallel(**world.config()) as ep:
            d = ep.dispatch(*inputs)
            out = ep.combine(d.x, d.handle)
            expert = ep.dispatch(*inputs, layout="expert")
            return d, out, expert.offsets

    for rank, (d, out, offsets) in enumerate(commlib.run_ranks(rank_main, 2)):
        want = expected_rank_layout(world, rank)
        for got in (d.x, d.topk_idx, d.topk_weights, d.source, d.tokens_per_expert, out, offsets):
            assert isinstance(got, np.ndarray)
        np.testing.assert_array_equal(d.x, want.x.numpy())
        np.testing.assert_array_equal(d.topk_idx, want.topk_idx.numpy())
        assert out.shape == world.x[rank].shape


def test_an_array_on_a_device_that_torch_does_not_see_is_a_clear_error():
    class DeviceArray:  # stands for a CuPy array, on a machine without CUDA
        def __dlpack__(self, **_):
            raise BufferError("no stream")

        def __dlpack_device__(self):
            return 2, 0

    world = make_world([5])
    with (
        ExpertParallel(**world.config()) as ep,
        pytest.raises(ValueError, match="x: PyTorch cannot use"),
    ):
        ep.dispatch(DeviceArray(), world.topk_idx[0])


class Exporter:
    """An array that speaks DLPack and nothing else."""

    def __init__(self, array):
        self.array = array

    def __dlpack__(self, **options):
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


def numpy_call(ep, **changed):
    """dispatch and combine of good arrays, except those in ``changed``."""
    rows = np.ones((4, 64), np.float32)
    good = dict(x=rows, topk_idx=np.array([[0, 7]] * 4), topk_weights=np.ones((4, 2), np.float32))
    d = ep.dispatch(**{name: changed.get(name, value) for name, value in good.items()})
    inputs = {name: changed[name] for name in ("y", "bias", "out") if name in changed}
    return ep.combine(**{"y": d.x, "handle": d.handle, **inputs})


ROWS = {"x", "y", "bias", "out"}


def array_for(name):
    return np.ones((4, 64), np.float32) if name in ROWS else np.zeros((4, 2), np.int64)


def test_negative_strides_are_an_error():
    with ExpertParallel(**make_world([4]).config()) as ep:
        for name in ("x", "topk_idx", "topk_weights", "y", "bias", "out"):
            for array in (array_for(name)[::-1], array_for(name)[:, ::-1]):
                with pytest.raises(ValueError, match=f"{name}: PyTorch has no negative strides"):
                    numpy_call(ep, **{name: array})
        with pytest.raises(ValueError, match="x: PyTorch has no negative strides"):
            numpy_call(ep, x=Exporter(array_for("x")[::-1]))
        assert (numpy_call(ep, x=Exporter(array_for("x"))).numpy() == 1).all()


ODD_ARRAYS = {
    "other byte order": np.ones((4, 64), np.dtype(np.float32).newbyteorder()),
    "structured": np.zeros((4, 64), [("a", np.float32)]),
    "objects": np.ones((4, 64), object),
    "a field's stride": np.zeros((4, 64), [("a", np.float32), ("b", np.int8)])["a"],
    "no dimension": np.float32(1) * np.ones(()),
}


@pytest.mark.parametrize("name", ODD_ARRAYS)
def test_arrays_that_cannot_be_rows_are_an_error(name):
    array = ODD_ARRAYS[name]
    with ExpertParallel(**make_world([4]).config()) as ep:
        for argument in ("x", "y", "bias", "out"):
            with pytest.raises((ValueError, TypeError), match=argument):
                numpy_call(ep, **{argument: array})
        assert (numpy_call(ep) == 1).all()


def test_repeated_rows_are_rows():
    row = np.arange(64, dtype=np.float32)
    with ExpertParallel(**make_world([4]).config()) as ep:
        out = numpy_call(ep, x=np.broadcast_to(row, (4, 64)))
        assert (out == row).all()


def test_a_read_only_array_is_not_written():
    out = np.zeros((4, 64), np.float32)
    out.flags.writeable = False
    with ExpertParallel(**make_world([4]).config()) as ep:
        for array in (out, Exporter(out)):
            with pytest.raises(ValueError, match="out"):
                numpy_call(ep, out=array)
    assert (out == 0).all()
