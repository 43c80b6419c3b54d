"""Mixture-of-experts layer whose experts are spread over ranks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from commlib.arguments import as_bool, as_int, shown
from commlib.dispatched import Dispatched
from commlib.expert_parallel import ExpertParallel
from commlib.overlap import Steps, run_dispatched

from .experts import Experts
from .grouped import autocast_dtype
from .losses import count_tokens
from .products import Products
from .router import RouterOutput, TopKRouter

WeightsAt = Literal["output", "hidden"]


class MoEAux(NamedTuple):
    """What :class:`MoELayer` returns besides its output, over this rank's own tokens.

    Attributes:
        loss: a scalar: the router's, load balance by default.
        tokens_per_expert: ``[num_experts]`` int64: how often each expert was chosen.
    """

    loss: Tensor
    tokens_per_expert: Tensor


class MoELayer(nn.Module):
    """Mixture of experts: each token is the weighted sum of its K experts' outputs.

    Each rank holds its block of the experts (``ep.first_expert``, ``ep.num_local_experts``) and
    sends its tokens to the ranks of the experts they need. The experts' gradients come from all
    ranks' tokens, the router's from the rank's own: docs/training.md says how DDP, FSDP2, clipping,
    checkpoints and :func:`commlib.nn.sync_gradients` deal with that. Call it on all ranks, even with
    no tokens, and run backward on all or none.

    Under ``torch.autocast`` it computes as torch's own layers do: experts' weights and rows are cast, the
    router stays in float32. Rows travel in the dtype of ``ep``, which has to hold the dtype computed with:
    make it bfloat16 for a float32 layer that is only run under autocast to bfloat16.

    Args:
        hidden: size H of a token.
        ffn_hidden: size of the experts' inner layer.
        num_experts: E, over all ranks.
        topk: experts per token.
        ep: the communicator, which layers may share; ``None``: all experts here and no
            communication, plain PyTorch, the layer to compare with.
        router: module or callable ``x [T, H] -> RouterOutput``; ``None``: :class:`TopKRouter`.
        align: each expert's rows are padded to a multiple of this. ``None``: 16 bytes' worth of
            elements, which CUDA's grouped matmul needs for the weights' gradient.
        overlap_chunks: tokens go through dispatch, experts and combine in this many chunks, which overlap
            (:func:`commlib.overlap.run_experts`); the same on all ranks. 1: no overlap, and the layer can be
            compiled.
        experts: makes this rank's experts: :class:`Experts`, a subclass, or a function of the same arguments
            that returns an instance (``functools.partial`` of a subclass with more arguments).
        shared: module ``[T, hidden] -> [T, hidden]`` that every token goes through, added to the output;
            it runs while the dispatch is under way. Its parameters are the same on every rank.
        weights_at: where a row is multiplied by its weight. "output": as a token's rows are summed. "hidden":
            before the experts' last product: rows are narrower there, and the product's are not kept for
            backward, but results are rounded elsewhere. It needs experts that take ``products``.
        bounded: rows come in results of one size (``dispatch(bounded=True)``, docs/bounded.md):
            compiled code has static shapes, and no host waits to hear how many come. Experts see rows behind
            ``offsets[-1]``, which are undefined without gradients; what they make of them is not read.
        dtype: of the experts; ``None``: torch's default. The default router's parameters are float32
            (float64 with float64).
        device: of the parameters.

    Raises:
        ValueError: sizes that do not fit ``ep`` or each other, or ``experts`` makes others than asked for.
        TypeError: ``experts`` does not make :class:`Experts`, or another argument is of a wrong type.
    """

    def __init__(
        self,
        hidden: int,
        ffn_hidden: int,
        num_experts: int,
        topk: int,
        ep: ExpertParallel | None,
        router: Callable[[Tensor], RouterOutput] | None = None,
        *,
        align: int | None = None,
        overlap_chunks: int = 1,
        experts: Callable[..., Experts] = Experts,
        shared: nn.Module | None = None,
        weights_at: WeightsAt = "output",
        bounded: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        hidden, ffn_hidden = as_int("hidden", hidden, 1), as_int("ffn_hidden", ffn_hidden, 1)
        num_experts, topk = as_int("num_experts", num_experts, 1), as_int("topk", topk, 1)
        overlap_chunks = as_int("overlap_chunks", overlap_chunks, 1)
        dtype = torch.get_default_dtype() if dtype is None else dtype
        _check_types(ep, router, shared, experts, dtype)
        first, count = 0, num_experts
        if ep is not None:
            mine = {"hidden": hidden, "num_experts": num_experts, "topk": topk}
            for name, value in mine.items():
                if (theirs := getattr(ep.settings, name)) != value:
                    raise ValueError(f"the layer has {name}={value}, its communicator {theirs}")
            first, count = ep.first_expert, ep.num_local_experts
        self.hidden = hidden
        self.num_experts = num_experts
        self.topk = topk
        self.ep = ep
        if isinstance(router, TopKRouter):
            _check_router(router, num_experts, topk)
        if router is None:
            wide = torch.promote_types(dtype, torch.float32)
            router = TopKRouter(hidden, num_experts, topk, dtype=wide, device=device)
        self.router = router
        self.experts = experts(hidden, ffn_hidden, first, count, ep=ep, dtype=dtype, device=device)
        _check_experts(self.experts, first, count, ep)
        _check_weights_at(weights_at, self.experts)
        self.align = max(16 // dtype.itemsize, 1) if align is None else as_int("align", align, 1)
        self.overlap_chunks = overlap_chunks
        self.shared = shared
        self.weights_at: WeightsAt = weights_at
        self.bounded = as_bool("bounded", bounded)

    def forward(self, x: Tensor) -> tuple[Tensor, MoEAux]:
        """Route, send, compute, return.

        Args:
            x: ``[..., hidden]``, dtype of the experts, or any under autocast; from 0 to ``ep.max_tokens``
                tokens.

        Returns:
            The output, ``[..., hidden]`` in the dtype of ``x``, or autocast's, and :class:`MoEAux`.

        Raises:
            ValueError: a last dimension that is not ``hidden``; experts that are trained while FSDP2 has been
                told to ignore them.
            TypeError: no tensor, a dtype that is not the experts', or that the communicator's cannot hold.
        """
        rows, topk_idx, topk_weights, aux = self._route(x)
        shared = None
        if self.ep is None:
            out = self._apply_here(rows, topk_idx, topk_weights)
        elif self.overlap_chunks == 1 and self.shared is None:
            out = self._apply_spread(self.ep, rows, topk_idx, topk_weights)
        else:
            out, shared = run_dispatched(
                *(self.ep, partial(self._apply_experts, rows.dtype), self._to_send(self.ep, rows)),
                *(topk_idx, topk_weights),
                chunks=self.overlap_chunks,
                align=self.align,
                bounded=self.bounded,
                beside=None if self.shared is None else partial(_run_shared, self.shared, rows),
            )
        return self._joined(out, shared, rows).reshape(x.shape), aux

    def steps(self, x: Tensor) -> Steps[tuple[Tensor, MoEAux]]:
        """Like calling the layer, but gives way (``yield``) while its dispatch and its combine are under
        way: for :class:`commlib.overlap.TwoBatch`.
        """
        rows, topk_idx, topk_weights, aux = self._route(x)
        if self.ep is None:
            out = self._apply_here(rows, topk_idx, topk_weights)
            return self._joined(out, None, rows).reshape(x.shape), aux
        sent = self._to_send(self.ep, rows)
        how: dict[str, Any] = {"layout": "expert", "align": self.align, "bounded": self.bounded}
        d = self.ep.dispatch(sent, topk_idx, topk_weights, async_op=True, **how)
        yield
        d = d.finish()
        y, weights = self._apply_experts(rows.dtype, d)
        sums, event = self.ep.combine(y, d.handle, weights=weights, async_op=True)
        yield
        (out,) = event.finish(sums)
        return self._joined(out, None, rows).reshape(x.shape), aux

    def _route(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, MoEAux]:
        """Rows in the dtype computed with, their routing, and what is returned besides."""
        if not isinstance(x, Tensor):
            raise TypeError(f"x must be a torch.Tensor, got {type(x).__name__}: convert it")
        if x.dim() == 0 or x.shape[-1] != self.hidden:
            raise ValueError(f"x must be [..., {self.hidden}], got {list(x.shape)}")
        if torch.is_grad_enabled():
            self._check_experts_are_not_ignored()
        rows = x.reshape(-1, self.hidden)
        topk_idx, topk_weights, loss = _checked_output(self.router(rows))
        aux = MoEAux(loss, count_tokens(topk_idx, self.num_experts))
        return rows.to(autocast_dtype(rows)), topk_idx, topk_weights, aux

    def _check_experts_are_not_ignored(self) -> None:
        shard = self.experts.shard
        managed = getattr(self, "_is_fsdp_managed_module", False)  # FSDP1's experts have a divisor
        if shard is None or shard.gradient_divisor != 1 or not managed:
            return
        if any(p.requires_grad for p in self.experts.parameters()):
            raise ValueError(
                f"fully_shard has experts {shard} among its ignored_params: then their gradients are sums "
                f"over the losses of {shard.ranks.size} ranks, where all others are means, and ranks that "
                "hold the same experts do not average them. Leave ignored_params out, and call "
                "commlib.nn.fully_shard_experts(model, mesh) before fully_shard"
            )

    def _to_send(self, ep: ExpertParallel, rows: Tensor) -> Tensor:
        travels = ep.settings.dtype
        if torch.promote_types(rows.dtype, travels) != travels:
            raise TypeError(
                f"the layer computes on rows of {rows.dtype}, which its communicator's, {travels}, cannot "
                "hold: convert x, give layer and communicator the same dtype, or run under torch.autocast "
                "with the communicator's"
            )
        return rows.to(travels)

    def _apply_experts(self, dtype: torch.dtype, d: Dispatched[Tensor]) -> tuple[Tensor, Tensor | None]:
        """Compute in ``dtype`` on rows that come and go in the communicator's.

        Returns:
            ``[M, hidden]``, and the weights of these rows that are still to be applied.
        """
        if self.weights_at == "hidden":
            products, weights = Products(d, d.topk_weights), None
        else:
            products, weights = Products(d), d.topk_weights
        return self._computed(d.x.to(dtype), d.offsets, products).to(d.x.dtype), weights

    def _computed(self, x: Tensor, offsets: Tensor, products: Products) -> Tensor:
        y = self.experts(x, offsets, *((products,) if self.experts.takes_products else ()))
        if self.weights_at == "hidden" and products.lasts != 1:
            raise ValueError(
                f'with weights_at="hidden" the weights are applied in products.last, which '
                f"{type(self.experts).__name__} called {products.lasts} times: return what one call gives"
            )
        return y

    def _apply_spread(self, ep: ExpertParallel, rows: Tensor, topk_idx: Tensor, weights: Tensor) -> Tensor:
        sent = self._to_send(ep, rows)
        d = ep.dispatch(sent, topk_idx, weights, layout="expert", align=self.align, bounded=self.bounded)
        y, left = self._apply_experts(rows.dtype, d)
        return ep.combine(y, d.handle, weights=left)

    def _apply_here(self, x: Tensor, topk_idx: Tensor, topk_weights: Tensor) -> Tensor:
        """Dispatch, experts and combine with all experts on one rank, in plain PyTorch."""
        tokens, topk = topk_idx.shape
        # Empty places go through expert 0 with weight 0, so that the number of rows is known.
        empty = topk_idx < 0
        expert = topk_idx.masked_fill(empty, 0).flatten().long()
        weights = topk_weights.masked_fill(empty, 0)
        order = expert.argsort(stable=True)
        offsets = F.pad(count_tokens(expert, self.num_experts).cumsum(0), (1, 0))
        wide = torch.promote_types(x.dtype, torch.float32)
        at_hidden = weights.to(wide).flatten()[order] if self.weights_at == "hidden" else None
        y = self._computed(x[order // topk], offsets, Products(weights=at_hidden))
        # Sum in float32 at least and round once, as combine does.
        wide = torch.promote_types(y.dtype, torch.float32)
        y = y[order.argsort()].view(tokens, topk, x.shape[1]).to(wide)
        if at_hidden is None:
            y = y * weights.to(wide).unsqueeze(-1)
        return y.sum(1).to(x.dtype)

    def _joined(self, out: Tensor, shared: Tensor | None, rows: Tensor) -> Tensor:
        out = out.to(rows.dtype)
        if self.shared is None:
            return out
        return out + (_run_shared(self.shared, rows) if shared is None else shared)


def _run_shared(shared: nn.Module, rows: Tensor) -> Tensor:
    out = shared(rows)
    if not isinstance(out, Tensor):
        raise TypeError(f"shared must return a torch.Tensor, got {shown(out)}")
    if out.shape != rows.shape:
        raise ValueError(f"shared must return {list(rows.shape)}, as its input is, got {list(out.shape)}")
    return out


def _checked_output(routed: Any) -> RouterOutput:
    """What a router returned; anything may be one."""
    if not isinstance(routed, tuple | list) or len(routed) != 3:
        raise TypeError(
            "router must return (topk_idx, topk_weights, loss), a commlib.nn.RouterOutput, got "
            f"{shown(routed)}"
        )
    return RouterOutput(*routed)


def _check_router(router: TopKRouter, num_experts: int, topk: int) -> None:
    if (router.num_experts, router.topk) != (num_experts, topk):
        raise ValueError(
            f"the layer has num_experts={num_experts} and topk={topk}, its router {router.num_experts} and "
            f"{router.topk}"
        )


def _check_types(ep: Any, router: Any, shared: Any, experts: Any, dtype: Any) -> None:
    """That arguments are what they are used as, which otherwise shows later, or elsewhere."""
    if not isinstance(ep, ExpertParallel | None):
        raise TypeError(f"ep must be a commlib.ExpertParallel or None, got {type(ep).__name__}")
    for name, given in (("router", router), ("shared", shared)):
        if given is not None and (not callable(given) or isinstance(given, type)):
            raise TypeError(f"{name} must be a module or None, got {shown(given)}")
    if isinstance(experts, nn.Module):
        kind = type(experts).__name__
        raise TypeError(f"experts must make a rank's experts, got ready ones: give the class, {kind}")
    if not callable(experts):
        raise TypeError(f"experts must be a class or function that makes them, got {shown(experts)}")
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"dtype must be a floating torch.dtype, got {shown(dtype)}")


def _check_weights_at(weights_at: Any, experts: Experts) -> None:
    if weights_at not in get_args(WeightsAt):
        raise ValueError(f'weights_at must be "output" or "hidden", got {shown(weights_at)}')
    if weights_at == "hidden" and not experts.takes_products:
        raise TypeError(
            f'weights_at="hidden" needs experts that leave the last product to the layer: give compute, and '
            f"forward if it has its own, of {type(experts).__name__} a parameter products, and return "
            "products.last(...)"
        )


def _check_experts(made: Any, first: int, count: int, ep: ExpertParallel | None) -> None:
    """Raise unless they are the experts that were asked for."""
    if not isinstance(made, Experts):
        raise TypeError(
            f"experts must make a commlib.nn.Experts, which wrappers, clipping and checkpoints know, made a "
            f"{type(made).__name__}: make that a subclass, with shapes() and compute()"
        )
    spread = ep is not None and ep.size > 1
    if (made.first, made.count, made.shard is not None) != (first, count, spread):
        known = "" if made.shard is not None or not spread else ", and does not know of the others (ep)"
        raise ValueError(
            f"this rank has {count} experts from number {first} on, {type(made).__name__} was made with "
            f"{made.count} from {made.first} on{known}: hand all arguments on to Experts"
        )
