"""`bench/dispatch_combine.py --device cuda` on CPUs: gloo in NCCL's place, stand-ins for what needs a GPU.

The first argument names what goes wrong, separated by commas; the others are the benchmark's.
"""

import functools
import os
import sys
import types
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symmetric

from bench import dispatch_combine, gpu_comparison
from bench.systems.gloo import GlooBaseline

FAULTS = set(sys.argv.pop(1).split(","))


def exchange(parts):
    """Tensors for each rank, at their destinations: by source."""
    everybody = [None] * dist.get_world_size()
    dist.all_gather_object(everybody, parts)
    return [theirs[dist.get_rank()] for theirs in everybody]


def lay_out(chunks, into, at, by_major):
    """Write chunks one after another; an empty group of ``by_major`` takes a row, as in PyTorch."""
    into.fill_(float("nan") if into.is_floating_point() else -7)
    place = 0
    for i, chunk in enumerate(chunks):
        at[0, i], at[1, i] = len(chunk), place
        into[place : place + len(chunk)] = chunk
        place += len(chunk)
        if by_major and i % by_major == by_major - 1:
            place += int(at[0, i + 1 - by_major : i + 1].sum() == 0)


def all_to_all_vdev_2d(source, into, splits, at, group, major_align=None):
    assert group == dist.group.WORLD.group_name and source.shape[1:] == into.shape[1:]
    ranks, pieces = dist.get_world_size(), len(splits) // dist.get_world_size()
    if "vdev-fails-on-rank-1" in FAULTS:
        if dist.get_rank() == 1:
            raise RuntimeError("nvshmem: out of memory\nat some address")
        return
    parts = source[: int(splits.sum())].split(splits.tolist())
    came = exchange([parts[r * pieces : (r + 1) * pieces] for r in range(ranks)])
    lay_out([came[s][p] for p in range(pieces) for s in range(ranks)], into, at, by_major=ranks)


def all_to_all_vdev_2d_offset(source, into, splits_at, at, group):
    ranks = dist.get_world_size()
    chunks = [source[begin : begin + rows].clone() for rows, begin in zip(*splits_at.tolist(), strict=True)]
    came = exchange([chunks[r::ranks] for r in range(ranks)])
    lay_out([chunk for chunks in came for chunk in chunks], into, at, by_major=0)


class Config:
    def get_nvl_buffer_size_hint(self, hidden_bytes, num_ranks):
        return hidden_bytes * num_ranks

    get_rdma_buffer_size_hint = get_nvl_buffer_size_hint


class Buffer:
    """DeepEP's, as its documentation has it."""

    num_sms = 20

    def __init__(self, group, num_nvl_bytes=0, num_rdma_bytes=0, explicitly_destroy=False):
        assert group.size() == dist.get_world_size() and num_nvl_bytes > 0 and explicitly_destroy
        if "deep-ep-does-not-start" in FAULTS:
            raise AssertionError("No NVLink between GPUs 0 and 1")

    @staticmethod
    def set_num_sms(new_num_sms):
        assert new_num_sms % 2 == 0, "The SM count must be even"

    @staticmethod
    def get_dispatch_config(num_ranks):
        assert num_ranks in (2, 4, 8), f"Unsupported number of EP ranks: {num_ranks}"
        return Config()

    get_combine_config = get_dispatch_config

    def get_dispatch_layout(self, topk_idx, num_experts):
        ranks = dist.get_world_size()
        owner = topk_idx // (num_experts // ranks)
        goes = torch.stack([(owner == r).any(1) for r in range(ranks)], 1)
        per_expert = torch.bincount(topk_idx.flatten(), minlength=num_experts).int()
        return goes.sum(0).int(), None, per_expert, goes, object()

    def dispatch(
        self,
        x,
        *,
        topk_idx,
        topk_weights,
        num_tokens_per_rank,
        num_tokens_per_rdma_rank,
        is_token_in_rank,
        num_tokens_per_expert,
    ):
        experts, (tokens, hidden) = len(num_tokens_per_expert), x.shape
        assert is_token_in_rank.sum(0).equal(num_tokens_per_rank.long()) and num_tokens_per_rdma_rank is None
        sizes = {"num_experts": experts, "hidden": hidden, "topk": topk_idx.shape[1], "max_tokens": tokens}
        handle = GlooBaseline(None, dtype=x.dtype, **sizes)
        rows = handle.dispatch(x, topk_idx, topk_weights).clone()
        if "deep-ep-is-wrong" in FAULTS:
            rows[-1] += 1
        return rows, handle.topk_idx, handle.topk_weights, [], handle, object()

    def combine(self, x, handle):
        return handle.combine(x), None, object()

    def destroy(self):
        print("destroyed", flush=True)


symmetric.is_nvshmem_available = lambda: "no-nvshmem" not in FAULTS
symmetric.set_backend = lambda name: None
symmetric.rendezvous = lambda tensor, group: None
symmetric.enable_symm_mem_for_group = lambda name: None
symmetric.empty = lambda *shape, dtype, device: torch.full(shape, 7, dtype=dtype, device=device)
torch.ops.symm_mem.all_to_all_vdev_2d = all_to_all_vdev_2d
torch.ops.symm_mem.all_to_all_vdev_2d_offset = all_to_all_vdev_2d_offset
sys.modules["deep_ep"] = None if "no-deep-ep" in FAULTS else types.SimpleNamespace(Buffer=Buffer)
sys.modules["cupy"] = None
torch.cuda.nccl.version = lambda: (2, 99, 1)
gpu_comparison.gpu = lambda index: {"gpu": "GPU of a test"}
gpu_comparison.take_gpu = lambda launch: (torch.device("cpu"), 1)
gpu_comparison.compare = functools.partial(gpu_comparison.compare, backend="gloo")
os.environ["GLOO_SOCKET_IFNAME"] = "lo"
dispatch_combine.main()
