"""Weak containers that run nothing when something has gone.

Those of Python's ``weakref`` have callbacks written in Python, and what such a callback raises is printed and
dropped, even a Ctrl-C that happens to come while it runs. Here entries whose object has gone are passed over,
until the next one is added. What must happen at once when an object goes: ``_core.when_gone``.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, MutableMapping, MutableSet
from typing import TypeVar

K = TypeVar("K")
V = TypeVar("V")


class WeakMap(MutableMapping[K, V]):
    """Values by objects that it does not keep. Several threads may use it.

    References are equal as long as their objects are there and equal; later each equals itself alone.
    """

    def __init__(self) -> None:
        self._values: dict[weakref.ref[K], V] = {}

    def __getitem__(self, key: K) -> V:
        return self._values[weakref.ref(key)]

    def __setitem__(self, key: K, value: V) -> None:
        for ref in list(self._values):
            if ref() is None:
                self._values.pop(ref, None)
        self._values[weakref.ref(key)] = value

    def __delitem__(self, key: K) -> None:
        del self._values[weakref.ref(key)]

    def __iter__(self) -> Iterator[K]:
        return (key for ref in list(self._values) if (key := ref()) is not None)

    def __len__(self) -> int:
        return sum(1 for _ in self)


class WeakSet(MutableSet[K]):
    """Objects that it does not keep, in the order in which they came. Several threads may use it."""

    def __init__(self) -> None:
        self._items: WeakMap[K, None] = WeakMap()

    def __contains__(self, item: object) -> bool:
        return item in self._items

    def __iter__(self) -> Iterator[K]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def add(self, value: K) -> None:
        self._items[value] = None

    def discard(self, value: K) -> None:
        self._items.pop(value, None)
