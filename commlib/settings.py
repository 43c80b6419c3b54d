"""Arguments of ExpertParallel, checked."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from commlib import _core
from commlib.arguments import as_bool, as_int, shown
from commlib.devices import platform_of
from commlib.formats import CORE_DTYPES
from commlib.model import UniformRouting
from commlib.partition import SMPartition
from commlib.startup.topology import ROUTINGS, RoutingMode, node_size

Grouping = Literal["auto", "direct", "once"]
GROUPINGS: tuple[Grouping, ...] = ("auto", "direct", "once")

_MAX_SMS = 1024
_MAX_SECONDS = 3e8  # so that times in nanoseconds fit 64 bits
START_SECONDS = 300.0  # that ranks wait for each other at start-up unless told otherwise
_MAX_ROWS = 2**31 - 1  # a row's number travels in 32 bits
_PADDING = 127  # rows of a group: for align up to 128 there is always room, where there is for all rows
_FIRST_ROWS = 4096  # that a slot holds at first where max_tokens is not known
ANY_TOKENS = 2**16  # that a rank may send then, where most go nowhere


class Bounds(NamedTuple):
    """For how many rows a bounded dispatch has room; all 0: the dispatch is not bounded.

    Attributes:
        capacity: unique rows.
        results: rows of the result.
        most_rows: rows in all groups of a rank,
        padded: and the padding of so many experts on top of that.
        fixed: rows of each group, where all have one size.
    """

    capacity: int = 0
    results: int = 0
    most_rows: int = 0
    padded: int = 0
    fixed: int = 0


@dataclass(frozen=True)
class Settings:
    """What the user asked for; see ExpertParallel."""

    num_experts: int
    hidden: int
    topk: int
    max_tokens: int
    dtype: torch.dtype
    device: torch.device
    num_sms: int | None
    capacity: int | None
    slots: int | None
    timeout: float = 0.0  # the team's, once there is one
    partition: SMPartition | None = None
    link_gbps: float | None = None
    routing: RoutingMode = "auto"
    ranks_per_node: int | None = None
    grows: bool = False  # max_tokens was not known: it and capacity are the present ones
    exclusive: bool = False
    grouping: Grouping = "auto"
    max_grouped_rows: int | None = None
    rows_per_expert: int | None = None
    grouped_rows: int = 0  # for which a slot has room; 0: grouped rows lie in none. See with_groups

    @property
    def weight_dtype(self) -> torch.dtype:
        """The dtype of weights, and of sums."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    def checked(self, size: int) -> Settings:
        """The same, in plain types.

        Raises:
            ValueError, TypeError: a setting cannot be used on ``size`` ranks; the text gives its value.
        """
        if size > _core.MAX_RANKS:
            raise ValueError(f"at most {_core.MAX_RANKS} ranks, got {size}")
        experts = as_int("num_experts", self.num_experts, 1, 2**20)
        num_sms = None if self.num_sms is None else as_int("num_sms", self.num_sms, 1, _MAX_SMS)
        self._check_place(num_sms)
        if not isinstance(self.routing, str) or self.routing not in ROUTINGS:
            raise ValueError(f"routing must be one of {', '.join(ROUTINGS)}, got {shown(self.routing)}")
        if not isinstance(self.grouping, str) or self.grouping not in GROUPINGS:
            raise ValueError(f"grouping must be one of {', '.join(GROUPINGS)}, got {shown(self.grouping)}")
        checked = replace(
            self,
            num_experts=experts,
            hidden=as_int("hidden", self.hidden, 1, 2**24),
            topk=as_int("topk", self.topk, 1, min(_core.MAX_TOPK, experts)),
            max_tokens=as_int("max_tokens", self.max_tokens, 1, _MAX_ROWS // size),
            dtype=dtype_of(self.dtype),
            num_sms=num_sms,
            capacity=None if self.capacity is None else as_int("capacity", self.capacity, 1, _MAX_ROWS),
            slots=None if self.slots is None else as_int("slots", self.slots, 1, _core.MAX_SLOTS),
            link_gbps=None if self.link_gbps is None else _positive("link_gbps", self.link_gbps, "GB/s"),
            ranks_per_node=node_size(self.ranks_per_node),
            exclusive=as_bool("exclusive", self.exclusive),
            max_grouped_rows=None
            if self.max_grouped_rows is None
            else as_int("max_grouped_rows", self.max_grouped_rows, 1, _MAX_ROWS),
            rows_per_expert=None
            if self.rows_per_expert is None
            else as_int("rows_per_expert", self.rows_per_expert, 1, _MAX_ROWS),
        )
        return checked.with_room(size) if self.grows else checked

    def with_room(self, size: int, rows: int = 1, tokens: int = 1) -> Settings:
        """The same for a communicator whose slots hold at least ``rows``, and ranks send at least ``tokens``.

        From the same numbers, every rank comes to the same settings.

        Raises:
            ValueError: a slot cannot hold as many.
        """
        capacity = self.capacity or _FIRST_ROWS
        while capacity < rows:
            capacity *= 2
        # No more tokens go somewhere than all ranks can receive.
        tokens = min(max(tokens, size * capacity, self.max_tokens), _MAX_ROWS // size)
        roomier = replace(self, max_tokens=tokens, capacity=as_int("capacity", capacity, 1, _MAX_ROWS))
        return roomier.with_groups(size, self.grouped_rows > 0)

    def with_groups(self, size: int, direct: bool) -> Settings:
        """The same, once ranks have agreed whether rows grouped by expert go straight into slots."""
        if not direct:
            return replace(self, grouped_rows=0)
        if self.max_grouped_rows is not None:
            return replace(self, grouped_rows=self.max_grouped_rows)
        routing = self.uniform_routing(size)
        rows, experts = self.capacity_on(size), max(map(routing.experts_on, range(size)))
        most = rows * min(self.topk, experts) + experts * _PADDING
        each = self.topk / routing.unique_ranks  # of a row's experts, at each of its ranks
        found = platform_of(self.device).default_grouped_rows(most, math.ceil(rows * each))
        if self.rows_per_expert is not None:
            found = max(found, experts * self.rows_per_expert)
        return replace(self, grouped_rows=min(found, _MAX_ROWS))

    def uniform_routing(self, size: int) -> UniformRouting:
        """What is expected of these numbers."""
        return UniformRouting(self.num_experts, self.topk, size)

    def _check_place(self, num_sms: int | None) -> None:
        platform_of(self.device).require()
        if self.partition is not None:
            if not isinstance(self.partition, SMPartition):
                raise TypeError(f"partition must be an SMPartition, got {shown(self.partition)}")
            self.partition.check_fits(self.device, num_sms)

    def capacity_on(self, size: int) -> int:
        """Rows a slot holds."""
        return size * self.max_tokens if self.capacity is None else self.capacity

    def bounds(self, size: int, experts: int, most: int, layout: str, align: int) -> Bounds:
        """For how many rows a bounded dispatch has room on a rank with so many experts.

        ``most``: that a rank has.

        Raises:
            ValueError: how many are to have room is not known.
        """
        if self.grows:
            raise ValueError("bounded=True gives results of one size: ExpertParallel needs max_tokens")
        capacity = self.capacity_on(size)
        if layout == "rank":
            return Bounds(capacity, capacity)
        if capacity < size * self.max_tokens:
            raise ValueError(
                f'bounded=True with layout "{layout}" has to take all rows that can come, '
                f"{size * self.max_tokens}, but capacity is {capacity}: leave it out, and bound that by "
                f"{'rows_per_expert' if layout == 'batched' else 'max_grouped_rows'}"
            )
        if layout == "batched":
            each = min(self.rows_per_expert or capacity, _MAX_ROWS)
            return Bounds(capacity, experts * each, fixed=each)
        if self.max_grouped_rows is not None:
            return Bounds(capacity, self.max_grouped_rows, self.max_grouped_rows)
        rows = capacity * min(self.topk, most)
        return Bounds(capacity, rows + most * (align - 1), rows, most)

    def slots_on(self, size: int) -> int:
        """How many slots there are."""
        if self.slots is not None:
            return self.slots
        rows = max(self.capacity_on(size), self.grouped_rows)
        heaps = size * rows * self.hidden * self.dtype.itemsize  # with one slot each
        return platform_of(self.device).default_slots(heaps)

    def shared(self) -> dict[str, Any]:
        """The settings that must be equal on all ranks."""
        own = ("num_sms", "timeout", "partition", "link_gbps", "grouped_rows")
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in own}
        return values | {"device": self.device.type, "dtype": str(self.dtype)}


def dtype_of(value: Any) -> torch.dtype:
    """A torch.dtype, also from one of NumPy's or a name.

    Raises:
        ValueError: rows of a communicator cannot be of that type.
    """
    found = value
    if value is not None and not isinstance(value, torch.dtype):
        try:
            name = value.removeprefix("torch.") if isinstance(value, str) else np.dtype(value).name
            found = getattr(torch, name, None)
        except TypeError:
            found = None
    if not isinstance(found, torch.dtype) or found not in CORE_DTYPES:
        raise ValueError(f"dtype must be bfloat16, float16, float32 or float64, got {shown(value)}")
    return found


def checked_timeout(seconds: Any, name: str = "timeout") -> float:
    """``seconds`` as a float.

    Raises:
        ValueError, TypeError: it is not a positive number, or more than ten years.
    """
    found = _positive(name, seconds, "seconds")
    if found > _MAX_SECONDS:
        raise ValueError(f"{name} must be at most {_MAX_SECONDS:g} seconds, got {found:g}")
    return found


def startup_seconds(startup_timeout: Any, timeout: Any) -> float:
    """How long ranks wait for each other at start-up: see ExpertParallel.

    Raises:
        ValueError, TypeError: as :func:`checked_timeout`.
    """
    if startup_timeout is not None:
        return checked_timeout(startup_timeout, "startup_timeout")
    return START_SECONDS if timeout is None else checked_timeout(timeout)


def startup_patience(startup_timeout: Any, timeout: Any) -> float:
    """The same; a value that is no number is refused later, when the other ranks can be told."""
    try:
        return startup_seconds(startup_timeout, timeout)
    except (TypeError, ValueError):
        return START_SECONDS


def _positive(name: str, value: Any, unit: str) -> float:
    if isinstance(value, str | bytes | bool):
        raise TypeError(f"{name} must be a number of {unit}, got {shown(value)}")
    try:
        number = float(value)  # from Python, NumPy, Decimal, Fraction
    except OverflowError:
        number = math.inf
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{name} must be a number of {unit}, got {shown(value)}") from None
    if not (number > 0 and math.isfinite(number)):
        raise ValueError(f"{name} must be a positive number of {unit}, got {number}")
    return number
