"""Mixture-of-experts layer whose experts are spread over ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from commlib.overlap import Steps, run_experts

from .grouped import grouped_mm
from .router import Routing, TopKRouter, count_tokens

if TYPE_CHECKING:
    from commlib import ExpertParallel


class MoEAux(NamedTuple):
    """What :class:`MoELayer` says beside its output, over this rank's own tokens."""

    loss: Tensor  # scalar: the router's, load balance by default
    tokens_per_expert: Tensor  # [num_experts] int64: how often each expert was chosen


class Experts(nn.Module):
    """Feed-forward networks ``(silu(x @ w1) * (x @ w3)) @ w2`` (SwiGLU), stacked.

    ``w1, w3`` are ``[count, hidden, ffn_hidden]``, ``w2`` is ``[count, ffn_hidden, hidden]``.

    Expert ``first + i`` is drawn from a generator of its own, seeded by one number taken from
    PyTorch's default CPU generator. So after the same ``torch.manual_seed`` on every rank, experts
    and everything drawn later are the same however many ranks share them.
    """

    def __init__(
        self,
        hidden: int,
        ffn_hidden: int,
        first: int,
        count: int,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.first = first

        def stack(rows: int, columns: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(count, rows, columns, dtype=dtype, device=device))

        self.w1 = stack(hidden, ffn_hidden)
        self.w3 = stack(hidden, ffn_hidden)
        self.w2 = stack(ffn_hidden, hidden)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the weights anew: uniform in ``+-1/sqrt(inputs)``, as :class:`torch.nn.Linear`."""
        seed = int(torch.randint(2**62, (), device="cpu"))
        generator = torch.Generator(device="cpu")
        for i in range(self.w1.shape[0]):
            generator.manual_seed(seed + self.first + i)
            for w in (self.w1, self.w3, self.w2):
                # Drawn on the CPU in float32, so that device and dtype do not change the values.
                drawn = torch.empty(w.shape[1:], dtype=torch.float32, device="cpu")
                bound = w.shape[1] ** -0.5
                w[i].copy_(drawn.uniform_(-bound, bound, generator=generator))

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        """Apply each expert to its rows.

        Args:
            x: ``[M, hidden]``, rows of expert i at ``offsets[i]:offsets[i + 1]``.
            offsets: ``[count + 1]`` integers, ``offsets[-1] == M``.

        Returns:
            ``[M, hidden]``; rows of zeros stay zero.
        """
        gate = F.silu(grouped_mm(x, self.w1, offsets))
        return grouped_mm(gate * grouped_mm(x, self.w3, offsets), self.w2, offsets)

    def extra_repr(self) -> str:
        count, hidden, ffn_hidden = self.w1.shape
        return f"first={self.first}, {count=}, {hidden=}, {ffn_hidden=}, dtype={self.w1.dtype}"


class MoELayer(nn.Module):
    """Mixture of experts: each token is the weighted sum of its K experts' outputs.

    Each rank holds its block of the experts (``ep.first_expert``, ``ep.num_local_experts``) and
    sends its tokens to the ranks of the experts they need. The experts' gradients come from all
    ranks' tokens, the router's from the rank's own: see :func:`expert_parameters`. Call it on all
    ranks, also with no tokens, and run backward on all or none.

    Args:
        hidden: size H of a token.
        ffn_hidden: size of the experts' inner layer.
        num_experts: E, over all ranks.
        topk: experts per token.
        ep: the communicator, which layers may share; ``None``: all experts here and no
            communication, plain PyTorch, the layer to compare with.
        router: module or callable ``x [T, H] -> Routing``; ``None``: :class:`TopKRouter`.
        align: each expert's rows are padded to a multiple of this. ``None``: 16 bytes' worth of
            elements, which CUDA's grouped matmul needs for the weights' gradient.
        overlap_chunks: tokens go through dispatch, experts and combine in so many chunks, which overlap
            (:func:`commlib.overlap.run_experts`); the same on all ranks. 1: no overlap, and the layer can be
            compiled.
        shared: module ``[T, hidden] -> [T, hidden]`` that every token goes through, added to the output;
            it runs while the dispatch is under way. Its parameters are the same on every rank.
        dtype: of experts and tokens, that of ``ep``; ``None``: torch's default. The default
            router's parameters are float32 (float64 with float64).
        device: of the parameters.

    Raises:
        ValueError: sizes that do not fit ``ep`` or each other.
    """

    def __init__(
        self,
        hidden: int,
        ffn_hidden: int,
        num_experts: int,
        topk: int,
        ep: ExpertParallel | None,
        router: Callable[[Tensor], Routing] | None = None,
        *,
        align: int | None = None,
        overlap_chunks: int = 1,
        shared: nn.Module | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if overlap_chunks < 1:
            raise ValueError(f"overlap_chunks must be at least 1, got {overlap_chunks}")
        dtype = dtype or torch.get_default_dtype()
        first, count = 0, num_experts
        if ep is not None:
            mine = {"hidden": hidden, "num_experts": num_experts, "topk": topk, "dtype": dtype}
            for name, value in mine.items():
                if (theirs := getattr(ep.settings, name)) != value:
                    raise ValueError(f"the layer has {name}={value}, its communicator {theirs}")
            first, count = ep.first_expert, ep.num_local_experts
        self.hidden = hidden
        self.num_experts = num_experts
        self.topk = topk
        self.ep = ep
        if router is None:
            wide = torch.promote_types(dtype, torch.float32)
            router = TopKRouter(hidden, num_experts, topk, dtype=wide, device=device)
        self.router = router
        self.experts = Experts(hidden, ffn_hidden, first, count, dtype=dtype, device=device)
        if align is None:
            align = max(16 // self.experts.w1.element_size(), 1)
        self.align = align
        self.overlap_chunks = overlap_chunks
        self.shared = shared

    def forward(self, x: Tensor) -> tuple[Tensor, MoEAux]:
        """Route, send, compute, return.

        Args:
            x: ``[..., hidden]``, dtype of the experts; from 0 to ``ep.max_tokens`` tokens.

        Returns:
            The output, ``[..., hidden]`` in the dtype of ``x``, and :class:`MoEAux`.

        Raises:
            ValueError: a last dimension that is not ``hidden``.
        """
        rows, topk_idx, topk_weights, aux = self._route(x)
        shared = None
        if self.ep is None:
            out = _apply_here(self.experts, rows, topk_idx, topk_weights, self.num_experts)
        elif self.overlap_chunks == 1 and self.shared is None:
            out = self._apply_spread(self.ep, rows, topk_idx, topk_weights)
        else:
            out, shared = run_experts(
                *(self.ep, self.experts, rows, topk_idx, topk_weights),
                chunks=self.overlap_chunks,
                align=self.align,
                beside=None if self.shared is None else partial(self.shared, rows),
            )
        return self._joined(out, shared, rows).reshape(x.shape), aux

    def steps(self, x: Tensor) -> Steps[tuple[Tensor, MoEAux]]:
        """The same as calling the layer, giving way (``yield``) while its dispatch and its combine are under
        way: for :class:`commlib.overlap.TwoBatch`.
        """
        rows, topk_idx, topk_weights, aux = self._route(x)
        if self.ep is None:
            out = _apply_here(self.experts, rows, topk_idx, topk_weights, self.num_experts)
            return self._joined(out, None, rows).reshape(x.shape), aux
        d = self.ep.dispatch(rows, topk_idx, topk_weights, layout="expert", align=self.align, async_op=True)
        yield
        d = d.finish()
        y = self.experts(d.x, d.offsets)
        sums, event = self.ep.combine(y, d.handle, weights=d.topk_weights, async_op=True)
        yield
        (out,) = event.finish(sums)
        return self._joined(out, None, rows).reshape(x.shape), aux

    def _route(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, MoEAux]:
        if x.shape[-1] != self.hidden:
            raise ValueError(f"x must be [..., {self.hidden}], got {tuple(x.shape)}")
        rows = x.reshape(-1, self.hidden)
        topk_idx, topk_weights, loss = self.router(rows)
        return rows, topk_idx, topk_weights, MoEAux(loss, count_tokens(topk_idx, self.num_experts))

    def _apply_spread(self, ep: ExpertParallel, x: Tensor, topk_idx: Tensor, topk_weights: Tensor) -> Tensor:
        d = ep.dispatch(x, topk_idx, topk_weights, layout="expert", align=self.align)
        return ep.combine(self.experts(d.x, d.offsets), d.handle, weights=d.topk_weights)

    def _joined(self, out: Tensor, shared: Tensor | None, rows: Tensor) -> Tensor:
        if self.shared is None:
            return out
        return out + (self.shared(rows) if shared is None else shared)


def _apply_here(
    experts: Experts, x: Tensor, topk_idx: Tensor, topk_weights: Tensor, num_experts: int
) -> Tensor:
    """The same as dispatch, experts, combine with all experts on one rank, in plain PyTorch."""
    tokens, topk = topk_idx.shape
    # Empty places go through expert 0 with weight 0, so that the number of rows is known.
    empty = topk_idx < 0
    expert = topk_idx.masked_fill(empty, 0).flatten().long()
    weights = topk_weights.masked_fill(empty, 0)
    order = expert.argsort(stable=True)
    offsets = F.pad(count_tokens(expert, num_experts).cumsum(0), (1, 0))
    y = experts(x[order // topk], offsets)
    y = y[order.argsort()].view(tokens, topk, x.shape[1])
    # Sum in float32 at least and round once, as combine does.
    wide = torch.promote_types(y.dtype, torch.float32)
    return (y.to(wide) * weights.to(wide).unsqueeze(-1)).sum(1).to(x.dtype)


def expert_parameters(module: nn.Module) -> Iterator[nn.Parameter]:
    """Parameters of all :class:`Experts` in ``module``: different on every rank.

    Their gradients already hold the tokens of all ranks: never all-reduce them. Where the loss to
    minimise is the mean of the R ranks' losses, divide them by R.
    """
    for part in module.modules():
        if isinstance(part, Experts):
            yield from part.parameters()


def shared_parameters(module: nn.Module) -> Iterator[nn.Parameter]:
    """All other parameters of ``module``: the same on every rank, average their gradients."""
    sharded = {id(p) for p in expert_parameters(module)}
    return (p for p in module.parameters() if id(p) not in sharded)
