"""The experts' first and last matrix products, where their rows come from dispatch and go to combine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

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

    Args:
        dispatched: what the experts compute on; None: rows that no dispatch has brought.
        weights: ``[M]``: the rows of the last product's ``x`` are multiplied by them.
    """

    def __init__(self, dispatched: Dispatched[Tensor] | None = None, weights: Tensor | None = None) -> None:
        self._handle = None if dispatched is None else dispatched.handle
        self._weights = weights

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
            ValueError, TypeError: as :func:`grouped_mm`.
        """
        given = biases or (None,) * len(ws)
        if self._handle is None or not grouped.writes_in_place(x):
            pairs = zip(ws, given, strict=True)
            return tuple(grouped.grouped_mm(x, w, offsets, bias) for w, bias in pairs)
        cast = [grouped.checked_operands(x, w, offsets, b) for w, b in zip(ws, given, strict=True)]
        products = _First.apply(self._place, offsets, cast[0][0], *(w for _, w in cast))
        return tuple(grouped.with_bias(p, b, offsets) for p, b in zip(products, given, strict=True))

    def last(self, x: Tensor, offsets: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
        """Multiply the rows of the inner layer; the result is what :meth:`Experts.compute` returns.

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
        weights = self._weights
        if weights is not None:
            x = (x * weights.unsqueeze(1)).to(x.dtype)
        cast, w = grouped.checked_operands(x, w, offsets, bias)
        out = self._place((x.shape[0], w.shape[2]), cast) if grouped.writes_in_place(cast) else None
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
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        offsets, x, *ws = ctx.saved_tensors
        _, _, need_x, *need_ws = ctx.needs_input_grad
        known = [(g, w) for g, w in zip(grads, ws, strict=True) if g is not None]
        gx = None
        if need_x and known:
            gx = ctx.place(x.shape, x)
            gx = x.new_empty(x.shape) if gx is None else gx
            for i, (g, w) in enumerate(known):
                grouped.multiply_into(gx, g, w.mT, offsets, add=i > 0)
        gws = (
            grouped.weight_grad(x, g, offsets) if need and g is not None else None
            for g, need in zip(grads, need_ws, strict=True)
        )
        return None, None, gx, *gws
