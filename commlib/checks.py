"""Checks of the arguments of operations. All happen before anything is sent.

Those of ``dispatch`` and ``combine`` come first, and make tensors of what was given. Those of the ops follow:
nothing else stands between a tensor's address and the core.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor

from commlib.arguments import shown
from commlib.arrays import as_tensor
from commlib.calls import Combine, Dispatch, Redispatch, RoutePlan, words_of_groups
from commlib.communicator import Communicator
from commlib.event import Event
from commlib.formats import can_be_summed
from commlib.quantization import check_quantizable, named, numbered
from commlib.settings import Bounds, Settings

Layout = Literal["rank", "expert", "batched"]
Overflow = Literal["error", "drop"]
ORDINARY = (Tensor, torch.nn.Parameter)  # classes of tensors without a dispatch of their own
LAYOUTS, OVERFLOWS = get_args(Layout), get_args(Overflow)
MAX_ALIGN = 2**16  # no kernel's tile is longer, and padding for all experts can still be allocated
_MAX_BYTES = 2**62  # of one result, so that products of sizes fit in 64 bits


# -- what the user gives -------------------------------------------------------------------------------------


def tensor_on(device: torch.device, name: str, array: Any, writable: bool = False) -> Tensor:
    """``array`` as a dense tensor that lies on ``device``, and whose values lie at its address."""
    tensor = as_tensor(name, array, writable)
    _check_device(name, tensor, device)
    if tensor.layout != torch.strided or tensor.is_nested:
        kind = "a nested tensor" if tensor.is_nested else tensor.layout
        raise ValueError(f"{name} must be a dense tensor, got {kind}: call .to_dense()")
    if torch.compiler.is_compiling():
        return tensor
    if writable and (tensor.is_neg() or tensor.is_conj()):
        raise ValueError(f"{name} is a negated or conjugated view, which cannot be written")
    return resolved(tensor)


def resolved(tensor: Tensor) -> Tensor:
    """The same values, where they lie in memory as they are.

    Operations that PyTorch's dispatcher does not see would take a negated or conjugated view's for those
    that lie there.
    """
    return tensor.resolve_conj().resolve_neg() if tensor.is_neg() or tensor.is_conj() else tensor


def check_readable(name: str, tensor: Tensor) -> None:
    """That a tensor which is to be copied or converted has memory: PyTorch reads it without asking."""
    if type(tensor) not in ORDINARY or torch.compiler.is_compiling() or is_functorch_wrapped_tensor(tensor):
        return
    if tensor.untyped_storage().nbytes() == 0 and tensor.numel() > 0:
        raise ValueError(f"{name} has no memory of its own: its storage has been freed")


def copied_topk_idx(device: torch.device, topk_idx: Any) -> Tensor:
    """Expert ids as contiguous int64 in our own memory: the user's may change while they are needed."""
    if topk_idx is None:
        raise ValueError("topk_idx is needed unless a handle is given")
    idx = tensor_on(device, "topk_idx", topk_idx)
    check_readable("topk_idx", idx)
    if idx.dtype == torch.int64 and idx.is_contiguous():
        return idx.clone()
    if idx.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"topk_idx must be int64 or int32, got {idx.dtype}")
    return idx.to(torch.int64).contiguous()  # copies: it was not both contiguous and int64


def check_out(out: Tensor, tokens: int, settings: Settings, call: Combine) -> None:
    """The ``out`` of a combine, which is written past autograd."""
    _check_rows("out", out, settings, tokens, any_format=True)
    if call.y.dim() == 2:
        _check_alike("out", out, call.y)
    if not out.is_contiguous():
        raise ValueError("out must be contiguous")
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (out, *call[:3])):
        raise ValueError(
            "out= is not differentiable, and out or an input requires grad: call without it, or under "
            "torch.no_grad()"
        )


def check_layout(
    layout: str, zero_copy: bool, overflow: str, groups_in_slots: bool, bounded: bool = False
) -> None:
    """That options of dispatch go together."""
    if not isinstance(layout, str) or layout not in LAYOUTS:
        raise ValueError(f'layout must be "rank", "expert" or "batched", got {shown(layout)}')
    if layout == "batched" and not bounded:
        raise ValueError(
            'layout "batched" has room for rows_per_expert rows of each expert: it needs bounded=True'
        )
    if not isinstance(overflow, str) or overflow not in OVERFLOWS:
        raise ValueError(f'overflow must be "error" or "drop", got {shown(overflow)}')
    if zero_copy and layout != "rank" and not groups_in_slots:
        raise ValueError(
            'zero_copy needs layout "rank": rows grouped by expert are copies here (several nodes, or '
            'grouping is "once", or "auto" has chosen that)'
        )


def check_waves(in_waves: bool, possible: bool) -> None:
    """That rows can come in waves where they are to."""
    if in_waves and not possible:
        raise ValueError(
            'in_waves needs layout="expert" and async_op=True, and goes with neither a handle nor bounded '
            "nor quantize"
        )


def check_room(c: Communicator, layout: str, rows: int) -> None:
    """That as many rows of a layout may lie in a slot."""
    if layout == "rank" or c.can_group_in_slot(rows):
        return
    if not c.groups_in_slots:
        raise ValueError(
            'combine_buffer needs layout "rank": grouped rows are summed into the heap here (several '
            'nodes, or grouping is "once", or "auto" has chosen that)'
        )
    raise ValueError(
        f"{rows} rows grouped by expert have no room in a slot, which is for {c.settings.grouped_rows}: give "
        "combine a tensor of your own, or ExpertParallel a larger max_grouped_rows"
    )


def check_align(c: Communicator, align: int) -> None:
    """That a padded result's bytes can be counted; whether there is enough memory shows later."""
    if not 1 <= align <= MAX_ALIGN:
        raise ValueError(f"align must be a positive int, at most {MAX_ALIGN}, got {align}")
    row_bytes = c.settings.hidden * c.settings.dtype.itemsize
    if c.experts * align * row_bytes > _MAX_BYTES:
        raise ValueError(
            f"align={align} pads {c.experts} experts' rows of {row_bytes} bytes to more than can be addressed"
        )


def rows_and_scales(x: Any) -> tuple[Any, Any]:
    """What dispatch is given as ``x``, apart; no scales: None."""
    if not isinstance(x, tuple):
        return x, None
    if len(x) != 2:
        raise ValueError(f"x must be rows, or a pair (rows, scales), got a tuple of {len(x)}")
    return x


def quantization_of(quantize: Any, scales: Tensor | None) -> int:
    """The number of the format that dispatch is to convert rows to; 0: none."""
    if quantize is None:
        return 0
    q = named(quantize)
    if scales is not None:
        raise ValueError(
            f'x is a pair (rows, scales) already, and quantize="{q.name}" makes one of rows: leave one out'
        )
    return q.number


def check_gradient(
    settings: Settings, rows: Tensor, scales: Tensor | None, wanted: bool, quantize: int = 0
) -> None:
    """That rows of a dispatch can have a gradient, where autograd wants one."""
    if not wanted or (scales is None and not quantize and can_be_summed(settings.dtype, rows.dtype)):
        return
    what = "that are quantized" if quantize else f"of {rows.dtype}"
    what = what if scales is None else "that come with scales"
    raise ValueError(
        f"rows {what} have no gradient here, nor have the weights that go with them: detach() what requires "
        "grad, or dispatch under torch.no_grad()"
    )


def check_event(previous_event: Any) -> None:
    """That an operation can wait for it."""
    if not isinstance(previous_event, Event):
        raise TypeError(
            "previous_event must be an event of an operation (Dispatched.event, or what combine returns with "
            f"async_op), got {type(previous_event).__name__}"
        )


# -- what an op gets ----------------------------------------------------------------------------------------


def check_sizes(c: Communicator, call: Dispatch) -> None:
    """That what torch.compile was told of the communicator is so."""
    if (call.width, call.experts) != (c.width, c.experts):
        raise ValueError(
            f"width and experts are {(call.width, call.experts)}, but the communicator's "
            f"{(c.width, c.experts)}"
        )
    if not call.bounded:
        return
    layout = "rank" if not call.grouped else "batched" if call.fixed else "expert"
    given = Bounds(call.capacity, call.results, call.most_rows, call.padded, call.fixed)
    bounds = c.bounds(layout, call.align)
    if given != bounds:
        raise ValueError(f"the dispatch was to have {given}, but the communicator has {bounds}")


def check_dispatch(c: Communicator, call: Dispatch) -> None:
    """Arguments of dispatch. The core checks the range of ids."""
    x, idx, scales = call.x, call.topk_idx, call.scales
    growing = c.settings.grows and x.shape[0] > c.settings.max_tokens
    tokens = x.shape[0] if growing else None
    _check_rows("x", x, c.settings, tokens, any_format=scales is not None, quantize=call.quantize)
    _check_memory("x", x)
    _check_scales(c, x, scales, call.quantize)
    shape = (x.shape[0], c.settings.topk)
    if idx.shape != shape:
        raise ValueError(f"topk_idx must be {list(shape)} as x and topk say, got {list(idx.shape)}")
    _check_dense(c, "topk_idx", idx, shape, torch.int64)
    if growing:
        _check_tokens_go_somewhere(idx, c.settings.max_tokens)
    if call.topk_weights is not None:
        _check_dense(c, "topk_weights", call.topk_weights, shape, c.weight_dtype)
    if call.align != 1:
        check_align(c, call.align)


def _check_tokens_go_somewhere(topk_idx: Tensor, most: int) -> None:
    """All ranks notice rows that one cannot receive, but tokens without experts make no rows."""
    going = int((topk_idx >= 0).any(1).sum())
    if going < topk_idx.shape[0]:
        raise ValueError(
            f"x has {topk_idx.shape[0]} rows, of which {topk_idx.shape[0] - going} go nowhere (all their ids "
            f"are -1): with so many, more than {most}, leave those out"
        )


def check_redispatch(c: Communicator, call: Redispatch) -> None:
    """Arguments of a dispatch with a handle, or of a combine's gradient, but for its plan."""
    x, tokens = call.x, call.plan.routes.shape[0]
    _check_rows("x", x, c.settings, any_format=True, quantize=call.quantize)
    _check_memory("x", x)
    _check_scales(c, x, call.scales, call.quantize)
    if x.shape[0] != tokens:
        raise ValueError(f"x has {x.shape[0]} rows, but the handle's dispatch had {tokens}")
    if call.topk_weights is not None:
        _check_dense(c, "topk_weights", call.topk_weights, (tokens, c.settings.topk), c.weight_dtype)
    if call.y is not None or call.y_weights is not None:
        _check_weighing(c, call)


def _check_weighing(c: Communicator, call: Redispatch) -> None:
    y, weights, rows = call.y, call.y_weights, call.plan.source.shape[0]
    if y is None or weights is None or call.scales is not None or call.quantize or call.zero_copy:
        raise ValueError("y and y_weights go together, without scales, quantize and zero_copy")
    _check_rows("y", y, c.settings, rows, any_format=True)
    _check_memory("y", y)
    _check_summable(c, "y", y)
    _check_alike("x", call.x, y)
    _check_dense(c, "y_weights", weights, (rows,), c.weight_dtype)


def check_combine(c: Communicator, call: Combine) -> None:
    """Arguments of combine, or of a dispatch's gradient, but for its plan."""
    y, rows = call.y, call.plan.source.shape[0]
    _check_rows("y", y, c.settings, rows, any_format=True)
    _check_memory("y", y)
    _check_summable(c, "y", y)
    if call.weights is not None:
        if call.weights.dim() != 1:
            given = list(call.weights.shape)
            raise ValueError(
                f"weights must be [{rows}], one for each row of y, got {given}: a dispatch gives those with "
                'layout="expert"; with "rank", weigh the result of each expert yourself'
            )
        _check_dense(c, "weights", call.weights, (rows,), c.weight_dtype)
    if call.bias is not None:
        _check_rows("bias", call.bias, c.settings, call.plan.routes.shape[0], any_format=True)
        _check_memory("bias", call.bias)
        _check_alike("bias", call.bias, y)
    if call.weight_grads is not None:
        shape = (rows,) if call.grouped else (rows, c.settings.topk)
        _check_dense(c, "weight_grads", call.weight_grads, shape, c.weight_dtype)


def check_plan(c: Communicator, r: RoutePlan, grouped: bool) -> None:
    """That sizes fit each other; the core checks the numbers in them."""
    topk, tokens, received = c.settings.topk, r.routes.shape[0], r.local.shape[0]
    groups = words_of_groups(c.experts, grouped)
    if r.bounded(c.experts, grouped):
        groups += 2  # no more and no fewer
    sizes = [tokens * topk, tokens * c.width, received * topk, groups]
    read = [r.topk_idx, r.routes, r.local, r.groups]
    if grouped:
        if r.places is None:
            raise ValueError(_misfit(r, sizes))
        sizes.append(tokens * topk)
        read.append(r.places)
    for tensor, size in zip(read, sizes, strict=True):
        if tensor.numel() != size or tensor.dtype != torch.int64 or not tensor.is_contiguous():
            raise ValueError(_misfit(r, sizes))
    if not grouped and received != r.source.shape[0]:
        raise ValueError(_misfit(r, sizes))
    for tensor in r.tensors:
        _check_device("the routing", tensor, c.settings.device)


def check_apart(out: Tensor, read: Mapping[str, Tensor | None]) -> None:
    """That ``out`` shares no memory with tensors that are read while it is written."""
    _check_memory("out", out)
    begin, end = _extent(out)
    for name, tensor in read.items():
        if tensor is None:
            continue
        first, last = _extent(tensor)
        if begin < last and first < end:
            raise ValueError(f"out shares memory with {name}, which is read while out is written")


def _check_rows(
    name: str,
    rows: Tensor,
    settings: Settings,
    count: int | None = None,
    any_format: bool = False,
    quantize: int = 0,
) -> None:
    """That rows have the right dtype, device and shape: ``[count, hidden]``, or at most max_tokens rows.

    ``any_format``: of any dtype and width that need no more bytes. ``quantize``: of any dtype, and with
    any_format of any width, that can be converted; the core looks whether what becomes of them has room.
    """
    shape = rows.shape
    if quantize:
        if len(shape) != 2 or (shape[1] != settings.hidden and not any_format):
            raise ValueError(f"{name} must be [rows, {settings.hidden}], got {list(shape)}")
        check_quantizable(numbered(quantize), rows)
    elif rows.dtype != settings.dtype or len(shape) != 2 or shape[1] != settings.hidden:
        _check_other_rows(name, rows, settings, any_format)
    _check_device(name, rows, settings.device)
    if count is None:
        if shape[0] > settings.max_tokens:
            raise ValueError(f"{name} has {shape[0]} rows, but max_tokens is {settings.max_tokens}")
    elif shape[0] != count:
        raise ValueError(f"{name} must have {count} rows, got {shape[0]}")
    if rows.stride()[1] != 1 and shape[1] > 1 and shape[0] > 0:
        raise ValueError(
            f"the elements of a row of {name} must lie side by side, but its strides are "
            f"{rows.stride()}: call .contiguous()"
        )


def _check_other_rows(name: str, rows: Tensor, settings: Settings, any_format: bool) -> None:
    """That rows which are not the communicator's own may be others."""
    shape = list(rows.shape)
    room = settings.hidden * settings.dtype.itemsize
    if any_format and len(shape) == 2 and 0 < shape[1] * rows.element_size() <= room:
        return
    most = f" (or other rows of at most {room} bytes)" if any_format else ""
    if rows.dtype != settings.dtype:
        raise ValueError(
            f"{name} must be {settings.dtype}, got {rows.dtype}{most}: convert it, or give ExpertParallel "
            "another dtype="
        )
    raise ValueError(f"{name} must be [rows, {settings.hidden}], got {shape}{most}")


def _check_scales(c: Communicator, x: Tensor, scales: Tensor | None, quantize: int) -> None:
    if scales is None:
        return
    if quantize:
        raise ValueError("rows that come with scales cannot be quantized as well")
    _check_device("scales", scales, c.settings.device)
    _check_memory("scales", scales)
    if scales.dim() != 2 or scales.shape[0] != x.shape[0] or scales.shape[1] == 0:
        raise ValueError(f"scales must be [{x.shape[0]}, 1 or more], got {list(scales.shape)}")
    if scales.stride()[1] != 1 and scales.shape[1] > 1 and scales.shape[0] > 0:
        raise ValueError(f"scales of a row must lie side by side, but the strides are {scales.stride()}")


def _check_summable(c: Communicator, name: str, rows: Tensor) -> None:
    if rows.dtype != c.settings.dtype and not can_be_summed(c.settings.dtype, rows.dtype):
        raise ValueError(
            f"{name} must be of a floating type that can be summed beside {c.settings.dtype}, got "
            f"{rows.dtype}: float64 rows are summed in float64, all others in float32"
        )


def _check_alike(name: str, rows: Tensor, y: Tensor) -> None:
    if rows.dtype != y.dtype or rows.shape[1] != y.shape[1]:
        raise ValueError(
            f"{name} must be as y is, {y.dtype} of width {y.shape[1]}, got {rows.dtype} of {rows.shape[1]}"
        )


def _check_dense(
    c: Communicator, name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    if tensor.dtype != dtype:
        raise ValueError(f"{name} must be {dtype}, got {tensor.dtype}")
    _check_device(name, tensor, c.settings.device)
    _check_memory(name, tensor)
    if tensor.shape != shape:
        raise ValueError(f"{name} must be {list(shape)}, got {list(tensor.shape)}")
    if not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous, but its strides are {tensor.stride()}")


def _misfit(r: RoutePlan, sizes: Sequence[int]) -> str:
    named = zip(r._fields, r.tensors, strict=False)
    given = ", ".join(f"{name} {list(t.shape)} {t.dtype}" for name, t in named)
    return (
        f"not the routing of a dispatch of this communicator and layout: contiguous int64 with {sizes} "
        f'elements in topk_idx, routes, local and groups, with layout="expert" also in places: {given}'
    )


def _check_device(name: str, tensor: Tensor, device: torch.device) -> None:
    if tensor.device != device:
        raise ValueError(f"{name} must be on {device}, as this communicator is, got {tensor.device}")


def _check_memory(name: str, tensor: Tensor) -> None:
    """That a tensor has an address: some classes of tensors have none, nor has one whose storage is freed."""
    if tensor.is_neg() or tensor.is_conj():  # PyTorch's dispatcher, and whoever goes past it, resolve it
        raise ValueError(f"{name} is a negated or conjugated view: call .resolve_neg()")
    if tensor.data_ptr() == 0 and tensor.numel() > 0:
        raise ValueError(
            f"{name} has no memory of its own: it is a {type(tensor).__name__}, or its storage has been freed"
        )


def _extent(tensor: Tensor) -> tuple[int, int]:
    """The address of the first byte, and the one behind the last."""
    begin = tensor.data_ptr()
    if tensor.is_contiguous():
        return begin, begin + tensor.numel() * tensor.element_size()
    last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return begin, begin + (last + 1) * tensor.element_size()
