"""Whole state dicts of models whose experts are spread over ranks."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from commlib.group import let_go, process_group_of
from commlib.topology import experts_of

from .agreement import describe, is_same_everywhere
from .experts import Experts, all_experts
from .shards import Shard, is_dtensor


@torch.no_grad()
def full_state_dict(module: nn.Module) -> dict[str, Any]:
    """The state dict of the unsharded model, on the CPU of the first rank: to be saved as one file.

    It is gathered tensor by tensor; ``load_state_dict`` of the model takes it on any number of ranks, and
    where nothing is sharded. For models that do not fit one host, and to go on with training (optimizers
    too), use ``torch.distributed.checkpoint`` with ``module.state_dict()``. All ranks of torch.distributed's
    default group call it.

    Args:
        module: with :class:`Experts` somewhere in it; under DDP, after FSDP2, or plain.

    Returns:
        Names as in ``module.state_dict()``; empty on all ranks but the first.

    Raises:
        ValueError: the module has no Experts, or ranks have different ones.
        RuntimeError: experts are on other ranks, and torch.distributed has not been initialised.
    """
    model = _unwrapped(module)
    parts = all_experts(model)
    if any(part.shard is not None and part.shard.mesh() is None for part in parts):
        raise RuntimeError(
            "torch.distributed does not know the ranks that hold the other experts: call "
            "torch.distributed.init_process_group before the communicator is made, and "
            "destroy_process_group after this, or save each rank's own state_dict()"
        )
    first = not dist.is_initialized() or dist.get_rank() == 0
    for part in parts:
        part._check_savable()
    # Names as the state dict says them, which need not be those of the modules: checkpoint_wrapper's are not.
    state = model.state_dict(keep_vars=True)
    sharded = {id(t): shard for t, shard in _sharded(parts)}
    blocks = {name: sharded[id(t)] for name, t in state.items() if id(t) in sharded}
    _check_same_parts(state, blocks, parts)
    for name, value in state.items():
        if name in blocks:
            whole = _all_blocks(value, blocks[name], first)
        else:
            whole = value.full_tensor() if is_dtensor(value) else value
        if first:
            state[name] = whole.detach().cpu() if isinstance(whole, Tensor) else whole
    return dict(state) if first else {}


def _sharded(parts: list[Experts]) -> Iterator[tuple[Tensor, Shard]]:
    """What has a row for each expert of this rank, and is no DTensor over the ranks of all experts."""
    for part in parts:
        if part.shard is not None and not part.shard.as_dtensors:
            for t in chain(part._parameters.values(), part._buffers.values()):
                if t is not None:
                    yield t, part.shard


def _check_same_parts(state: dict[str, Any], blocks: dict[str, Shard], parts: list[Experts]) -> None:
    """Raise where ranks would gather different tensors, or those of different numbers of ranks."""
    sent = ((name, t) for name, t in state.items() if name in blocks or is_dtensor(t))
    lines = [describe(name, t, blocks.get(name)) for name, t in sent]
    for ep in dict.fromkeys(part.shard.ep for part in parts if part.shard is not None):
        is_same_everywhere(lines, (), process_group_of(ep.group), ep.device)


def _unwrapped(module: nn.Module) -> nn.Module:
    """The model in DDP and torch.compile, which change its parameters' names."""
    while True:
        inner = module.module if isinstance(module, DistributedDataParallel) else None
        inner = inner or getattr(module, "_orig_mod", None)
        if not isinstance(inner, nn.Module):
            return module
        module = inner


def _all_blocks(p: Any, shard: Shard, first: bool) -> Tensor | None:
    """All ranks' experts on the CPU of the first rank. One rank's at a time are anywhere twice."""
    mine = p.full_tensor() if is_dtensor(p) else p.detach()
    group, ep = process_group_of(shard.ep.group), shard.ep
    blocks = []
    for rank in range(ep.size):
        count = len(experts_of(rank, ep.size, shard.total))
        block = mine.contiguous() if rank == ep.rank else mine.new_empty(count, *mine.shape[1:])
        with let_go(block):
            dist.broadcast(block, group=group, group_src=rank)
        if first:
            blocks.append(block.cpu())
    return torch.cat(blocks) if first else None
