"""Whose turn it is."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")


def changing_orders(items: Sequence[T], times: int) -> Iterator[list[T]]:
    """The items so many times, in a new order each time: what ran before decides what is in the caches.

    Orders are the same on all ranks, and in every run.
    """
    turns = random.Random(0)
    for _ in range(times):
        yield turns.sample(items, len(items))
