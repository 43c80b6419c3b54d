"""Tokens to the ranks of their experts and back, around the experts of a transformers model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard
from transformers.distributed.expert_parallel import EPImplementation

from commlib.expert_parallel import ExpertParallel

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.nn import Module

ExpertsForward = Callable[[Tensor, Tensor, Tensor], Tensor]


class Exchange:
    """Brings one layer's tokens to the experts.

    Its ExpertParallel is made at the first call, which shows how wide rows are and how many experts a token
    has. It takes batches of any size. Those of layers of one shape share a communicator.

    Args:
        group: a ProcessGroup, 1-D DeviceMesh or commlib.Group.
        num_experts: of all its ranks.
    """

    def __init__(self, group: Any, num_experts: int) -> None:
        self.group, self.num_experts = group, num_experts
        self._ep: ExpertParallel | None = None

    def __call__(
        self,
        experts_forward: ExpertsForward,
        hidden_states: Tensor,
        top_k_index: Tensor,
        top_k_weights: Tensor,
    ) -> Tensor:
        """Apply all ranks' experts to this rank's tokens.

        Args:
            experts_forward: of this rank's experts: ``rows [M, H], index [M, 1], weights [M, 1]`` to
                ``[M, H]``, weighted. A row is for one expert, the first expert's rows come first; so no
                implementation needs a mark for other ranks' experts, or computes for them.
            hidden_states: ``[T, H]``, floating.
            top_k_index: ``[T, K]`` int64 or int32, of all experts.
            top_k_weights: ``[T, K]``, floating.

        Returns:
            ``[T, H]``, dtype of ``hidden_states``.
        """
        ep = self._expert_parallel(hidden_states, top_k_index.shape[1])
        d = ep.dispatch(hidden_states, top_k_index, top_k_weights, layout="expert")
        rows = torch.arange(d.x.shape[0], device=d.x.device)
        index = torch.bucketize(rows, d.offsets[1:], right=True).unsqueeze(-1)
        # Back in this dtype, exactly: unsharded experts compute with it.
        weights = d.topk_weights.to(top_k_weights.dtype).unsqueeze(-1)
        if torch.compiler.is_compiling() or d.x.shape[0]:
            y = experts_forward(d.x, index, weights)
        else:
            y = _forward_of_nothing(experts_forward, d.x, index, weights)
        return ep.combine(y.to(d.x.dtype), d.handle)

    def __deepcopy__(self, memo: dict[int, Any]) -> Exchange:
        return Exchange(self.group, self.num_experts)  # a copy of a model has the same ranks

    def _expert_parallel(self, rows: Tensor, topk: int) -> ExpertParallel:
        ep = self._ep
        if ep is not None:
            known = ep.settings
            if (known.dtype, known.topk, known.device) == (rows.dtype, topk, rows.device):
                return ep
        self._ep = _make(self.group, self.num_experts, rows, topk)
        return self._ep


@torch.compiler.disable
def _make(group: Any, num_experts: int, rows: Tensor, topk: int) -> ExpertParallel:
    return ExpertParallel(
        group,
        num_experts=num_experts,
        hidden=rows.shape[1],
        topk=topk,
        max_tokens=None,
        dtype=rows.dtype,
        device=rows.device,
    )


def _forward_of_nothing(experts_forward: ExpertsForward, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """No rows, from experts that were given one: each parameter needs a gradient, or FSDP waits for it."""
    row = torch.cat([x, x.new_zeros(1, x.shape[1])])
    y = experts_forward(row, index.new_zeros(1, 1), weights.new_zeros(1, 1))
    return y[:0] + x


class CommlibEP(EPImplementation):
    """``DistributedConfig(ep_implementation="commlib")``: dispatch and combine around the experts.

    Ranks of a tensor-parallel group hold the same batch: each sends its part of the tokens, and they gather
    the results.
    """

    def __init__(self, experts: Module, ep_mesh: DeviceMesh, tp_mesh: DeviceMesh) -> None:
        super().__init__(experts, ep_mesh, tp_mesh)
        here: Any = self.num_local_experts
        self.exchange = Exchange(ep_mesh, here * ep_mesh.size())

    def __call__(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        tensors = hidden_states, top_k_index, top_k_weights
        if self.tp_mesh.size() == 1:
            return self.exchange(self.experts_forward, *tensors)
        part = self.exchange(self.experts_forward, *(_own_rows(t, self.tp_mesh) for t in tensors))
        shape = hidden_states.shape
        rows = DTensor.from_local(part, self.tp_mesh, [Shard(0)], shape=shape, stride=(shape[1], 1))
        return rows.full_tensor()


def _own_rows(t: Tensor, mesh: DeviceMesh) -> Tensor:
    """This rank's part of rows that all ranks of the mesh hold; its gradient is gathered."""
    return (
        DTensor.from_local(t, mesh, [Replicate()], run_check=False).redistribute(mesh, [Shard(0)]).to_local()
    )


@contextmanager
def parameters_replaced(module: Module, tensors: dict[str, Tensor]) -> Iterator[None]:
    """Let a module's forward read other tensors by its parameters' names."""
    own: dict[str, Any] = module._parameters
    before = {name: own[name] for name in tensors}
    own.update(tensors)
    try:
        yield
    finally:
        own.update(before)
