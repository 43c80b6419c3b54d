"""Arguments that are numbers or flags, wherever they are given."""

from __future__ import annotations

import operator
from typing import Any

import numpy as np
import torch


def as_int(name: str, value: Any, least: int | None = None, most: int | None = None) -> int:
    """``value`` as an int; those of NumPy pass, bools and tensors do not.

    Raises:
        TypeError: it is no int.
        ValueError: it is less than ``least``, or more than ``most``.
    """
    if type(value) is not int:
        try:
            if isinstance(value, bool | np.bool_ | torch.Tensor):
                raise TypeError
            value = operator.index(value)
        except Exception:  # whatever __index__ raises
            raise TypeError(f"{name} must be an int, got {shown(value)}") from None
    if (least is not None and value < least) or (most is not None and value > most):
        bounds = f"be at least {least}" if most is None else f"lie in [{least}, {most}]"
        raise ValueError(f"{name} must {bounds}, got {shown(value)}")
    return value


def as_bool(name: str, value: Any) -> bool:
    """``value`` as a bool; those of NumPy pass, numbers do not.

    Raises:
        TypeError: it is neither True nor False.
    """
    if value is not True and value is not False and not isinstance(value, np.bool_):
        raise TypeError(f"{name} must be True or False, got {shown(value)}")
    return bool(value)


def shown(value: Any) -> str:
    """Enough of any value to recognise it."""
    try:
        text = str(value) if isinstance(value, torch.dtype) else repr(value)
    except Exception:  # an int of too many digits, or an object whose repr fails
        return f"a {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:77]}..."
