"""What PyTorch is told of each op, from the fields of its call: see :mod:`commlib.calls`."""

from __future__ import annotations

from typing import Any, TypeVar

import torch

from commlib.calls import Combine, Dispatch, Redispatch, RoutePlan

Call = TypeVar("Call", Dispatch, Redispatch, Combine)

_TYPES = {"Tensor": "Tensor", "Tensor | None": "Tensor?", "int": "int", "bool": "bool"}
PLANNED = RoutePlan._fields.index("view")  # how many tensors a plan has: its view stays behind

# torch.compile(mode="reduce-overhead") leaves such ops out of its CUDA graphs. Older PyTorch knows no tag.
_TAGS = tuple(getattr(torch.Tag, name) for name in ("cudagraph_unsafe",) if hasattr(torch.Tag, name))


def _arguments(fields: dict[str, Any]) -> list[str]:
    found = []
    for name, kind in fields.items():
        kind = getattr(kind, "__forward_arg__", kind)
        if kind == "RoutePlan":
            found += _arguments(dict(list(RoutePlan.__annotations__.items())[:PLANNED]))
        else:
            found.append(f"{_TYPES[kind]} {name}")
    return found


_NAMES = {
    kind: tuple(argument.split()[-1] for argument in _arguments(kind.__annotations__))
    for kind in (Dispatch, Redispatch, Combine)
}


def flat(call: Redispatch | Combine) -> tuple[Any, ...]:
    """The arguments of the op: the call's fields, those of the plan in its place."""
    at = call._fields.index("plan")
    return (*call[:at], *call.plan[:PLANNED], *call[at + 1 :])


def unflat(kind: type[Call], arguments: tuple[Any, ...]) -> Call:
    """The call with these arguments."""
    if "plan" not in kind._fields:
        return kind(*arguments)
    at = kind._fields.index("plan")
    plan, rest = RoutePlan(*arguments[at : at + PLANNED]), arguments[at + PLANNED :]
    return kind(*arguments[:at], plan, *rest)  # type: ignore[call-arg]


def gradients(kind: type[Dispatch | Redispatch | Combine], **of: Any) -> tuple[Any, ...]:
    """What a backward returns: for each argument its gradient, by name; None where there is none."""
    return tuple(of.get(name) for name in _NAMES[kind])


def _define(name: str, kind: type[Dispatch | Redispatch | Combine], results: str) -> Any:
    library.define(f"{name}({', '.join(_arguments(kind.__annotations__))}) -> {results}", tags=_TAGS)
    return getattr(torch.ops.commlib, name).default


library = torch.library.Library("commlib", "DEF")
dispatch = _define("dispatch", Dispatch, f"({', '.join(['Tensor'] * 9)})")
# For torch.compile: its back end mistakes one size for another where an op with an effect returns a tuple of
# tensors whose sizes are known only at run time. In eager mode autograd takes longer for a list.
traced_dispatch = _define("traced_dispatch", Dispatch, "Tensor[]")
redispatch = _define("redispatch", Redispatch, "(Tensor, Tensor, Tensor, Tensor)")
combine = _define("combine", Combine, "(Tensor, Tensor)")
