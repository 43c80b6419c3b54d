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
    class DeviceArray:  # what a CuPy array is to us, on a machine without CUDA
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
