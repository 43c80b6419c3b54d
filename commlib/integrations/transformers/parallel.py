"""Spread the experts of a loaded transformers model over ranks."""

from __future__ import annotations

from dataclasses import dataclass
from types import MethodType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.distributed.utils import gather_full_state_dict

from commlib._core import Placement
from commlib.nn import ShardedExperts, full_state_dict
from commlib.nn.agreement import describe, difference
from commlib.nn.shards import Ranks, Shard, is_dtensor
from commlib.settings import START_SECONDS
from commlib.startup.connect import resolve_device
from commlib.startup.conversation import gather
from commlib.startup.group import Group, TorchGroup, gather_numbers, resolve_group

from .exchange import Exchange, parameters_replaced

_Model = TypeVar("_Model", bound=PreTrainedModel)


@dataclass(eq=False)
class ModelRanks:
    """The ranks over which a model's experts are spread."""

    group: Group
    rank: int
    size: int
    device: torch.device


class ParallelExperts(ShardedExperts):
    """A transformers model's experts, some of which are here: a base class beside the model's own."""

    reads_local = True
    exchange: Exchange

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        self._adopt_all()
        local = {name: self.local(p) for name, p in self._parameters.items() if p is not None}
        changed = {name: t for name, t in local.items() if t is not self._parameters[name]}
        with parameters_replaced(self, changed):
            return self.exchange(super().forward, hidden_states, top_k_index, top_k_weights)


def parallelize(model: _Model, group: Any = None) -> _Model:
    """Keep this rank's experts of a loaded model, and reach those of the other ranks by commlib.

    The model is changed in place. It computes the same as before, for this rank's tokens: all ranks call it
    together, each with its own batch, of any size. Train it as docs/training.md describes (DDP, FSDP2 by
    ``commlib.nn.fully_shard_experts``, ``sync_gradients``). ``generate`` goes on, on all ranks, until the
    last has ended (``synced_gpus``), and ``save_pretrained``, on all ranks, writes the whole model.

    The number of experts need not be a multiple of the number of ranks. Each rank needs memory for the whole
    model: ``from_pretrained`` with a ``DistributedConfig`` loads parts.

    Args:
        model: on the device where it is to run, the same on all ranks.
        group: as :class:`commlib.ExpertParallel` takes it; None: all ranks.

    Returns:
        ``model``.

    Raises:
        TypeError, ValueError: it is no model of transformers; it has no experts, or they cannot be spread:
            quantised, tied, spread already, with parameters that all experts share, or fewer than ranks; or
            ranks have different models. Nothing has changed, on any rank.
        CommError: another rank's model cannot be spread, and why; or that rank does not come.
    """
    known = resolve_group(group)
    with known.converse(START_SECONDS) as talk:
        talk.task, talk.advice = "spread the model", "Do all ranks call parallelize at this place?"
        found = _experts_in(model, known.size)
        lines = [describe(name, p) for name, p in model.named_parameters()]
        _check_same(gather(talk, "models", lines))
    device = resolve_device(next(model.parameters()).device, known)
    ranks = ModelRanks(known, known.rank, known.size, device)
    for module in found:
        _keep_own(module, ranks)
    for method in (generate, _has_unfinished_sequences, save_pretrained):
        setattr(model, method.__name__, MethodType(method, model))
    return model


def gather_state_dict(model: PreTrainedModel) -> dict[str, Any]:
    """The state dict of the unsharded model, with transformers' names, on the CPU of the first rank.

    All ranks call it; the others get an empty one. ``model.save_pretrained(path)``, on all ranks, writes it
    in the hub's layout (one tensor for each expert), for ``from_pretrained``.

    Args:
        model: from :func:`parallelize`, or loaded with a ``DistributedConfig``.

    Raises:
        RuntimeError: torch.distributed does not know the ranks.
    """
    if any(isinstance(part, ShardedExperts) for part in model.modules()):
        return full_state_dict(model)
    return gather_full_state_dict(model)


# -- what is checked -----------------------------------------------------------------------------------------


def _experts_in(model: Any, size: int) -> list[Any]:
    """The modules to spread.

    Raises:
        TypeError: it is no model of transformers.
        ValueError: there are none, or some cannot be spread.
    """
    name = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"parallelize takes a model of transformers, got {name}")
    if any(isinstance(part, ShardedExperts) for part in model.modules()):
        raise ValueError(f"the experts of this {name} have been spread already")
    if any(is_dtensor(p) for p in model.parameters()):
        raise ValueError(
            f"this {name} has been spread by transformers or FSDP2 already: pass "
            'DistributedConfig(ep_size=..., ep_implementation="commlib") to from_pretrained instead'
        )
    if getattr(model, "hf_quantizer", None) is not None or getattr(model, "is_quantized", False):
        raise ValueError(f"this {name} is quantised: load it in bfloat16, float16 or float32")
    # Modules that transformers' use_experts_implementation decorates take and return what Exchange does.
    found = {path: part for path, part in model.named_modules() if hasattr(part, "_is_expert_parallel")}
    if not found:
        raise ValueError(
            f"{name} has no experts that commlib knows how to spread: those that transformers decorates with "
            "use_experts_implementation, as in Mixtral, Qwen3-MoE, DeepSeek-V3 or GPT-OSS"
        )
    seen: dict[int, str] = {}
    for path, part in found.items():
        _check_rows(path, part, size)
        for p in part.parameters():
            if seen.setdefault(id(p), path) != path:
                raise ValueError(f"{path} and {seen[id(p)]} have a parameter in common (tied experts)")
    return list(found.values())


def _check_rows(path: str, part: Any, size: int) -> None:
    total = part.num_experts
    if total < size:
        raise ValueError(f"{path} has {total} experts, fewer than there are ranks, {size}")
    for name, t in (*part.named_parameters(), *part.named_buffers()):
        own = name in part._parameters
        if not own or t.shape[:1] != (total,):
            raise ValueError(
                f"{path}.{name} {list(t.shape)} is not one of the experts' own parameters, with a row for "
                f"each of {total}: experts that share something cannot be spread"
            )
        if not t.is_floating_point() or t.is_meta:
            what = "has no memory (meta device)" if t.is_meta else f"is {t.dtype}"
            raise ValueError(f"{path}.{name} {what}: load the model in bfloat16, float16 or float32")


def _check_same(lines: list[list[str]]) -> None:
    for rank, theirs in enumerate(lines):
        if theirs != lines[0]:
            raise ValueError(f"ranks have different models: {difference(0, lines[0], rank, theirs)}")


# -- what is changed -----------------------------------------------------------------------------------------


_classes: dict[type, type] = {}


def _parallel_class(cls: type) -> type:
    if cls not in _classes:
        _classes[cls] = type(
            f"Parallel{cls.__name__}", (ParallelExperts, cls), {"__module__": cls.__module__}
        )
    return _classes[cls]


def _keep_own(module: Any, ranks: ModelRanks) -> None:
    total = module.num_experts
    mine = Placement(total, ranks.size).experts_of(ranks.rank)
    module.__class__ = _parallel_class(type(module))
    module.exchange = Exchange(ranks.group, total)  # which keeps no process group
    module.num_experts = len(mine)
    if ranks.size > 1:
        module.shard = Shard(ranks, mine.start, len(mine), total)
    for name, whole in list(module._parameters.items()):
        rows = whole.detach()[mine.start : mine.stop].clone()  # not a view, which would keep all
        module.register_parameter(name, nn.Parameter(rows, whole.requires_grad))


def generate(self: Any, *args: Any, synced_gpus: bool | None = None, **kwargs: Any) -> Any:
    """As the model's own; all ranks go on until the last has ended, since its tokens need their experts."""
    if synced_gpus is None:
        synced_gpus = _ranks_of(self) is not None
    return type(self).generate(self, *args, synced_gpus=synced_gpus, **kwargs)


def _has_unfinished_sequences(self: Any, this_peer_finished: bool, synced_gpus: bool, device: Any) -> bool:
    """For ``generate``: whether any rank that shares the experts has; transformers would ask all ranks."""
    ranks = _ranks_of(self) if synced_gpus else None
    if ranks is None:
        return not this_peer_finished
    finished = torch.tensor([int(this_peer_finished)], device=device)
    return not bool(gather_numbers(ranks.group, finished).all())


def save_pretrained(
    self: Any, save_directory: Any, *args: Any, state_dict: dict[str, Any] | None = None, **kwargs: Any
) -> None:
    """As the model's own, but all ranks call it; the first writes all experts, and then all go on."""
    given = state_dict is not None
    if state_dict is not None:
        _check_whole(self, state_dict)
    else:
        _await_all("save the model", _WHO_SAVES)
        state_dict = gather_state_dict(self)
    type(self).save_pretrained(self, save_directory, *args, state_dict=state_dict, **kwargs)
    if not given and dist.is_initialized():
        dist.barrier()


def _check_whole(model: nn.Module, state_dict: dict[str, Any]) -> None:
    """Refuse one rank's parts: DTensors where torch.distributed knows the ranks, else too few experts."""
    totals = {
        f"{path}.{name}": part.shard.total
        for path, part in model.named_modules()
        if isinstance(part, ParallelExperts) and part.shard is not None
        for name in part._parameters
    }
    parts = next(
        (
            name
            for name, value in state_dict.items()
            if is_dtensor(value) or (name in totals and len(value) != totals[name])
        ),
        None,
    )
    if parts is not None:
        raise ValueError(
            f"state_dict[{parts!r}] is one rank's part: leave state_dict out (model.save_pretrained(path), "
            "on all ranks), or pass what gather_state_dict(model) returns"
        )


_WHO_SAVES = (
    "All ranks of torch.distributed's default group call save_pretrained: "
    "commlib.integrations.transformers.Trainer sees to it, where transformers' calls it on the first alone"
)


def _await_all(task: str, advice: str) -> None:
    """Return when all ranks have come, or raise PeerTimeout that names the missing: before torch waits."""
    if dist.is_initialized():
        with TorchGroup(None).converse(START_SECONDS) as talk:
            talk.task, talk.advice = task, advice
            gather(talk, task, None)


def _ranks_of(model: nn.Module) -> Ranks | None:
    """The ranks that share the model's experts; None: this one is alone."""
    shard = next(part.shard for part in model.modules() if isinstance(part, ParallelExperts))
    return None if shard is None else shard.ranks
