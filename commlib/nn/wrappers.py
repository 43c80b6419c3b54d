"""DistributedDataParallel and FSDP around models with experts.

Both suppose that every rank has the same parameters. Experts differ by rank: DDP would overwrite all ranks'
with rank 0's and average gradients of different parameters, FSDP would assemble parameters from parts of
different ones.
"""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook
from torch.nn.parallel import DistributedDataParallel

from commlib.startup.group import process_group_of, refuse_in_child

from .agreement import Agreement
from .experts import Experts
from .sharded import ShardedExperts, all_experts
from .shards import Shard, owner_of


def _on_registration(parent: nn.Module, name: str, child: nn.Module | None) -> None:
    """Notice a wrapper of a model in its constructor, before it sends anything."""
    if torch.compiler.is_compiling():
        return  # compiled autograd wraps modules that are half built, and traces this
    if isinstance(parent, DistributedDataParallel) and child is not None:
        _leave_out(parent, child)
    elif child is not None and _is_fsdp1(parent):
        _check_fsdp1(parent, child)


register_module_module_registration_hook(_on_registration)


def _leave_out(ddp: Any, model: nn.Module) -> None:
    """Make a DistributedDataParallel that is under construction leave experts alone."""
    # Experts may have more tensors than their own: parametrizations' parameters, buffers such as masks.
    parts = [m for m in model.modules() if isinstance(m, ShardedExperts) and m.shard is not None]
    theirs = {id(t) for part in parts for t in chain(part.parameters(), part.buffers())}
    theirs |= {id(p) for p in model.parameters() if owner_of(p) is not None}
    # Modules that share parameters have a shard each; and the wrapped object may be a list of parameters.
    known = [*(part.shard for part in parts), *map(owner_of, model.parameters())]
    shards = {s for s in known if s is not None}
    for shard in shards:
        _check_same_ranks(shard, ddp.process_group)
    for part in parts:
        _check_divides(part)
    if theirs and not any(p.requires_grad for p in model.parameters() if id(p) not in theirs):
        raise ValueError(
            "DistributedDataParallel has nothing to do here: no parameter is trained but those of experts, "
            "which differ by rank. Train without it, with commlib.nn.sync_gradients(model) after backward"
        )
    if any(id(p) in theirs for p in getattr(ddp, "_delay_all_reduce_params", ())):
        raise ValueError("delay_all_reduce_named_params has parameters of experts, which differ by rank")
    ddp.parameters_to_ignore |= {name for name, t in _names_ddp_asks_for(model) if id(t) in theirs}
    for p in model.parameters():
        if id(p) in theirs:
            p._ddp_ignored = True  # type: ignore[attr-defined]
    ddp._module_parameters = [p for p in ddp._module_parameters if id(p) not in theirs]
    for shard in shards:
        shard.gradient_divisor = shard.ranks.size


def _names_ddp_asks_for(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """All names that DistributedDataParallel's loops have for each parameter and buffer."""
    # A module may name its parameters as it likes: torch's checkpoint_wrapper leaves itself out.
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)
    for path, module in model.named_modules(remove_duplicate=False):
        for name, t in chain(module.named_parameters(recurse=False), module.named_buffers(recurse=False)):
            yield f"{path}.{name}", t
            yield f"{path}.{name}".removeprefix("."), t


def _check_same_ranks(shard: Shard, group: dist.ProcessGroup) -> None:
    """A wrapper that leaves experts alone must average all else over the ranks that they are spread over."""
    ranks = dist.get_process_group_ranks(group)
    known = process_group_of(shard.ranks.group)
    theirs = None if known is None else dist.get_process_group_ranks(known)
    if theirs != ranks:
        raise ValueError(
            f"the model is averaged over ranks {ranks}, its experts {shard} are spread over ranks "
            f"{theirs or 'that torch.distributed does not know'}: then experts are to be averaged over ranks "
            "that hold the same ones. Use commlib.nn.sync_gradients(model) after backward instead of a "
            "wrapper, or FSDP2 with commlib.nn.fully_shard_experts"
        )


def _check_divides(part: ShardedExperts) -> None:
    """Raise where nothing would divide some parameters' gradients: they would stay sums over ranks."""
    if part.reads_local:
        return
    # Parametrizations, pruning and weight_norm compute a weight from others.
    names = "|".join(map(re.escape, part.weight_names))
    feeds = re.compile(rf"(parametrizations\.)?({names})([._].*)?")
    more = [name for name, p in part.named_parameters() if p.requires_grad and not feeds.fullmatch(name)]
    its_own = type(part).forward is not Experts.forward
    if more or its_own:
        what = f"parameters of their own ({', '.join(more)})" if more else "a forward of their own"
        raise ValueError(
            f"{type(part).__name__} {part.shard} has {what}, whose gradients would be sums over all ranks, "
            "where those of all other parameters are means. Give the class shapes() and compute(); or read "
            "every parameter p by self.local(p), and set reads_local = True in it; or train without a "
            "wrapper, with commlib.nn.sync_gradients(model)"
        )


def _is_fsdp1(module: nn.Module) -> bool:
    loaded = sys.modules.get("torch.distributed.fsdp")
    return loaded is not None and isinstance(module, loaded.FullyShardedDataParallel)


def _check_fsdp1(fsdp: Any, model: nn.Module) -> None:
    left_alone = {id(p) for p in getattr(fsdp, "_ignored_params", ())}
    for part in model.modules():
        if not isinstance(part, ShardedExperts) or part.shard is None:
            continue
        # By now it has taken away the parameters that it does not leave alone.
        mine = [p for p in part._parameters.values() if p is not None]
        if not mine or any(id(p) not in left_alone for p in mine):
            raise ValueError(
                f"FullyShardedDataParallel would put experts {part.shard} together with other ranks' other "
                "experts. Use FSDP2 with commlib.nn.fully_shard_experts(model, mesh), or give it "
                "ignored_states=list(commlib.nn.expert_parameters(model)) and the ranks of the experts' "
                "communicator"
            )
        _check_same_ranks(part.shard, fsdp.process_group)
        _check_divides(part)
        part.shard.gradient_divisor = part.shard.ranks.size


def fully_shard_experts(module: nn.Module, mesh: dist.DeviceMesh, **options: Any) -> nn.Module:
    """Apply FSDP2 to the experts of a model, over ranks that hold the same ones.

    Call it before ``fully_shard`` on what contains the experts, and before the optimizer is made. On a mesh
    of data-parallel by expert-parallel ranks::

        mesh = init_device_mesh("cuda", (2, 4), mesh_dim_names=("dp", "ep"))
        ep = commlib.ExpertParallel(mesh["ep"], ...)
        ...
        commlib.nn.fully_shard_experts(model, mesh["dp"])
        fully_shard(model, mesh=mesh)  # 2-D: sharded over ep, replicated over dp; a flat mesh shards over all

    FSDP2 averages the experts' gradients over the ranks of ``mesh``; each gradient is a sum over the ranks of
    the communicator, and is divided by their number. So it becomes the mean over all ranks, like those that
    ``fully_shard`` makes for all other parameters. Divide nothing else.

    Where the communicator was given a DeviceMesh, and all of its ranks hold equally many experts, the
    parameters become DTensors over both meshes, which all of torch's functions for state dicts take.
    Otherwise they are DTensors over ``mesh``, and ``torch.distributed.checkpoint`` still saves and loads all
    experts.

    Args:
        module: with :class:`ShardedExperts` somewhere in it.
        mesh: of ranks that hold the same experts; one dimension, or two for hybrid sharding.
        options: of ``torch.distributed.fsdp.fully_shard``.

    Returns:
        module.

    Raises:
        ValueError: the module has no Experts, ranks of the mesh hold different ones, or shard_placement_fn
            shards a dimension other than that of experts where parameters do not become DTensors over both
            meshes; or a subclass of Experts would have gradients that nothing divides (see
            :meth:`ShardedExperts.local`). It is raised on every rank, and nothing has changed.
        TypeError: ``mesh`` is not a DeviceMesh.
    """
    from torch.distributed.fsdp import fully_shard

    if not isinstance(mesh, dist.DeviceMesh):
        raise TypeError(f"mesh must be a torch.distributed DeviceMesh, got {type(mesh).__name__}")
    refuse_in_child()
    with contextlib.ExitStack() as stack:
        wrong, advice = "ranks of the mesh hold different experts", _MESH_ADVICE
        same = [stack.enter_context(Agreement(group, wrong, advice)) for group in mesh.get_all_groups()]
        parts = all_experts(module)
        for part in parts:
            if part.shard is not None:
                _check_divides(part)
                _check_placement(part, part.shard, options.get("shard_placement_fn"))
        for agreement in same:
            agreement.lines = [f"experts {part.shard} in layer {i}" for i, part in enumerate(parts)]
    made: dict[int, tuple[Any, nn.Parameter]] = {}
    for part in parts:
        shard = part.shard
        if shard is not None:
            shard.fsdp_prepared = True
            if _can_be_dtensors(part, shard):
                _make_dtensors(part, shard, made)
            shard.gradient_divisor = shard.ranks.size
        fully_shard(part, mesh=mesh, **options)
    return module


_MESH_ADVICE = (
    "Give fully_shard_experts the same model on all ranks, and the dimensions over which experts are the "
    'same, such as mesh["dp"]'
)


def _can_be_dtensors(part: ShardedExperts, shard: Shard) -> bool:
    own = {id(p) for p in part._parameters.values()}  # not those of a parametrization
    plain = all(id(p) in own for p in part.parameters())
    return plain and shard.even and getattr(shard.ranks.group, "mesh", None) is not None


def _check_placement(part: ShardedExperts, shard: Shard, place: Callable[[nn.Parameter], Any] | None) -> None:
    """Raise where a state dict could say which experts are here, but not which parts of them."""
    if place is None or _can_be_dtensors(part, shard):
        return
    for name, p in part._parameters.items():
        placement = None if p is None else place(p)
        if getattr(placement, "dim", 0) != 0:
            raise ValueError(
                f"shard_placement_fn gives {placement} for {name} of experts {shard}: checkpoints could not "
                "say where that part lies. Shard dimension 0, or have as many experts on each rank and give "
                "ExpertParallel a DeviceMesh for its ranks"
            )


def _make_dtensors(part: ShardedExperts, shard: Shard, made: dict[int, tuple[Any, nn.Parameter]]) -> None:
    """Replace the parameters by DTensors over the communicator's ranks.

    Args:
        made: by the id of the original parameter, which may be in several places.
    """
    for name, p in list(part._parameters.items()):
        assert p is not None
        if id(p) not in made:
            whole: Any = shard.to_state_dict(p.detach())
            made[id(p)] = p, nn.Parameter(whole, requires_grad=p.requires_grad)
        setattr(part, name, made[id(p)][1])
    shard.as_dtensors = True
