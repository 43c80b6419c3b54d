"""One rank's communicators as operations see them, without the façade that users hold."""

from __future__ import annotations

import atexit
import functools
import itertools
import sys
import threading
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from commlib import _core
from commlib.devices import Backend
from commlib.errors import CommError, ranks_to_blame
from commlib.formats import Kind, Sent, sent_of, viewed
from commlib.settings import Bounds, Settings
from commlib.startup.topology import Topology
from commlib.team import Team, shape_of

_SLOTS_TO_WORK_WITH = 2
_MOST_CALLERS = 255  # whose numbers, from 1, travel in 8 bits
_COUNTED = ("dispatches", "redispatches", "combines", "rows_received", "dropped")

_numbers = itertools.count()
_attachments: dict[int, weakref.ref[Attachment]] = {}


class Communicator:
    """One order of operations of one shape: core, device and sizes.

    ExpertParallels of that shape share it, by an :class:`Attachment` each. It is closed when the last of
    these is closed or gone.

    Attributes:
        uid: the same on all ranks, and no other communicator's.
        number: counts this process's communicators.
        callers: how many attachments the ranks have agreed on so far.
        growths: how often it has taken a larger heap.
    """

    def __init__(
        self,
        rank: int,
        size: int,
        settings: Settings,
        team: Team[Communicator],
        uid: str,
        backend: Backend,
        topology: Topology,
        reconnect: Callable[[Settings, Backend], Backend],
    ) -> None:
        placement = _core.Placement(settings.num_experts, size)
        mine = placement.experts_of(rank)
        self.rank, self.size = rank, size
        self.settings, self.shape = settings, shape_of(settings)
        self.slots = settings.slots_on(size)
        self.team, self.uid, self.number = team, uid, next(_numbers)
        self.topology = topology
        self.backend, self.core = backend, backend.core
        self._reconnect = reconnect
        self.closed = False
        self.callers = self.growths = 0
        self._attached: set[int] = set()
        # Guards whether it is closed and for whom it is open. Garbage collection may detach inside of it.
        self._lock = threading.RLock()
        self.first_expert, self.experts = mine.start, len(mine)
        self._most_experts = max(len(placement.experts_of(r)) for r in range(size))
        self.width = min(settings.topk, size)
        self.own = Sent(Kind(settings.dtype, settings.hidden))
        self.weight_dtype = settings.weight_dtype

    @property
    def attached(self) -> int:
        """How many share it now."""
        return len(self._attached)

    def attach(self) -> Attachment | None:
        """Keep it open for one more; None: no operation can come any more, as far as this rank knows."""
        attachment = Attachment(self)
        if not self.closed and self.core.is_usable:  # now nobody else closes it
            return attachment
        attachment.close()
        return None

    def attached_as(self, number: int) -> None:
        """Keep it open for the attachment of this number."""
        with self._lock:
            self._attached.add(number)

    def detach(self, number: int) -> None:
        """That attachment is closed, or gone; the last one closes the communicator. Twice does no harm."""
        with self._lock:
            self._attached.discard(number)
            last = not self._attached
            self.closed |= last
        if last:
            self.close()

    def set_timeout(self, seconds: float) -> None:
        """Of later operations."""
        self.settings = replace(self.settings, timeout=seconds)
        self.core.set_timeout(seconds)

    def close(self) -> None:
        """Finish what is under way and tell the other ranks, for all that share it."""
        self.closed = True
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
            self.backend = self._reconnect(settings, before)
        except BaseException as error:
            why = f"rank {self.rank} could not take a larger heap: {error!r}"
            before.give_up(why, ranks_to_blame(error))
            raise
        self.core = self.backend.core
        self.backend.go_on_from(before)
        self.settings, self.slots = settings, settings.slots_on(self.size)
        self.growths += 1
        before.close()  # when all have the new one: closing may wait for ranks that are late
        if self.closed:  # by a signal handler, which knew the old one only
            self.close()
            raise CommError(f"rank {self.rank} has closed this communicator while it took a larger heap")

    def can_spare_slots(self, count: int) -> bool:
        """Whether results may keep ``count`` more slots: one must stay to receive, one to combine."""
        return self.slots - self.core.slots_in_use - count >= _SLOTS_TO_WORK_WITH

    def lend_rows(self, rows: int, once: bool) -> Tensor:
        """Room in a slot for rows that a combine is to sum.

        once: good for one combine, which other ranks may still read from when it has returned. Otherwise a
        combine returns when they have, and the tensor is like any other.
        """
        self.backend.begin()
        buffer = self.view(self.core.lend_slot(once), rows)
        self.backend.end("lend a slot", None, (buffer,), False)
        return buffer

    def bounds(self, layout: str, align: int) -> Bounds:
        """For how many rows a bounded dispatch has room: :meth:`commlib.settings.Settings.bounds`."""
        return self.settings.bounds(self.size, self.experts, self._most_experts, layout, align)

    def can_group_in_slot(self, rows: int) -> bool:
        """Whether as many rows grouped by expert may lie in a slot."""
        return self.groups_in_slots and rows <= self.settings.grouped_rows

    @property
    def groups_in_slots(self) -> bool:
        """Whether any may: then they go straight to their places."""
        return self.settings.grouped_rows > 0

    def sent(self, rows: Tensor, scales: Tensor | None = None, quantize: int = 0) -> Sent:
        """What rows and the scales beside them are as they travel."""
        return sent_of(self.own, rows, scales, quantize)

    @property
    def converts(self) -> bool:
        """Whether the core converts rows on their way; otherwise they are converted before."""
        return self.backend.converts_between_nodes or len(self.topology.hosts) == 1

    def view(self, lease: _core.SlotLease, rows: int, sent: Sent | None = None) -> Tensor:
        """Rows in a slot, which they keep; the communicator's own unless ``sent`` says what they are."""
        if sent is None or sent.format.is_own:
            return self.backend.tensor(self.core.view(lease, rows))
        return viewed(self.backend.tensor(self.core.view(lease, rows, sent.format)), sent.rows)

    def view_scales(self, lease: _core.SlotLease, rows: int, sent: Sent) -> Tensor | None:
        """The scales that lie beside rows in a slot, if any do."""
        if sent.scales is None:
            return None
        return viewed(self.backend.tensor(self.core.view(lease, rows, sent.format, True)), sent.scales)

    def new_rows(self, rows: int, sent: Sent | None = None) -> Tensor:
        """Memory for rows."""
        if sent is None or sent.format.is_own:
            return self.backend.new_rows(rows, self.settings.hidden, self.settings.dtype)
        return self.backend.empty(rows, sent.rows.width, dtype=sent.rows.dtype)

    def new_scales(self, rows: int, sent: Sent) -> Tensor | None:
        """Memory for the scales beside them, if there are any."""
        return (
            None
            if sent.scales is None
            else self.backend.empty(rows, sent.scales.width, dtype=sent.scales.dtype)
        )

    def new_weights(self, rows: int, grouped: bool) -> Tensor:
        """Memory for the weights of received rows."""
        shape = (rows,) if grouped else (rows, self.settings.topk)
        return self.backend.empty(*shape, dtype=self.weight_dtype)


class Attachment:
    """One ExpertParallel's part in a communicator that others may share.

    ExpertParallel keeps it, and so does every graph of autograd or torch.compile with one of its operations;
    when it is closed, or the last of them lets go of it, it is detached.

    Attributes:
        communicator: of operations.
        caller: its number among those attached, from 1, the same on all ranks; 0: not agreed on yet.
        stats: counts of its own operations.
    """

    def __init__(self, communicator: Communicator) -> None:
        self.communicator = communicator
        self.caller = 0
        self.stats = dict.fromkeys(_COUNTED, 0)
        self._closed = False
        self._number = next(_numbers)
        # First what lets go of it: a Ctrl-C may come at any moment.
        _core.when_gone(self, functools.partial(_last_call, self._number, communicator))
        _attachments[self._number] = weakref.ref(self)
        communicator.attached_as(self._number)

    def agree(self, caller: int) -> None:
        """Be the attachment of this number, from 1, among all that the ranks have agreed on."""
        self.communicator.callers = caller
        self.caller = (caller - 1) % _MOST_CALLERS + 1

    def close(self) -> None:
        """Issue no more operations; the last one of a communicator closes it."""
        self._closed = True
        self.communicator.detach(self._number)

    def check_open(self) -> None:
        """Raise CommError where it is closed and its communicator, which would say so, is not."""
        if self._closed and not self.communicator.closed:
            rank = self.communicator.rank
            raise CommError(f"rank {rank} cannot use this ExpertParallel any more: it has been closed")

    def name(self) -> Tensor:
        """A tensor that names this attachment to ops, which take no Python objects, and keeps it.

        A number would be a constant of compiled code, compiled anew for each layer. A tensor is an input, and
        graphs keep their tensors, with what is attached to them.
        """
        with torch.inference_mode(False):  # backward could not save a tensor made in inference mode
            name = torch.tensor(self._number, device="cpu")
        name.attachment = self  # type: ignore[attr-defined]
        return name

    def count(self, **increments: int) -> None:
        """Add to the statistics."""
        for name, n in increments.items():
            self.stats[name] += n


def attach_in(team: Team[Communicator], settings: Settings) -> Attachment | None:
    """A part in the team's communicator that was made for these settings, if it has one that can be used."""
    shape = shape_of(settings)
    # The newest first: all ranks have had it. An older one may be closed on some and garbage on others.
    parts = (c.attach() for c in reversed(team.communicators) if c.shape == shape)
    return next((part for part in parts if part is not None), None)


def _last_call(number: int, communicator: Communicator) -> None:
    """Detach what an attachment leaves behind when it is gone. Calling it twice does no harm."""
    _attachments.pop(number, None)
    communicator.detach(number)


@atexit.register
def _end_of_program() -> None:
    """Close what is open: without waiting for other ranks where an exception has ended the program."""
    _core.close_way_back()  # before operations end: threads that wait in them run no more Python
    failed = None if hasattr(sys, "ps1") else getattr(sys, "last_type", None)
    attached = [found for it in list(_attachments.values()) if (found := it())]
    for c in dict.fromkeys(it.communicator for it in attached):
        try:
            if failed is not None:
                c.core.give_up(f"{failed.__name__} has ended the program of rank {c.rank}")
            c.close()
        except (CommError, ValueError):  # ValueError: of a bounded dispatch
            sys.excepthook(*sys.exc_info())


def attachment_of(name: Tensor) -> Attachment:
    """What an operation is called on.

    Raises:
        CommError: no attachment has that number, or not any more.
    """
    number: Any = name.item()
    known = _attachments.get(number)
    found = known() if known else None
    if found is None:
        raise CommError(f"there is no communicator number {number}: it has been closed, and nothing keeps it")
    return found


def refuse_forward_mode() -> None:
    """Raise NotImplementedError where torch would take the tangents of results for zero."""
    if forward_ad._current_level >= 0:
        raise NotImplementedError(
            "dispatch and combine have no forward-mode derivative (torch.func.jvp, forward_ad): use "
            "backward or torch.autograd.grad, or call them outside of the dual level"
        )
