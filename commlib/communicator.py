"""One rank's communicator as operations see it, without the façade that users hold."""

from __future__ import annotations

import atexit
import functools
import itertools
import sys
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from commlib import _core
from commlib.errors import CommError

if TYPE_CHECKING:
    from commlib.backend import Backend
    from commlib.event import Event
    from commlib.settings import Settings

_SLOTS_TO_WORK_WITH = 2
_COUNTED = ("dispatches", "redispatches", "combines", "rows_received", "dropped", "growths")

_numbers = itertools.count()
_communicators: dict[int, weakref.ref[Communicator]] = {}


class Communicator:
    """Core, device, sizes and statistics of one rank.

    ExpertParallel keeps it, and so does every graph of autograd or torch.compile with one of its operations;
    the last of them closes it.
    """

    def __init__(
        self,
        rank: int,
        size: int,
        settings: Settings,
        backend: Backend,
        reconnect: Callable[[Settings, _core.Communicator], Backend],
    ) -> None:
        mine = _core.Placement(settings.num_experts, size).experts_of(rank)
        self.rank, self.size = rank, size
        self.settings = settings
        self._open: list[Backend] = []  # the one in use, for what outlives this object
        self._use(backend)
        self._reconnect = reconnect
        self._closed = False
        self.first_expert, self.experts = mine.start, len(mine)
        self.width = min(settings.topk, size)
        self.weight_dtype = settings.weight_dtype
        self.on_host = settings.device.type == "cpu"
        self.stats = dict.fromkeys(_COUNTED, 0)
        self.event: Event | None = None  # of the asynchronous operation issued last, until it is taken
        self._number = next(_numbers)
        _core.when_gone(self, functools.partial(_last_call, self._number, self._open))
        _communicators[self._number] = weakref.ref(self)

    def _use(self, backend: Backend) -> None:
        self.backend, self.core = backend, backend.core
        self._open[:] = [backend]

    def set_timeout(self, seconds: float) -> None:
        """Of later operations."""
        self.settings = replace(self.settings, timeout=seconds)
        self.core.set_timeout(seconds)

    def close(self) -> None:
        """Finish what is under way and tell the other ranks."""
        self._closed = True
        self.backend.close()

    def make_room(self, rows: int, tokens: int = 1) -> None:
        """Take a larger heap where slots hold fewer rows, or ranks may send fewer tokens.

        Every rank calls it at the same operation with the same numbers. What was issued before goes on in the
        old heap, and is done when this returns. Routings stay good: rows keep their numbers. Tensors in the
        old heap stay good too: they keep it.

        Raises:
            ValueError: the communicator was made for fewer and does not grow; or there are too many.
            CommError: as at start-up; or it was closed meanwhile.
        """
        settings = self.settings
        if rows <= settings.capacity_on(self.size) and tokens <= settings.max_tokens:
            return
        if not settings.grows:
            raise ValueError(
                f"a slot is to hold {rows} rows, and ranks to send {tokens} tokens, but the communicator was "
                f"made with capacity={settings.capacity_on(self.size)} and max_tokens={settings.max_tokens}: "
                "make it with as many, or with max_tokens=None"
            )
        settings = settings.with_room(self.size, rows, tokens)
        before = self.backend
        try:
            self._use(self._reconnect(settings, self.core))
        except BaseException as error:
            before.give_up(f"rank {self.rank} could not take a larger heap: {error!r}")
            raise
        self.backend.go_on_from(before)
        self.settings = settings
        self.count(growths=1)
        before.close()  # when all have the new one: closing may wait for ranks that are late
        if self._closed:  # by a signal handler, which knew the old one only
            self.close()
            raise CommError(f"rank {self.rank} has closed this communicator while it took a larger heap")

    def name(self) -> Tensor:
        """A tensor that names this communicator to ops, which take no Python objects, and keeps it.

        A number would be a constant of compiled code, compiled anew for each communicator. A tensor is an
        input, and graphs keep their tensors, with what is attached to them.
        """
        with torch.inference_mode(False):  # backward could not save a tensor made in inference mode
            name = torch.tensor(self._number, device="cpu")
        name.communicator = self  # type: ignore[attr-defined]
        return name

    def count(self, **increments: int) -> None:
        """Add to the statistics."""
        for name, n in increments.items():
            self.stats[name] += n

    def take_event(self) -> Event:
        """The event of the asynchronous operation just issued."""
        event, self.event = self.event, None
        assert event is not None
        return event

    def can_spare_slots(self, count: int) -> bool:
        """Whether results may keep ``count`` more slots: one must stay to receive, one to combine."""
        return self.settings.slots - self.core.slots_in_use - count >= _SLOTS_TO_WORK_WITH

    def view(self, lease: _core.SlotLease, rows: int) -> Tensor:
        """Rows in a slot, which they keep."""
        return torch.from_dlpack(self.core.view(lease, rows))

    def new_rows(self, rows: int) -> Tensor:
        """Memory for rows."""
        return self.backend.new_rows(rows, self.settings.hidden, self.settings.dtype)

    def new_weights(self, given: Tensor | None, rows: int, grouped: bool) -> Tensor:
        """Memory for the weights of received rows; nothing where none were given."""
        if given is None:
            return self.backend.empty(0, dtype=torch.float32)
        shape = (rows,) if grouped else (rows, self.settings.topk)
        return self.backend.empty(*shape, dtype=self.weight_dtype)


def _last_call(number: int, open_backend: list[Backend]) -> None:
    """Close what a communicator leaves behind when it is gone. Calling it twice does no harm."""
    _communicators.pop(number, None)
    open_backend[0].close()


@atexit.register
def _end_of_program() -> None:
    """Close what is open: without waiting for other ranks where an exception has ended the program."""
    _core.close_way_back()  # before operations end: threads that wait in them run no more Python
    failed = None if hasattr(sys, "ps1") else getattr(sys, "last_type", None)
    for c in [found for it in list(_communicators.values()) if (found := it())]:
        try:
            if failed is not None:
                c.core.give_up(f"{failed.__name__} has ended the program of rank {c.rank}")
            c.close()
        except CommError:
            sys.excepthook(*sys.exc_info())


def communicator_of(name: Tensor) -> Communicator:
    """The communicator that an operation is called on.

    Raises:
        CommError: no communicator has that number, or not any more.
        NotImplementedError: forward-mode AD is on, for which operations have no rule.
    """
    refuse_forward_mode()
    number: Any = name.item()
    known = _communicators.get(number)
    found = known() if known else None
    if found is None:
        raise CommError(f"there is no communicator number {number}: it has been closed, and nothing keeps it")
    return found


def refuse_forward_mode() -> None:
    """Raise NotImplementedError where torch would take the tangents of results for zero."""
    if forward_ad._current_level >= 0:
        raise NotImplementedError(
            "dispatch and combine have no forward-mode derivative (torch.func.jvp, forward_ad): use "
            "torch.func.vjp or backward, or call them outside of the dual level"
        )
