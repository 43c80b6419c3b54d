"""What the module raises where DeepEP asserts."""

from __future__ import annotations

from typing import Any, NoReturn

from commlib.arguments import as_int


class Refused(AssertionError, ValueError):
    """Arguments that DeepEP asserts against (AssertionError) and commlib has no use for (ValueError)."""


def require(right: bool, text: str) -> None:
    """Raise Refused with ``text`` unless ``right``; unlike assert, even under ``python -O``."""
    if not right:
        raise Refused(text)


def not_yet(what: str, instead: str) -> NoReturn:
    """Raise NotImplementedError for a part of DeepEP that is not here."""
    raise NotImplementedError(f"commlib.compat.deep_ep has no {what}: {instead}")


def at_least(name: str, value: Any, least: int) -> int:
    """``value`` as an int of at least ``least``.

    Raises:
        TypeError, Refused: it is no int, or less.
    """
    number = as_int(name, value)
    require(number >= least, f"{name} must be at least {least}, got {number}")
    return number
