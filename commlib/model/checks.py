"""Errors that name the value, for the model's inputs."""

from __future__ import annotations

import math

from commlib.arguments import as_int


def keep_int(owner: object, name: str, least: int, most: int | None = None) -> None:
    """Check a field of a frozen dataclass, and keep it as Python's int, which can be hashed and saved.

    Raises:
        TypeError, ValueError: it is no int in ``[least, most]``.
    """
    object.__setattr__(owner, name, as_int(name, getattr(owner, name), least, most))


def check_number(name: str, value: object, least: float = 0.0, most: float = math.inf) -> None:
    """Raise TypeError or ValueError unless ``value`` is a finite number with ``least < value <= most``."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not (math.isfinite(value) and least < value <= most):
        bounds = f"more than {least:g}" + ("" if most == math.inf else f" and at most {most:g}")
        raise ValueError(f"{name} must be finite and {bounds}, got {value}")
