"""Errors that name the value, for the model's inputs."""

from __future__ import annotations

import math


def check_number(name: str, value: object, least: float = 0.0, most: float = math.inf) -> None:
    """Raise TypeError or ValueError unless ``value`` is a finite number with ``least < value <= most``."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not (math.isfinite(value) and least < value <= most):
        bounds = f"more than {least:g}" + ("" if most == math.inf else f" and at most {most:g}")
        raise ValueError(f"{name} must be finite and {bounds}, got {value}")
