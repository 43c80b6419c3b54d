"""Weak containers that run nothing when something has gone.

Those of Python's ``weakref`` have callbacks written in Python, and what such a callback raises is printed and
dropped, even a Ctrl-C that happens to come while it runs. Here entries whose object has gone are passed over,
until the next one is added. What must happen at once when an object goes: ``_core.when_gone``.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Generic, TypeVar

K = TypeVar("K")
V = TypeVar("V")
D = TypeVar("D")


class _Ref(weakref.ref[K]):
    """Equal to another one of the same object; once that has gone, to itself alone."""

    __slots__ = ("_id",)

    def __init__(self, item: K) -> None:
        self._id = id(item)

    def __hash__(self) -> int:
        return self._id

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, _Ref) and (item := self()) is not None and item is other())


class WeakMap(Generic[K, V]):
    """Values by objects, each of which is only itself and is not kept. Several threads may use it."""

    def __init__(self) -> None:
        self._values: dict[_Ref[K], V] = {}

    def get(self, key: K, default: D) -> V | D:
        return self._values.get(_Ref(key), default)

    def __contains__(self, key: K) -> bool:
        return _Ref(key) in self._values

    def __getitem__(self, key: K) -> V:
        return self._values[_Ref(key)]

    def __setitem__(self, key: K, value: V) -> None:
        self._sweep()
        self._values[_Ref(key)] = value

    def setdefault(self, key: K, default: V) -> V:
        """The value of ``key``, which is ``default`` if it had none."""
        self._sweep()
        return self._values.setdefault(_Ref(key), default)

    def __iter__(self) -> Iterator[K]:
        return (key for ref in list(self._values) if (key := ref()) is not None)

    def _sweep(self) -> None:
        for ref in list(self._values):
            if ref() is None:
                self._values.pop(ref, None)


class WeakSet(Generic[K]):
    """Objects that it does not keep, in the order in which they came. Several threads may use it."""

    def __init__(self) -> None:
        self._items: WeakMap[K, None] = WeakMap()

    def add(self, item: K) -> None:
        self._items[item] = None

    def __iter__(self) -> Iterator[K]:
        return iter(self._items)
