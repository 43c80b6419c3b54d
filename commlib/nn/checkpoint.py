"""Whole state dicts of models whose experts are spread over ranks."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .agreement import Agreement, describe
from .sharded import all_experts
from .shards import gathered, is_dtensor


@torch.no_grad()
def full_state_dict(module: nn.Module) -> dict[str, Any]:
    """The state dict of the unsharded model, on the CPU of the first rank, to save as one file.

    It is gathered tensor by tensor; the model's ``load_state_dict`` takes it on any number of ranks, and
    where nothing is sharded. For models that do not fit one host, and to resume training (optimizers too),
    use ``torch.distributed.checkpoint`` with ``module.state_dict()``. All ranks of torch.distributed's
    default group call it.

    Args:
        module: with :class:`ShardedExperts` somewhere in it; under DDP, after FSDP2, or plain.

    Returns:
        Names as in ``module.state_dict()``; empty on all ranks but the first.

    Raises:
        ValueError: the module has no Experts, or ranks have different ones; on all ranks.
        RuntimeError: experts are on other ranks, and torch.distributed has not been initialised.
        NotImplementedError: experts have tensors that a state dict cannot describe.
    """
    with Agreement(dist.group.WORLD if dist.is_initialized() else None) as all_ranks:
        state = _sharded_state_dict(_unwrapped(module))
        sent = {name: t for name, t in state.items() if is_dtensor(t)}
        all_ranks.lines = [
            f"{describe(name, t)} over {t.device_mesh.size()} ranks" for name, t in sent.items()
        ]
    first = not dist.is_initialized() or dist.get_rank() == 0
    for name, value in state.items():
        whole = gathered(value, first) if name in sent else value
        if first:  # always a copy, as gathered tensors are
            state[name] = whole.to("cpu", copy=name not in sent) if isinstance(whole, Tensor) else whole
    return state if first else {}


def _sharded_state_dict(model: nn.Module) -> dict[str, Any]:
    """Its tensors themselves say which rows are here, whatever hooks have made of them and their names."""
    shards = [part.shard for part in all_experts(model) if part.shard is not None]
    if any(shard.mesh() is None for shard in shards):
        raise RuntimeError(
            "torch.distributed does not know the ranks that hold the other experts: call "
            "torch.distributed.init_process_group before the communicator is made, and "
            "destroy_process_group after this, or save each rank's own state_dict()"
        )
    return dict(model.state_dict())


def _unwrapped(module: nn.Module) -> nn.Module:
    """The model in DDP and torch.compile, which change its parameters' names."""
    while True:
        name = "module" if isinstance(module, DistributedDataParallel) else "_orig_mod"
        inner = getattr(module, name, None)
        if not isinstance(inner, nn.Module):
            return module
        module = inner
