"""Gradients of experts beside those of all other parameters: their norm, their averages."""

from __future__ import annotations

import weakref
from collections import defaultdict
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from commlib.startup.group import Group, gather_in, gather_numbers, let_go
from commlib.weak import WeakMap

from .agreement import Agreement, describe, number_of
from .sharded import ShardedExperts, all_experts, shared_parameters
from .sharded_gradient import marked
from .shards import Ranks, is_dtensor


@torch.no_grad()
def clip_grad_norm_(
    module: nn.Module, max_norm: float, norm_type: float = 2.0, error_if_nonfinite: bool = False
) -> Tensor:
    """Clip the gradients of a model with experts to a norm, taken over all ranks' gradients together.

    Like ``torch.nn.utils.clip_grad_norm_(module.parameters(), ...)``, which does the same where no parameter
    is a DTensor; this takes FSDP2's as well, and gathers once for each communicator. All ranks call it.

    Args:
        module: with :class:`ShardedExperts` somewhere in it.
        max_norm, norm_type, error_if_nonfinite: as torch's.

    Returns:
        The norm before clipping, a scalar, the same bits on every rank if the gradients of shared parameters
        are.

    Raises:
        ValueError: the module has no Experts; or, on CPUs, ranks have different ones.
        RuntimeError: with ``error_if_nonfinite``: the norm is not finite.
    """
    order = float(norm_type)
    parts = _parts_of(module)
    said = [str(part) for part in parts if part.groups] + [f"norms of order {order}"]
    norms = [part.norm(order, said) for part in parts]
    total = torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device) for norm in norms]), order)
    if error_if_nonfinite and not bool(total.isfinite()):
        raise RuntimeError(
            f"the norm of order {norm_type} of the gradients is {float(total)}: it cannot be clipped"
        )
    by_device: dict[torch.device, list[Tensor]] = defaultdict(list)
    for p in module.parameters():
        if p.grad is not None:
            by_device[p.device].append(_local(p.grad))
    for device, grads in by_device.items():
        torch._foreach_mul_(grads, (max_norm / (total + 1e-6)).clamp(max=1.0).to(device))
    return total


@dataclass(frozen=True)
class _Part:
    """Parameters whose gradients' norm is gathered at once, over each of the groups in turn."""

    parameters: list[nn.Parameter]
    groups: tuple[Group | dist.ProcessGroup, ...]
    device: torch.device
    dtype: torch.dtype

    def __str__(self) -> str:
        sizes = (
            group.size() if isinstance(group, dist.ProcessGroup) else group.size for group in self.groups
        )
        return f"{str(self.dtype).removeprefix('torch.')} over {' x '.join(map(str, sizes))} ranks"

    def norm(self, order: float, said: list[str]) -> Tensor:
        grads = [_local(p.grad) for p in self.parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([g for g in grads if g.numel()], order).to(
            self.device, self.dtype
        )
        for group in self.groups:
            norm = torch.linalg.vector_norm(_gather_norms(group, norm, said), order)
        return norm


def _parts_of(module: nn.Module) -> list[_Part]:
    """The parts, in the same order on every rank: that depends on the parameters alone, not on gradients."""
    groups: dict[int, tuple[Any, ...]] = {}
    for experts in all_experts(module):
        shard = experts.shard
        if shard is not None and not shard.as_dtensors:
            groups |= {id(p): (*_process_groups(p), shard.ranks.group) for p in experts.parameters()}
    alike: dict[Any, list[nn.Parameter]] = defaultdict(list)
    for p in dict.fromkeys(module.parameters()):
        alike[groups.get(id(p), _process_groups(p)), p.device].append(p)
    # In the parameters' dtype even where this rank has no gradient, or none with elements.
    return [
        _Part(mine, over, device, reduce(torch.promote_types, (p.dtype for p in mine)))
        for (over, device), mine in alike.items()
    ]


def _gather_norms(group: Group | dist.ProcessGroup, norm: Tensor, said: list[str]) -> Tensor:
    """Norms of all ranks of the group, which must be about to gather the same.

    Args:
        said: what they gather.

    Raises:
        ValueError: they are not; only where the host need not wait to find out.
    """
    digest = number_of(said) >> 11  # as float64, which is sent whatever the norm's dtype, can hold it
    sent = torch.stack([norm.double(), torch.tensor(digest, dtype=torch.float64, device=norm.device)])
    everywhere = (
        gather_in(group, sent) if isinstance(group, dist.ProcessGroup) else gather_numbers(group, sent)
    )
    norms, digests = everywhere.unbind(1)
    if digests.device.type == "cpu" and bool((digests != digests[0]).any()):
        raise ValueError(
            "ranks clip different models, and nothing has been clipped: this one gathers gradients in "
            f"{', '.join(said)}. All must have parameters of the same dtypes, spread over the same ranks"
        )
    return norms.to(norm.dtype)


def _process_groups(p: Any) -> tuple[dist.ProcessGroup, ...]:
    """The groups over which a parameter is spread, if it is a DTensor."""
    if not is_dtensor(p):
        return ()
    return tuple(
        p.device_mesh.get_group(dim) for dim, how in enumerate(p.placements) if not how.is_replicate()
    )


def _local(grad: Any) -> Tensor:
    """This rank's part, as a plain tensor."""
    return (grad.to_local() if is_dtensor(grad) else grad).as_subclass(Tensor)


@torch.no_grad()
def sync_gradients(module: nn.Module, dp_group: dist.ProcessGroup | None = None) -> None:
    """After backward, without DDP or FSDP2: make all gradients those of the mean of the ranks' losses.

    Gradients of shared parameters are averaged; those of experts, which are sums over the ranks of their
    communicator, are divided by the number of these ranks, and averaged over ranks that hold the same
    experts. Call it once for each step, on all ranks of ``dp_group``, after the last backward.

    Args:
        module: with :class:`ShardedExperts` somewhere in it.
        dp_group: the ranks that train the model together; None: torch.distributed's default group. It must
            contain all ranks of a communicator.

    Raises:
        ValueError: the module has no Experts, not all ranks of their communicator are in the group, this
            process is not, FSDP2 has the parameters, or ranks have different parameters to train. No gradient
            has changed.
        TypeError: an argument of the wrong type.
        RuntimeError: torch.distributed has not been initialised.
    """
    _check_group(dp_group)
    if not dist.is_initialized():
        raise RuntimeError("sync_gradients needs torch.distributed.init_process_group first")
    with Agreement(dp_group or dist.group.WORLD) as all_ranks:
        experts = [part for part in all_experts(module) if any(p.requires_grad for p in part.parameters())]
        if any(is_dtensor(p) for p in module.parameters()):
            raise ValueError("sync_gradients is for plain parameters; those of FSDP2 are averaged by it")
        if any(p.grad is not None and p.grad.layout is not torch.strided for p in module.parameters()):
            raise ValueError("sync_gradients takes no sparse gradients (nn.Embedding has them if told to)")
        spread = {id(p): part.shard for part in experts if part.shard is not None for p in part.parameters()}
        trained = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
        all_ranks.lines = [
            describe(name, p, spread.get(id(p))) + _dtype_of_gradient(p) for name, p in trained
        ]
        all_ranks.mask = [p.grad is not None for _, p in trained]
    everywhere = all_ranks.same_mask
    replicas = [_replicas(part, dp_group) for part in experts]
    average(list(shared_parameters(module)), dp_group, everywhere)
    done: set[int] = set()
    for part, group in zip(experts, replicas, strict=True):
        parameters = [p for p in part.parameters() if id(p) not in done]  # modules may share some
        done |= {id(p) for p in parameters}
        shard = part.shard
        divisor = 1 if shard is None else shard.ranks.size // shard.gradient_divisor
        for p in parameters:
            if p.grad is not None and divisor > 1:
                p.grad.div_(divisor)
        average(parameters, group, everywhere)
        for p in parameters:
            if shard is not None and type(p.grad) is Tensor:  # from torch.autograd.grad, or another replica
                p.grad = marked(p.grad, shard)


def _dtype_of_gradient(p: nn.Parameter) -> str:
    chosen = getattr(p, "grad_dtype", None)
    return "" if chosen in (None, p.dtype) else f" with gradients in {chosen}"


def _check_group(dp_group: Any) -> None:
    # A number: torch says that it has -1 ranks, and takes sums over it as done.
    if isinstance(dp_group, int) and dp_group == dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError("this process is not a member of dp_group, the ranks that train the model together")
    if dp_group is not None and not isinstance(dp_group, dist.ProcessGroup):
        raise TypeError(
            "dp_group must be a torch.distributed ProcessGroup (of a DeviceMesh, mesh.get_group()), got "
            f"{type(dp_group).__name__}"
        )


def average(parameters: list[nn.Parameter], group: dist.ProcessGroup | None, everywhere: bool) -> None:
    """Average gradients over a group; one that only some ranks have counts as zero on the others.

    Args:
        everywhere: whether every gradient is on all ranks or on none.
    """
    wanted = [p for p in parameters if p.requires_grad]
    if not wanted or dist.get_world_size(group) == 1:
        return
    has = [p.grad is not None for p in wanted]
    if not everywhere:
        somewhere = torch.tensor(has, dtype=torch.int32, device=wanted[0].device)
        with let_go(somewhere):
            dist.all_reduce(somewhere, dist.ReduceOp.MAX, group=group)
        has = somewhere.bool().tolist()
    alike: dict[Any, list[Tensor]] = defaultdict(list)
    for p, one in zip(wanted, has, strict=True):
        if one:
            if p.grad is None:
                p.grad = torch.zeros_like(p, dtype=getattr(p, "grad_dtype", None))
            alike[p.device, p.grad.dtype].append(p.grad)
    for grads in alike.values():  # one message, not one for each gradient
        flat = torch.cat([grad.flatten() for grad in grads])
        flat /= dist.get_world_size(group)  # before they are added up: float16 ends at 65504
        with let_go(flat):
            dist.all_reduce(flat, group=group)
        for grad, mean in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
            grad.copy_(mean.view_as(grad))


# By communicator and the group's name: the ranks that hold the same experts. Weak, as in TorchGroup.
_groups: WeakMap[Ranks, dict[str, weakref.ref[dist.ProcessGroup]]] = WeakMap()


def _replicas(experts: ShardedExperts, dp_group: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
    """The ranks of the group that hold the same experts, as a group; None: all of them do."""
    shard = experts.shard
    if shard is None:
        return dp_group
    known = _groups.setdefault(shard.ranks, {})
    whole = dist.group.WORLD if dp_group is None else dp_group
    assert whole is not None
    replicas = ref() if (ref := known.get(whole.group_name)) else None
    if replicas is None:
        places: list[Any] = [None] * dist.get_world_size(dp_group)
        ranks = shard.ranks
        dist.all_gather_object(places, (dist.get_rank(), ranks.rank, ranks.size), group=dp_group)
        held = [sum(rank == place for _, place, _ in places) for rank in range(ranks.size)]
        if any(size != ranks.size for _, _, size in places) or len(set(held)) != 1 or 0 in held:
            raise ValueError(
                f"dp_group has {len(places)} ranks, which hold the parts 0 to {ranks.size - 1} of the "
                f"experts {held} times: it must hold each as often, so that all ranks of a communicator are "
                "in it"
            )
        mine = [rank for rank, place, _ in places if place == ranks.rank]
        replicas = dist.new_group(mine, use_local_synchronization=True)
        known[whole.group_name] = weakref.ref(replicas)
    return replicas
