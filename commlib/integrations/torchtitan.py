"""torchtitan's mixture-of-experts layers over commlib, by one flag of its command line::

    --override.imports commlib.integrations.torchtitan.token_dispatcher

The flag replaces the token dispatcher of every layer. Importing this module also tells torchtitan's selective
activation checkpointing to save what commlib's operations return, so that backward does not send rows again.
"""

from __future__ import annotations

import functools
import itertools
import weakref
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from commlib import _core
from commlib.dispatched import Handle
from commlib.expert_parallel import ExpertParallel
from commlib.integrations.versions import require
from commlib.weak import WeakMap

require("torchtitan", "0.3.0", "0.4")

from torchtitan.config.override import derive, override  # noqa: E402
from torchtitan.distributed.activation_checkpoint import SelectiveAC  # noqa: E402
from torchtitan.models.common.token_dispatcher import (  # noqa: E402
    BaseEPTokenDispatcher,
    LocalDispatchMetadata,
    LocalTokenDispatcher,
)

# A process group's number, num_experts, topk, hidden, max_tokens, dtype, device: constants to a compiler.
_Key = tuple[int, int, int, int, int | None, torch.dtype, str]

_communicators: dict[_Key, ExpertParallel] = {}
# Of process groups that dispatchers have been wired to. Once these are gone their names may be used again.
_numbers: WeakMap[dist.ProcessGroup, int] = WeakMap()
_groups: dict[int, weakref.ref[dist.ProcessGroup]] = {}
_next_number = itertools.count()


@torch.compiler.assume_constant_result
def _connect(key: _Key) -> None:
    """Make the communicator of this key, if there is none: layers that are alike share it.

    Its ranks make it together, in the first dispatch of this key, since only rows show hidden and dtype.
    Under torch.compile that is while the first such layer is traced. It goes with the process group.
    """
    if key in _communicators:
        return
    number, num_experts, topk, hidden, max_tokens, dtype, device = key
    group = _groups[number]()
    assert group is not None  # its mesh keeps it
    _communicators[key] = ExpertParallel(
        group,
        num_experts=num_experts,
        topk=topk,
        hidden=hidden,
        max_tokens=max_tokens,
        dtype=dtype,
        device=device,
    )
    _core.when_gone(group, functools.partial(_forget, key))


def _forget(key: _Key) -> None:
    _communicators.pop(key, None)


@dataclass(frozen=True, kw_only=True)
class CommlibDispatchMetadata:
    """What combine needs from dispatch.

    Attributes:
        ep: the communicator.
        handle: the routing.
        scores_R: ``[R]`` float32, the score of each row, sent along with it.
    """

    ep: ExpertParallel
    handle: Handle
    scores_R: Tensor


class CommlibTokenDispatcher(BaseEPTokenDispatcher):
    """torchtitan's token dispatcher over commlib: each token goes once to each rank that needs it.

    Rows, their order and their counts are those of torchtitan's ``AllToAllTokenDispatcher``, bit for bit.
    Scores are applied in combine and summed in float32, with one rounding for each rank and one over ranks;
    torchtitan's dispatcher rounds each expert's row. Results are deterministic. Letters in names are
    torchtitan's: T tokens, D their width, K experts for each, E experts of all ranks, e of this one, R rows.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(BaseEPTokenDispatcher.Config):
        """Configuration.

        Attributes:
            num_max_tokens_per_rank: the most tokens that a rank sends in one dispatch. None: not known; the
                communicator grows with them.
        """

        num_max_tokens_per_rank: int | None = None

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        bound = config.num_max_tokens_per_rank
        if bound is not None and bound < 1:
            raise ValueError(f"num_max_tokens_per_rank must be positive, got {bound}")
        self.num_max_tokens_per_rank = bound
        self._group = -1

    def wire_meshes(self, *, ep_mesh: DeviceMesh | None) -> None:
        """Take the mesh over whose ranks experts are spread; None: this rank has all.

        Raises:
            ValueError: the experts cannot be spread evenly, which torchtitan requires.
        """
        if ep_mesh is None:
            self.ep_mesh = None
            return
        if self.num_experts % ep_mesh.size():
            raise ValueError(
                f"num_experts is {self.num_experts}, no multiple of the {ep_mesh.size()} ranks of the expert "
                "mesh, and torchtitan gives each as many: choose another expert_parallel_degree"
            )
        super().wire_meshes(ep_mesh=ep_mesh)

    def init_buffer(self) -> None:
        """Note the process group. The communicator follows in the first dispatch."""
        assert self.ep_mesh is not None
        group = self.ep_mesh.get_group()
        if group not in _numbers:
            _numbers[group] = next(_next_number)
            _groups[_numbers[group]] = weakref.ref(group)
        self._group = _numbers[group]

    def dispatch(
        self,
        x_TD: Tensor,
        topk_scores_TK: Tensor,
        topk_expert_ids_TK: Tensor,
        num_local_tokens_per_expert_E: Tensor,
    ) -> tuple[Tensor, Tensor, CommlibDispatchMetadata | LocalDispatchMetadata]:
        """Send each token to the ranks of its experts.

        Args:
            x_TD: ``[T, D]`` tokens of this rank; T may differ by rank.
            topk_scores_TK: ``[T, K]`` scores, taken as float32.
            topk_expert_ids_TK: ``[T, K]`` int64 global expert ids.
            num_local_tokens_per_expert_E: not needed: the ids imply it.

        Returns:
            ``[R, D]`` rows grouped by local expert, in each group by source rank, then token; ``[e]`` int64,
            how many each expert got; what :meth:`combine` takes.

        Raises:
            ValueError: more tokens than ``num_max_tokens_per_rank``; and what
                :meth:`commlib.ExpertParallel.dispatch` raises.
        """
        if self.ep_mesh is None:
            return LocalTokenDispatcher.dispatch(
                self, x_TD, topk_scores_TK, topk_expert_ids_TK, num_local_tokens_per_expert_E
            )
        bound = self.num_max_tokens_per_rank
        if bound is not None and x_TD.shape[0] > bound:
            raise ValueError(
                f"{x_TD.shape[0]} tokens in one dispatch, but num_max_tokens_per_rank is {bound}: give the "
                "override a larger one, as in docs/torchtitan.md"
            )
        sizes = (self.num_experts, self.top_k, x_TD.shape[1], bound)
        key = (self._group, *sizes, x_TD.dtype, str(x_TD.device))
        _connect(key)
        ep = _communicators[key]
        d = ep.dispatch(x_TD, topk_expert_ids_TK, topk_scores_TK, layout="expert")
        metadata = CommlibDispatchMetadata(ep=ep, handle=d.handle, scores_R=d.topk_weights)
        return d.x, d.tokens_per_expert, metadata

    def combine(
        self,
        routed_output_RD: Tensor,
        metadata: CommlibDispatchMetadata | LocalDispatchMetadata,
        x_TD: Tensor,
    ) -> Tensor:
        """Sum, for each token, its experts' results, weighted by the scores.

        Args:
            routed_output_RD: ``[R, D]``, in the order of the rows that :meth:`dispatch` returned.
            metadata: its third result.
            x_TD: the tokens that were dispatched.

        Returns:
            ``[T, D]``
        """
        if isinstance(metadata, LocalDispatchMetadata):
            return LocalTokenDispatcher.combine(self, routed_output_RD, metadata, x_TD)
        return metadata.ep.combine(routed_output_RD, metadata.handle, weights=metadata.scores_R)


@override(
    target=BaseEPTokenDispatcher.Config,
    description="Expert-parallel dispatch and combine by commlib",
)
def token_dispatcher(
    cfg: BaseEPTokenDispatcher.Config, *, num_max_tokens_per_rank: int | None = None
) -> CommlibTokenDispatcher.Config:
    """torchtitan's override: commlib instead of the dispatcher that a layer is configured with.

    Args:
        cfg: the layer's own configuration.
        num_max_tokens_per_rank: the most tokens that a rank sends in one dispatch. None: ``cfg``'s, if it has
            one.

    Raises:
        ValueError: the layer's experts are quantised, or its dispatch is to be captured in a CUDA graph.
    """
    if getattr(cfg, "pad_multiple", None) is not None:
        raise ValueError(
            f"experts are quantised ({type(cfg).__qualname__} with pad_multiple={cfg.pad_multiple}), and "
            "commlib's token dispatcher pads no groups: leave out their converter, or this override"
        )
    if getattr(cfg, "cudagraphable", False):
        raise ValueError(
            "cudagraphable=True, but commlib's dispatch reads counts on the host and cannot be captured in a "
            "CUDA graph: use the override in training, or without CUDA graphs"
        )
    given = {} if num_max_tokens_per_rank is None else {"num_max_tokens_per_rank": num_max_tokens_per_rank}
    return derive(cfg, CommlibTokenDispatcher.Config, **given)


def _save_in_checkpointing(listed: Callable[[SelectiveAC], set]) -> Callable[[SelectiveAC], set]:
    """torchtitan lists the operations to save; add ours, so that users need only the flag."""
    ops = torch.ops.commlib
    ours = {op.default for op in (ops.dispatch, ops.traced_dispatch, ops.redispatch, ops.combine)}

    @functools.wraps(listed)
    def get_save_ops(self: SelectiveAC) -> set:
        return listed(self) | ours

    return get_save_ops


SelectiveAC.get_save_ops = _save_in_checkpointing(SelectiveAC.get_save_ops)
