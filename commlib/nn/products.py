"""The experts' first and last matrix products, where their rows come from dispatch and go to combine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd import Function

from commlib.dispatched import spare_buffer

from . import grouped

if TYPE_CHECKING:
    from commlib.dispatched import Dispatched


class Products:
    """What :meth:`Experts.compute` may ask for as ``products``, to multiply with at both ends.

    :meth:`first` and :meth:`last` give what :func:`grouped_mm` gives. But the layer knows where the results
    go: on a CPU, where rows lie in the symmetric heap grouped by expert, the last product is written there,
    and so is the gradient of the first ones, and combine and its counterpart in backward copy nothing
    (:meth:`commlib.ExpertParallel.combine_buffer`). With ``weights_at="hidden"`` it applies the weights.

    Attributes:
        lasts: how many times :meth:`last` has been called.

    Args:
        dispatched: what the experts compute on; None: rows that no dispatch has brought.
        weights: ``[M]``: the rows of the last product's ``x`` are multiplied by them.
    """

    def __init__(self, dispatched: Dispatched[Tensor] | None = None, weights: Tensor | None = None) -> None:
        self._handle = None if dispatched is None else dispatched.handle
        self._weights = weights
        self.lasts = 0

    def first(
        self, x: Tensor, offsets: Tensor, *ws: Tensor, biases: tuple[Tensor, ...] = ()
    ) -> tuple[Tensor, ...]:
        """Multiply the rows that have come by each of some weights.

        Args:
            x, offsets: as :meth:`Experts.compute` is given them.
            ws: ``[G, H, F]`` each.
            biases: ``[G, F]``, none or one for each of ``ws``.

        Returns:
            ``[M, F]`` for each of ``ws``.

        Raises:
            ValueError, TypeError: as :func:`grouped_mm`; no weights, or another number of biases.
        """
        if not ws or len(biases) not in (0, len(ws)):
            raise ValueError(f"first takes weights, and as many biases or none, got {len(ws)}, {len(biases)}")
        given = biases or (None,) * len(ws)
        if self._handle is None or not grouped.writes_in_place(x, *ws):
            pairs = zip(ws, given, strict=True)
            return tuple(grouped.grouped_mm(x, w, offsets, bias) for w, bias in pairs)
        cast = [grouped.checked_operands(x, w, offsets, b) for w, b in zip(ws, given, strict=True)]
        products = _First.apply(self._place, offsets, cast[0][0], *(w for _, w in cast))
        return tuple(grouped.with_bias(p, b, offsets) for p, b in zip(products, given, strict=True))

    def last(self, x: Tensor, offsets: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
        """Multiply the rows of the inner layer; the result is what :meth:`Experts.compute` returns.

        With ``weights_at="hidden"`` it is weighted: then it may be multiplied by something, but what is added
        to it is not weighted.

        Args:
            x: ``[M, F]``.
            offsets: as :meth:`Experts.compute` is given them.
            w: ``[G, F, H]``.
            bias: ``[G, H]``.

        Returns:
            ``[M, H]``.

        Raises:
            ValueError, TypeError: as :func:`grouped_mm`.
        """
        self.lasts += 1
        weights = self._weights
        if weights is not None:
            x = (x * weights.unsqueeze(1)).to(x.dtype)
        cast, w = grouped.checked_operands(x, w, offsets, bias)
        out = self._place((x.shape[0], w.shape[2]), cast) if grouped.writes_in_place(cast, w) else None
        if bias is None or weights is None:
            return grouped.grouped_mm(cast, w, offsets, bias, out=out)
        rows = grouped.rows_of_groups(bias, offsets, cast)
        return grouped.grouped_mm(cast, w, offsets, out=out).add_(rows * weights.unsqueeze(1))

    def _place(self, shape: Sequence[int], like: Tensor) -> Tensor | None:
        """Memory of the heap for rows of this shape and the dtype of ``like``, if there is some to spare."""
        if self._handle is None:
            return None
        return spare_buffer(self._handle, shape, like.dtype)


class _First(Function):
    """Products of the same rows with several weights, whose gradients are summed where combine reads them."""

    @staticmethod
    def forward(
        ctx: Any, place: Callable[..., Tensor | None], offsets: Tensor, x: Tensor, *ws: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.place = place
        ctx.save_for_backward(offsets, x, *ws)
        ctx.set_materialize_grads(False)
        return tuple(grouped.product(x, w, offsets) for w in ws)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        offsets, x, *ws = ctx.saved_tensors
        _, _, need_x, *need_ws = ctx.needs_input_grad
        known = [(g, w) for g, w in zip(grads, ws, strict=True) if g is not None]
        gx = _summed_products(ctx.place, offsets, x, known) if need_x and known else None
        gws = (
            grouped.weight_grad(x, g, offsets) if need and g is not None else None
            for g, need in zip(grads, need_ws, strict=True)
        )
        return None, None, gx, *gws


def _summed_products(
    place: Callable[..., Tensor | None], offsets: Tensor, like: Tensor, terms: Sequence[tuple[Tensor, Tensor]]
) -> Tensor:
    """The sum of ``g @ w.mT`` over pairs of ``g`` and ``w``, where there is a place for it."""
    if torch.is_grad_enabled():  # it will be differentiated itself
        first, *rest = (grouped.product(g, w.mT, offsets) for g, w in terms)
        return sum(rest, first)
    out = place(like.shape, like)
    out = like.new_empty(like.shape) if out is None else out
    for i, (g, w) in enumerate(terms):
        grouped.multiply_into(out, g, w.mT, offsets, add=i > 0)
    return out
