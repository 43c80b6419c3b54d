"""What differs between kinds of device: before there is a communicator, a Platform; in one, its Backend."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from commlib import _core
from commlib.event import Event

Facts = dict[str, Any]  # what a rank tells the others of its device
Gather = Callable[[str, Any], list[Any]]  # what all ranks say at a step of start-up, by rank
Span = Callable[[], tuple[float, float]]  # begin and end of what has ended, in seconds after a trace's zero


@dataclass(eq=False)
class Trace:
    """Where the operations of a communicator are noted for one who traces it.

    Attributes:
        zero: the mark whose time is 0.
        notes: name and span of each operation.
    """

    zero: Any
    notes: list[tuple[str, Span]] = field(default_factory=list)


class Backend(ABC):
    """The device of one rank's communicator."""

    device: torch.device
    core: _core.Communicator
    traces: tuple[Trace, ...] = ()  # where operations are noted now
    converts_between_nodes = False  # rows, on their way; on one node every device does
    ordered = True  # a stream orders what reads an operation's results, also of an asynchronous one

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._ints = torch.empty(0, dtype=torch.int64, device=device)

    def empty(self, *shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        """A new tensor on the device."""
        if dtype == torch.int64:
            return self._ints.new_empty(*shape)  # quicker than naming the device
        return torch.empty(shape, dtype=dtype, device=self.device)

    def tensor(self, memory: _core.Memory) -> Tensor:
        """The same memory as a tensor, which keeps it."""
        return torch.from_dlpack(memory)

    @abstractmethod
    def new_rows(self, rows: int, hidden: int, dtype: torch.dtype) -> Tensor:
        """Memory for rows that the user will own."""

    def copied(self, tensor: Tensor) -> Tensor:
        """A copy that includes what communication issued so far writes."""
        return tensor.clone()

    @property
    def idle_bytes(self) -> int:
        """Bytes of results given back and kept for the next ones."""
        return 0

    def make_way(self) -> None:  # noqa: B027
        """Another one is about to take its place, and begins when what is under way here has ended."""

    def go_on_from(self, before: Backend) -> None:
        """Take the place of one of the same rank: its traces go on here."""
        self.traces = before.traces

    def is_captured(self) -> bool:
        """Whether what the caller issues now is captured in a CUDA graph."""
        return False

    def held(self, keep: tuple[Any, ...], plan: tuple[Any, ...], async_op: bool) -> tuple[Any, ...] | None:
        """What the core is to keep until an operation is done, or its graph is gone.

        Args:
            keep: tensors that the operation uses.
            plan: those of them that callers do not know of: the routing's.
            async_op: whether the caller waits for an event.
        """
        return keep if async_op else None

    def synchronize(self) -> None:
        """Wait until all operations are done; raise what was wrong with one."""
        self.core.synchronize()

    def close(self) -> None:
        """Finish what is under way and tell the other ranks."""
        self.core.close()

    @abstractmethod
    def begin_plan(self, awaited: bool) -> None:
        """The plan of the dispatch issued next sees what the caller's work has produced so far.

        Args:
            awaited: the host waits for what it finds.

        Raises:
            CommError: the host cannot wait, because what it does is captured in a CUDA graph.
        """

    @abstractmethod
    def begin(self) -> None:
        """Communication issued next sees what the caller's work has produced so far."""

    def give_up(self, why: str, blamed: Sequence[int] = ()) -> None:
        """Called after an error between plan and rows: other ranks need not wait, and tensors may go.

        Args:
            why: for this rank's later calls.
            blamed: ranks that the others are to blame; none: this one.
        """
        self.core.give_up(why, list(blamed))

    @abstractmethod
    def end(
        self, name: str, ticket: _core.Ticket | None, keep: tuple[Any, ...], async_op: bool
    ) -> Event | None:
        """The caller's work issued next sees the results, or with ``async_op`` after the event only.

        Args:
            name: of the operation.
            ticket: what the core returned.
            keep: tensors that the operation uses. On a GPU their memory must not be reused before it is done;
                on the CPU the core keeps them.
            async_op: whether the caller waits for an event.
        """

    @abstractmethod
    def done(self) -> Event:
        """An event after what the caller's work has come to so far."""

    def record_stream(self, tensor: Tensor, stream: torch.cuda.Stream) -> None:  # noqa: B027
        """``stream`` uses ``tensor`` until it goes, also where its memory is the heap's."""

    @abstractmethod
    def mark(self) -> Any:
        """A moment of the caller's work."""

    @abstractmethod
    def span(self, zero: Any, begun: Any, ended: Any) -> Span:
        """From two marks, in seconds after a third one."""


class Partition(ABC):
    """A device's SMs or cores, divided; see :class:`commlib.SMPartition`.

    Attributes:
        unit: what is divided, "SMs" or "cores".
        comm, compute: how many are for communication, and for compute.
    """

    unit: str
    comm: int
    compute: int

    @abstractmethod
    def claim(self, config: _core.Config) -> None:
        """Let a communicator work on its share for communication."""

    @abstractmethod
    def enter(self) -> None:
        """The calling thread computes on the share for compute."""

    @abstractmethod
    def leave(self) -> None:
        """It computes where it did before."""


@dataclass(frozen=True)
class Wish:
    """What a user asks of a communicator's place on the device.

    Attributes:
        device: with an index, where it is a GPU.
        num_sms: SMs or threads; None: as many as are good.
        partition: to work in.
        itemsize: bytes of an element of a row.
        in_step: operations of ranks that are threads: the host waits for each.
    """

    device: torch.device
    num_sms: int | None
    partition: Partition | None
    itemsize: int
    in_step: bool


class Platform(ABC):
    """A kind of device.

    Attributes:
        name: as in torch.device.
        exchanges_fds: ranks pass each other descriptors of their memory at start-up.
    """

    name: str
    exchanges_fds: bool

    @abstractmethod
    def require(self) -> None:
        """Raise RuntimeError with the reason unless it can be used here."""

    @abstractmethod
    def resolve(self, device: torch.device) -> torch.device:
        """The very device that is meant."""

    @abstractmethod
    def modules(self) -> list[ModuleType]:
        """The compiled modules that work on it."""

    @abstractmethod
    def default_slots(self, heaps: int) -> int:
        """How many slots a heap has unless told otherwise; ``heaps``: bytes of all ranks' with one each."""

    @abstractmethod
    def default_grouped_rows(self, most: int, expected: int) -> int:
        """For how many rows grouped by expert a slot has room unless told otherwise.

        Args:
            most: with which there is always room, unless groups are padded to more than 128 rows.
            expected: where tokens are routed uniformly, and so many that ``capacity`` is used up.
        """

    @abstractmethod
    def rates(self, facts: Facts, alone: bool) -> tuple[float, float | None] | None:
        """GB/s of a rank's memory, and of its link to other ranks (None: it shares their memory); or None.

        Args:
            facts: of the rank.
            alone: no other rank's device is another one.
        """

    @abstractmethod
    def facts(self, device: torch.device) -> Facts:
        """What the other ranks must know of this rank's device."""

    @abstractmethod
    def configure(self, config: _core.Config, wish: Wish, infos: list[Facts], gather: Gather) -> None:
        """Fill in where this rank's communication runs. ``infos``: facts, "host" and "pid" of all ranks."""

    @abstractmethod
    def connectable(self, config: _core.Config, near: list[Facts]) -> _core.Communicator:
        """A communicator that is still to be connected to those near, which share this rank's node."""

    @abstractmethod
    def backend(self, core: _core.Communicator, config: _core.Config, wish: Wish, facts: Facts) -> Backend:
        """What a connected communicator works through."""

    @abstractmethod
    def partition(self, device: torch.device, comm: int) -> Partition:
        """Set ``comm`` SMs or cores apart for communication.

        Raises:
            ValueError: ``comm`` leaves nothing for compute, or is less than 1.
        """

    @abstractmethod
    def rank_thread(self, device: torch.device) -> Callable[[], AbstractContextManager[None]]:
        """What each of several ranks that are threads does its work in; called by the thread before them."""

    @abstractmethod
    def readable(self, tensor: Tensor) -> bool:
        """Whether the host reads its values without waiting for work that is queued."""
