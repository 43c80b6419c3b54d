"""What both buffers do in combine."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from commlib.compat.deep_ep.communicators import Communicators
from commlib.compat.deep_ep.errors import require
from commlib.compat.deep_ep.events import Work
from commlib.compat.deep_ep.handles import Route
from commlib.compat.deep_ep.layout import check_beside
from commlib.compat.deep_ep.rows import SUMMED, dense_rows
from commlib.dispatched import Handle, combine_places


def check_y(x: Any, route: Route) -> None:
    """Check rows for combine.

    Raises:
        TypeError, Refused: x is not ``[rows, H]`` bfloat16 (on the CPU also float16 or float32) on the
            dispatch's device.
    """
    rows = route.rows
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a tensor, got {type(x).__name__}")
    require(
        x.dim() == 2 and len(x) == rows,
        f"x must have a row for each of the {rows} of the handle's dispatch, got {list(x.shape)}",
    )
    here = route.handle._ep.settings.device.type
    require(x.device.type == here, f"x must be on {here}, as the dispatch was, got {x.device}")
    require(
        x.dtype == torch.bfloat16 or (x.device.type == "cpu" and x.dtype in SUMMED),
        f"x must be bfloat16 (on the CPU also float16 or float32), got {x.dtype} on {x.device.type}",
    )


def biases_of(bias: Any, x: Tensor, tokens: int) -> tuple[Tensor, ...]:
    """The biases given: none, one or two.

    Raises:
        TypeError, Refused: it is something else, or does not have the result's shape and dtype.
    """
    given = bias if isinstance(bias, tuple | list) else (bias,)
    require(
        not isinstance(bias, tuple | list) or len(bias) == 2, f"bias must be one or two, got {len(given)}"
    )
    for one in given:
        if one is not None and not isinstance(one, Tensor):
            raise TypeError(f"bias must be a tensor or a pair of tensors, got {type(one).__name__}")
    biases = tuple(one for one in given if one is not None)
    for one in biases:
        check_beside(x, bias=one)
        require(
            one.shape == (tokens, x.shape[1]) and one.dtype == x.dtype,
            f"bias must be [{tokens}, {x.shape[1]}] {x.dtype}, got {list(one.shape)} {one.dtype}",
        )
    return biases


def sum_rows(
    runtime: Communicators,
    handle: Handle,
    x: Tensor,
    biases: tuple[Tensor, ...],
    work: Work,
    asynchronous: bool,
    wide: bool = False,
    values: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Sum each token's rows and the biases in float32, with one rounding.

    Args:
        runtime: the buffer's communicators.
        handle: of the dispatch, which is done.
        x: ``[rows, H]`` in the handle's layout.
        biases: up to two ``[T, H]``.
        work: the Work to which the operation is added.
        asynchronous: return at once.
        wide: rows travel as float32, so that a rank's own sums are not rounded.
        values: of places, see :func:`commlib.dispatched.combine_places`.

    Returns:
        ``[T, H]`` of x's dtype; ``[T, K]`` float32, or None without values.
    """
    # commlib rounds after the first bias. Two biases are added in float32 first, which needs float32 rows.
    wide = (wide or len(biases) > 1) and x.dtype != torch.float32
    bias = None
    if biases:
        bias = dense_rows(biases[0].float() if wide else biases[0])
        for other in biases[1:]:
            bias = bias + other
    y = dense_rows(x.float() if wide else x)
    ep, known = runtime.along(handle, y.shape[1], y.dtype)
    back = None
    if values is not None:
        out, back, event = combine_places(known, y, values, bias, asynchronous)
        work.add(event)
    elif asynchronous:
        out, event = ep.combine(y, known, bias=bias, async_op=True)
        work.add(event)
    else:
        out = ep.combine(y, known, bias=bias)
    return work.settled(out, dtype=x.dtype), back
