"""A rank's part of tensors that have a row for each expert, as torch.distributed understands it.

State dicts have such a part as a DTensor over the ranks of the communicator, so that
``torch.distributed.checkpoint`` saves and loads all experts, on any number of ranks. Where all ranks hold
equally many experts, that is DTensor's own ``Shard(0)``. Elsewhere commlib's blocks are not those of
``torch.chunk``, which DTensor knows; the local tensor then says itself where it lies (:class:`_Rows`).
"""

from __future__ import annotations

import sys
from itertools import chain
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook
from torch.utils._pytree import tree_leaves, tree_map

from commlib._core import Placement
from commlib.startup.group import Group, let_go, process_group_of
from commlib.weak import WeakMap

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def is_dtensor(value: Any) -> bool:
    """Whether it is a DTensor; does not import that module, which takes seconds."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


class Ranks(Protocol):
    """The part of :class:`commlib.ExpertParallel` that describes its ranks."""

    group: Group
    rank: int
    size: int
    device: torch.device


class Shard:
    """Where the experts of one rank are among those of all ranks.

    Attributes:
        ranks: those that hold all experts.
        first, count: the experts of this rank.
        total: of all ranks.
        fsdp_prepared: whether FSDP2 may spread the parameters over ranks that hold the same experts.
        as_dtensors: whether the parameters are DTensors over these ranks themselves.
        gradient_divisor: what the gradients of the parameters are divided by; see Experts.
    """

    def __init__(self, ranks: Ranks, first: int, count: int, total: int) -> None:
        self.ranks, self.first, self.count, self.total = ranks, first, count, total
        self.fsdp_prepared = self.as_dtensors = False
        self.gradient_divisor = 1

    def __deepcopy__(self, memo: dict[int, Any]) -> Shard:
        copied = Shard(self.ranks, self.first, self.count, self.total)
        copied.__dict__.update(self.__dict__)
        return copied

    def __reduce__(self) -> Any:
        return type(None), ()  # it is an attribute of parameters, which may be pickled

    def __repr__(self) -> str:
        return f"{self.first} to {self.first + self.count - 1} of {self.total}"

    @property
    def even(self) -> bool:
        """Whether all ranks hold equally many; these are then the rows that DTensor gives them."""
        return self.total % self.ranks.size == 0

    def mesh(self) -> DeviceMesh | None:
        """The ranks as a DeviceMesh; None where torch.distributed does not know them."""
        from torch.distributed.device_mesh import DeviceMesh

        group = process_group_of(self.ranks.group)
        if group is None:
            return None
        given = getattr(self.ranks.group, "mesh", None)
        if given is not None:
            return given
        # Made each time: it keeps the process group, which we must not do (see TorchGroup).
        return DeviceMesh.from_group(group, self.ranks.device.type)

    def to_state_dict(self, t: Tensor) -> Tensor:
        """A tensor with a row for each expert here, as part of one with a row for every expert."""
        if self.as_dtensors and is_dtensor(t):
            return t
        mesh = self.mesh()
        if mesh is None:
            return t
        from torch.distributed.tensor import Shard as ByRow

        if is_dtensor(t):  # FSDP2's, over ranks that hold the same experts
            first, local = self.first + _offset(t), t.to_local()  # type: ignore[attr-defined]
            mesh, placements = t.device_mesh, t.placements  # type: ignore[attr-defined]
        else:
            first, local, placements = self.first, t, [ByRow(0)]
        if is_dtensor(t) or not self.even:
            local = _Rows(local, first, self, is_dtensor(t))
        return _part(local, self.total, mesh, placements)

    def from_state_dict(self, given: Tensor, like: Any) -> Tensor:
        """This rank's experts from a loaded tensor, in the form of the parameter ``like``.

        Args:
            given: a result of :meth:`to_state_dict`, or a tensor of all experts or of those here.
        """
        if self.as_dtensors and is_dtensor(like):
            return given if is_dtensor(given) or given.shape[:1] != like.shape[:1] else _cut(given, like)
        first, count = self.first, self.count
        if is_dtensor(like):
            first, count = first + _offset(like), like.to_local().shape[0]
        rows = _local_rows(given, first, count, self.total)
        if not is_dtensor(like) or rows.shape[:1] != (count,):
            return rows
        return _part(rows, self.count, like.device_mesh, like.placements)

    def misfit(self, given: Tensor) -> str | None:
        """What is wrong with the number of experts loaded, if anything."""
        found = given.shape[0] if given.dim() else 0
        if found in (self.total, self.count):
            return None
        return f"what is loaded has {found} experts, the model has {self.total}, of which {self} are here"


def _offset(t: Any) -> int:
    """The row at which this rank's part of a DTensor begins."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    return compute_local_shape_and_global_offset(t.shape, t.device_mesh, t.placements)[1][0]


def _part(local: Tensor, total: int, mesh: Any, placements: Any) -> Tensor:
    """A DTensor of ``total`` rows, of which this rank has ``local``."""
    from torch.distributed.tensor import DTensor

    shape = torch.Size([total, *local.shape[1:]])
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=shape, stride=stride)


def gathered(t: Any, first: bool) -> Tensor | None:
    """All rows of a DTensor on the first rank, experts' on its CPU. All ranks that have some call it.

    Experts are the bulk of a model: at any time, only one rank's exist twice.
    """
    local, mesh, ways = t.to_local(), t.device_mesh, t.placements
    if isinstance(local, _Rows) and (shard := local.shard) is not None:
        rows: Any = local.rows
        if local.spread:
            rows = _part(rows, shard.count, mesh, ways)
            rows = rows.full_tensor()
        placement = Placement(shard.total, shard.ranks.size)
        counts = [len(placement.experts_of(rank)) for rank in range(shard.ranks.size)]
        return _all_blocks(rows, counts, process_group_of(shard.ranks.group), first)
    if mesh.ndim == 1 and ways[0].is_shard(0) and t.shape[0] % mesh.size() == 0:
        return _all_blocks(local, [t.shape[0] // mesh.size()] * mesh.size(), mesh.get_group(), first)
    return t.full_tensor()


def _all_blocks(mine: Tensor, counts: list[int], group: Any, first: bool) -> Tensor | None:
    blocks = []
    for rank, count in enumerate(counts):
        own = rank == dist.get_rank(group)
        block = mine.contiguous() if own else mine.new_empty(count, *mine.shape[1:])
        with let_go(block):
            dist.broadcast(block, group=group, group_src=rank)
        if first:
            blocks.append(block.cpu())
    return torch.cat(blocks) if first else None


def _cut(given: Tensor, like: Any) -> Tensor:
    """A tensor that is whole here, distributed like a DTensor."""
    first, count = _offset(like), like.to_local().shape[0]
    return _part(given[first : first + count], like.shape[0], like.device_mesh, like.placements)


def _local_rows(given: Any, first: int, count: int, total: int) -> Tensor:
    """Rows ``first`` onwards of all, from whatever holds them; ``given`` itself where it holds others.

    Raises:
        ValueError: another rank saved it for itself.
    """
    if is_dtensor(given):
        local = given.to_local()
        at, rows = (local.first, local.rows) if isinstance(local, _Rows) else (_offset(given), local)
        if given.shape[0] == total and (at, rows.shape[0]) == (first, count):
            return rows
        if isinstance(local, _Rows) or not _is_of_this_rank(given.device_mesh):
            raise ValueError(
                f"experts {at} to {at + rows.shape[0] - 1} of {given.shape[0]}, as a rank has saved them for "
                f"itself, are to be loaded where experts {first} to {first + count - 1} of {total} are. "
                "torch.distributed.checkpoint brings each rank its own; commlib.nn.full_state_dict(model) is "
                "for one file"
            )
        given = given.full_tensor()
    if given.dim() and given.shape[0] == total:
        return given[first : first + count]
    return given


def _is_of_this_rank(mesh: Any) -> bool:
    """Whether a DTensor over this mesh is this process's, not from another's file."""
    return dist.is_initialized() and (mesh.mesh == dist.get_rank()).nonzero().tolist() == [
        mesh.get_coordinate()
    ]


class _Rows(Tensor):
    """Rows ``first`` onwards of a longer tensor: the local part of a DTensor, for checkpoints only.

    DTensor asks a local tensor that has the next three methods where it lies, as
    ``torch.distributed.checkpoint`` documents for tensor classes of your own.
    """

    rows: Tensor
    first: int
    shard: Shard | None  # None: it has been loaded from a file
    spread: bool  # over ranks that hold the same experts

    @staticmethod
    def __new__(cls, rows: Tensor, first: int, shard: Shard | None = None, spread: bool = False) -> _Rows:
        rows = rows.detach()
        return torch.Tensor._make_wrapper_subclass(
            cls, rows.shape, strides=rows.stride(), dtype=rows.dtype, device=rows.device
        )

    def __init__(self, rows: Tensor, first: int, shard: Shard | None = None, spread: bool = False) -> None:
        self.rows, self.first = rows.detach(), first
        self.shard, self.spread = shard, spread

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"rows {self.first} onwards: {self.rows}"

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuilt_rows, (self.rows, self.first)

    def __create_write_items__(self, fqn: str, whole: Tensor) -> list[Any]:
        from torch.distributed.checkpoint.metadata import MetadataIndex, TensorProperties
        from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

        properties = TensorProperties.create_from_tensor(self.rows)
        return [
            WriteItem(
                MetadataIndex(fqn, chunk.offsets),
                WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk, properties, whole.size()),
            )
            for chunk in self.__create_chunk_list__()
        ]

    def __create_chunk_list__(self) -> list[Any]:
        from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

        if self.rows.numel() == 0:  # its offset would be another rank's
            return []
        offsets = torch.Size([self.first, *[0] * (self.dim() - 1)])
        return [ChunkStorageMetadata(offsets=offsets, sizes=self.rows.shape)]

    def __get_tensor_shard__(self, index: Any) -> Tensor:
        return self.rows

    @classmethod
    def __torch_dispatch__(cls, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        if op not in _ROW_BY_ROW:
            raise NotImplementedError(
                f"{op} on one rank's experts of all: torch gathers and distributes only what DTensor places. "
                "That is neither blocks of different sizes, nor what FSDP2 spreads where the communicator "
                "was not given a DeviceMesh. Use commlib.nn.full_state_dict(model) to gather, "
                "load_state_dict(whole) to distribute; torch.distributed.checkpoint takes them as they are"
            )
        out = op(*tree_map(_rows_of, args), **tree_map(_rows_of, kwargs or {}))
        if op in _IN_PLACE:
            return args[0]
        like = next(t for t in tree_leaves((args, kwargs)) if isinstance(t, _Rows))
        return _Rows(out, like.first, like.shard, like.spread)


def _rebuilt_rows(rows: Tensor, first: int) -> _Rows:
    return _Rows(rows, first)


torch.serialization.add_safe_globals([_rebuilt_rows])

_aten = torch.ops.aten
_IN_PLACE = {_aten.copy_.default, _aten.zero_.default}
_ROW_BY_ROW = _IN_PLACE | {
    _aten.alias.default,
    _aten.clone.default,
    _aten.detach.default,
    _aten.empty_like.default,
    _aten.new_empty.default,
    _aten.view.default,  # DTensor views a local tensor in its own shape
    _aten.zeros_like.default,
    _aten._to_copy.default,
}


def _rows_of(value: Any) -> Any:
    return value.rows if isinstance(value, _Rows) else value


# -- what optimizers keep for parameters ---------------------------------------------------------------------

_known: WeakMap[Optimizer, int] = WeakMap()  # groups when last seen


def register_owner(param: Any, shard: Shard) -> None:
    """Let optimizers and wrappers know that a parameter holds only some of all experts."""
    param._commlib_shard = shard


def owner_of(param: Any) -> Shard | None:
    """The experts that a parameter belongs to; None: it is the same on every rank."""
    return getattr(param, "_commlib_shard", None)


def _parameters_of(optimizer: Optimizer) -> list[Tensor]:
    return [param for group in optimizer.param_groups for param in group["params"]]


def _on_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    """From its first step on, an optimizer saves experts' states the way experts themselves are saved.

    torch's own functions for state dicts first take a step, with an optimizer that has taken none.
    """
    if torch.compiler.is_compiling() or _known.get(optimizer, 0) == len(optimizer.param_groups):
        return
    first_time = optimizer not in _known
    _known[optimizer] = len(optimizer.param_groups)
    if first_time:
        optimizer.register_state_dict_post_hook(_export_states)
        optimizer.register_load_state_dict_pre_hook(_import_states)
    for param in _parameters_of(optimizer):  # convert state that was loaded before the first step
        if (shard := owner_of(param)) is not None:
            _check_kind(optimizer)
            state = optimizer.state[param]
            state.update({name: _from_state_dict(shard, value, param) for name, value in state.items()})


# These assume that all ranks have the same parameters, or take a part of a gradient for the whole.
_UNFIT = ("ZeroRedundancyOptimizer", "PostLocalSGDOptimizer", "LBFGS")


def _check_kind(optimizer: Optimizer) -> None:
    if (name := type(optimizer).__name__) in _UNFIT:
        raise ValueError(
            f"{name} has parameters of experts, which differ by rank, and would treat them as the same "
            "everywhere: give it commlib.nn.shared_parameters(model), and another optimizer the experts'"
        )


def _export_states(optimizer: Optimizer, state_dict: Any) -> None:
    for number, param in enumerate(_parameters_of(optimizer)):
        shard, state = owner_of(param), state_dict["state"].get(number)
        if shard is not None and state is not None:
            state_dict["state"][number] = {
                name: _to_state_dict(shard, name, value) for name, value in state.items()
            }


def _import_states(optimizer: Optimizer, state_dict: Any) -> Any:
    names = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
    states = dict(state_dict["state"])
    for name, param in zip(names, _parameters_of(optimizer), strict=False):
        shard = owner_of(param)
        if shard is not None and name in states:
            states[name] = {key: _from_state_dict(shard, value, param) for key, value in states[name].items()}
    return {**state_dict, "state": states}


def _by_expert(value: Any) -> bool:
    """Whether a state is a tensor of values, not a number such as the count of steps."""
    return isinstance(value, Tensor) and value.dim() > 0 and value.numel() != 1


def _to_state_dict(shard: Shard, name: str, value: Any) -> Any:
    if not _by_expert(value):
        return value
    if value.shape[0] not in (shard.count, shard.total):
        raise NotImplementedError(
            f"the optimizer's {name!r} for experts {shard} is {list(value.shape)}, not a row for each: "
            "a state dict cannot say which part of all experts' it is"
        )
    return shard.to_state_dict(value)


def _from_state_dict(shard: Shard, value: Any, param: Tensor) -> Any:
    return shard.from_state_dict(value, param) if _by_expert(value) else value


register_optimizer_step_pre_hook(_on_step)
