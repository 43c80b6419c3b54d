"""What ranks say to each other at start-up: gathers of a few bytes, with a deadline, and reports of failures.

Ranks that start talk in a :class:`Conversation`. A rank that fails, at whatever place, says so before it
leaves, and the others raise that instead of waiting. In a :class:`PostingGroup`, which leaves what ranks say
where the others find it, they hear it at once, even while they wait for another rank.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import resource
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeAlias

from commlib.errors import CommError, PeerTimeout, ranks_to_blame

_PATIENCE = 300.0  # seconds for a gather outside of start-up
NOTHING: Any = object()  # has been posted yet
_SHORTEST_PAUSE, _LONGEST_PAUSE = 1e-4, 2e-2  # seconds between looks for what others post
_VALUE, _FAILURE = b"=", b"!"  # first byte of what a user's own group carries


class Group(ABC):
    """Ranks that communicate. Subclass it to bootstrap over something else.

    A subclass sets ``rank`` and ``size``, and gathers bytes. What comes is read as JSON and checked, never
    unpickled.
    """

    rank: int
    size: int
    device: str | None = None  # that ExpertParallel uses unless told otherwise; None: it chooses

    @property
    def origin(self) -> object:
        """What stands for these ranks, and lasts as long as they belong together.

        ExpertParallels of one shape over groups of one origin, rank and size share a communicator.
        """
        return self

    @abstractmethod
    def allgather(self, data: bytes) -> list[bytes]:
        """Gather some bytes from each rank, by rank. Every rank calls it, in the same order; lengths differ.

        It bounds itself: commlib cannot end it. Where a rank does not come it should raise after some time;
        ExpertParallel passes that on. commlib's own groups wait until ``startup_timeout``.
        """

    def barrier(self) -> None:
        """Return when every rank has called it."""
        self.allgather(b"")

    def converse(self, seconds: float, name: str = "") -> Conversation:
        """A conversation of this group, which ends after ``seconds`` if the group can see to it.

        Where ranks find what is posted by its name, named conversations run beside others, in any order.

        Args:
            seconds: until gathers raise PeerTimeout.
            name: without blanks, used for one conversation only; "": the next one on each rank.
        """
        return _Plain(self, seconds)


# Of a rank, as the core says it: "exited", "lost" or "departed", and the ranks to blame. None: it may come.
Watch: TypeAlias = "Callable[[int], tuple[str, list[int]] | None]"


class Conversation(Group):
    """A sequence of gathers, the same on all ranks; a context manager.

    A rank that leaves it by an exception tells the others, whose next gather raises CommError with its text.

    Args:
        group: the ranks that talk.
        seconds: from now until gathers raise PeerTimeout.

    Attributes:
        task, advice: what errors say this is for, and what to do where ranks do not come.
        watch: tells whether a rank will never come; None: that is not known.
        name: the same on all ranks, used for no other conversation; "" over a group that only gathers.
    """

    task = "start"
    advice = (
        "Do all ranks run, and construct the same ExpertParallel at this place? startup_timeout= allows more "
        "time"
    )
    watch: Watch | None = None
    name = ""

    def __init__(self, group: Group, seconds: float) -> None:
        self.group, self.seconds = group, seconds
        self.rank, self.size, self.device = group.rank, group.size, group.device
        self._end = time.monotonic() + seconds
        # No rank is left to hear of a failure: all have heard of one, or the group is lost.
        self.over = False
        self._absent: list[int] = []  # ranks that this one has stopped waiting for

    @property
    def left(self) -> float:
        """Seconds until its deadline, or 0."""
        return max(0.0, self._end - time.monotonic())

    def hear(self) -> None:
        """Raise another rank's failure that has been reported, if that can be known without waiting."""

    @abstractmethod
    def tell(self, why: str, missing: Sequence[int], blamed: Sequence[int]) -> None:
        """Tell the others that this rank joins no further gather, maybe because ranks were missing.

        Args:
            why: for them.
            missing: ranks that it no longer waits for; one that comes later need not look for others here.
            blamed: ranks to blame for that; none: this one.
        """

    def __enter__(self) -> Conversation:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if error is None:
            return
        limit = _about_files(error)
        if not self.over:
            self.over = True
            blamed = ranks_to_blame(error)
            missing = self._absent or (blamed if isinstance(error, PeerTimeout) else [])
            text = f"rank {self.rank} could not {self.task}: {type(error).__name__}: {error}{limit}"
            # The first error is the one that matters.
            with _a_file_to_spare(), contextlib.suppress(Exception):
                self.tell(text, missing, blamed)
        if limit:
            raise CommError(f"{error}{limit}", peers=ranks_to_blame(error)) from error


def _about_files(error: BaseException) -> str:
    """More about an error that too many open files caused, or nothing."""
    full = isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE)
    if not full and (os.strerror(errno.EMFILE) not in str(error) or "ulimit -n" in str(error)):
        return ""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return (
        f". This process has as many open files as it may, {soft} (ulimit -n; at most {hard} without the "
        "administrator). Allow more, close communicators that are done with, or let layers share one"
    )


# Open from the beginning, and given up while ranks talk: a rank that has run out of open files can still
# tell the others, even where its group needs a file for that.
_spare: list[int] = []


def _take_spare() -> None:
    with contextlib.suppress(OSError):
        _spare.append(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))


_take_spare()


@contextlib.contextmanager
def _a_file_to_spare() -> Iterator[None]:
    given = _spare.pop() if _spare else None
    if given is not None:
        os.close(given)
    try:
        yield
    finally:
        if given is not None:
            _take_spare()


_ABSENT = {
    "exited": ("the process of {} has exited", "the processes of {} have exited"),
    "lost": ("the connection to {} was lost", "the connections to {} were lost"),
    "departed": ("{} closed the communicator or failed",) * 2,
}


def about_absent(ranks: Iterable[int], watch: Watch) -> tuple[str, list[int]] | None:
    """Text about those of the ranks that will never come, and whom to blame for that; None: all may come."""
    absent = {rank: found for rank in ranks if (found := watch(rank))}
    if not absent:
        return None
    said = []
    for why, phrases in _ABSENT.items():
        if those := [rank for rank, (found, _) in absent.items() if found == why]:
            said.append(phrases[len(those) > 1].format(_named(those)))
    given_up: dict[str, list[int]] = {}
    for rank, (_, blamed) in absent.items():
        if blamed != [rank]:
            given_up.setdefault(_named(blamed), []).append(rank)
    said += [f"{_named(those)} had given up on {others}" for others, those in given_up.items()]
    return "; ".join(said), sorted({rank for _, blamed in absent.values() for rank in blamed})


def _named(ranks: Iterable[int]) -> str:
    names = [str(rank) for rank in ranks]
    return ("rank " if len(names) == 1 else "ranks ") + ", ".join(names)


def gather(group: Group, step: str, value: Any) -> list[Any]:
    """Gather what JSON can express; tuples come as lists.

    Args:
        group: or a conversation of one.
        step: what is gathered, for errors.
        value: of this rank.

    Raises:
        CommError: another rank has failed, or said something other than JSON.
        PeerTimeout: ranks did not come before the conversation's deadline.
    """
    try:
        said = group.allgather(json.dumps(value).encode())
    except PeerTimeout as error:
        text = f"at step {step}: {error}"
        raise PeerTimeout(text, error.rank, error.peers, error.op, step, error.epoch) from None
    values = []
    for rank, data in enumerate(said):
        try:
            values.append(json.loads(bytes(data)))
        except (TypeError, ValueError):
            start = bytes(data[:40])
            raise CommError(
                f"at step {step}: rank {rank} said {start!r}. Is it of another version of commlib, or "
                "did it come to another gather of the group?",
                peers=[rank],
            ) from None
    return values


class _Plain(Conversation):
    """Over a group known only to gather. All ranks must gather to hear of a failure."""

    def allgather(self, data: bytes) -> list[bytes]:
        said = self._gather(_VALUE + data)
        wrong = [what for what in said if not isinstance(what, bytes | bytearray | memoryview)]
        if wrong or len(said) != self.size:
            self.over = True
            found = f"{len(said)} things" + "".join(
                f", a {type(what).__name__} among them" for what in wrong[:1]
            )
            name = type(self.group).__name__
            raise TypeError(f"{name}.allgather must return bytes of {self.size} ranks, it gave {found}")
        for rank, what in enumerate(said):
            if bytes(what[:1]) == _FAILURE:
                self.over = True
                raise CommError(bytes(what[1:]).decode(errors="replace"), peers=[rank])
        return [what[1:] for what in said]

    def tell(self, why: str, missing: Sequence[int], blamed: Sequence[int]) -> None:
        self._gather(_FAILURE + why.encode())

    def _gather(self, data: bytes) -> list[bytes]:
        try:
            with _a_file_to_spare():
                return self.group.allgather(data)
        except BaseException:
            self.over = True  # the group may be in any state now, and another gather might not return
            raise


class PostingGroup(Group):
    """Ranks that leave what they say where the others find it.

    So gathers know which ranks are missing, and any waiting rank finds a failure, whichever it waits for.
    """

    found: Sequence[str] = ()  # keys of the last gather: all have seen them when the next one is complete

    def allgather(self, data: bytes) -> list[bytes]:
        """Gather some bytes from each rank, by rank. Every rank calls it.

        Raises:
            PeerTimeout: a rank did not come within 300 s.
            CommError: a rank is gone.
        """
        with self.converse(_PATIENCE) as conversation:
            return conversation.allgather(data)

    def converse(self, seconds: float, name: str = "") -> Conversation:
        return _Posted(self, seconds, name)

    @abstractmethod
    def open(self, seconds: float) -> int:
        """The number of this rank's next conversation, from 1. May wait ``seconds`` to reach the others."""

    @abstractmethod
    def post(self, key: str, data: bytes) -> None:
        """Leave it where every rank finds it."""

    @abstractmethod
    def find(self, key: str) -> Any:
        """The bytes that a rank has posted, or NOTHING."""

    def pause(self, waited: float, left: float) -> None:
        """Wait until something may have been posted, at most ``left``, after ``waited`` seconds already."""
        time.sleep(min(left, max(_SHORTEST_PAUSE, min(_LONGEST_PAUSE, waited / 10))))

    @abstractmethod
    def drop(self, keys: Sequence[str]) -> None:
        """Forget these keys, one for each rank: all have found what is under them."""

    def why_gone(self, ranks: Iterable[int]) -> tuple[int, str] | None:
        """One of these ranks that will post nothing more, and why, where that is known."""
        return None


class _Posted(Conversation):
    """One of a posting group's conversations, which have the same numbers on all ranks."""

    group: PostingGroup

    def __init__(self, group: PostingGroup, seconds: float, name: str) -> None:
        super().__init__(group, seconds)
        self._step = 0
        self._skipped = ""
        self._found: Sequence[str] = ()
        self._numbered = not name
        if name:
            self.name = name
            return
        self.name = str(group.open(self.left))
        # A rank that never came to a conversation finds that the others gave up waiting for it. If they try
        # again, they do so in the next one.
        while group.rank in self._ending().get("missing", ()):
            self._skipped = f". Before that, {self._ending()['why']}"
            self.name = str(group.open(self.left))

    def allgather(self, data: bytes) -> list[bytes]:
        keys = self._keys(self._step)
        self.group.post(keys[self.rank], data)
        began = time.monotonic()
        said: list[Any] = [NOTHING] * self.size
        said[self.rank] = data
        while missing := self._look(keys, said):
            # In this order: a rank that fails says so before it departs.
            hopeless, ended = self._error_if_hopeless(missing), self._error_if_ended(missing)
            if not (error := ended or hopeless):
                self.group.pause(time.monotonic() - began, self.left)
            elif self._look(keys, said) == missing:  # a rank that is gone may have posted before it went
                self.over = ended is not None
                self._absent = [
                    rank for rank in missing if self.left == 0 or (self.watch and self.watch(rank))
                ]
                raise error
        if self._numbered:
            self.group.drop(self.group.found)
            self.group.found = keys
        else:  # other conversations may be under way, whose keys some ranks still look for
            self.group.drop(self._found)
            self._found = keys
        self._step += 1
        return said

    def _look(self, keys: list[str], said: list[Any]) -> list[int]:
        """Find what has not been found yet, and return the ranks of which there is nothing."""
        said[:] = [self.group.find(keys[r]) if what is NOTHING else what for r, what in enumerate(said)]
        return [rank for rank, what in enumerate(said) if what is NOTHING]

    def hear(self) -> None:
        if error := self._error_if_ended(()):
            self.over = True
            raise error

    def tell(self, why: str, missing: Sequence[int], blamed: Sequence[int]) -> None:
        said = [why, list(missing), list(blamed) or [self.rank]]
        self.group.post(self._ended, json.dumps(said).encode())

    def _error_if_ended(self, missing: Sequence[int]) -> CommError | None:
        """The error where another rank has ended it, or one of ``missing`` is gone."""
        if ending := self._ending():
            if ending["missing"]:
                return self._timeout(ending["why"], ending["blamed"])
            return CommError(ending["why"] + self._skipped, peers=ending["blamed"])
        if gone := self.group.why_gone(missing):
            return CommError(gone[1] + self._skipped, peers=[gone[0]])
        return None

    def _error_if_hopeless(self, missing: list[int]) -> PeerTimeout | None:
        """The error where it has waited long enough for these ranks, or their processes are gone."""
        if self.left == 0:
            text = f"{_named(missing)} did not come within {self.seconds:g} s{self._skipped}. {self.advice}"
            return self._timeout(text, missing)
        if self.watch and (absent := about_absent(missing, self.watch)):
            return self._timeout(*absent)
        return None

    def _timeout(self, text: str, peers: list[int]) -> PeerTimeout:
        return PeerTimeout(text, self.rank, peers, "start-up", "gather", 0)

    @property
    def _ended(self) -> str:
        return f"{self.name}/ended"

    def _ending(self) -> dict[str, Any]:
        """How it has ended, if it has: what a rank told the others. See tell."""
        said = self.group.find(self._ended)
        if said is NOTHING:
            return {}
        try:
            why, missing, blamed = json.loads(said)
            return {"why": str(why), "missing": [*map(int, missing)], "blamed": [*map(int, blamed)]}
        except (TypeError, ValueError):
            return {
                "why": f"start-up has ended with {bytes(said[:40])!r}",
                "missing": [],
                "blamed": [],
            }

    def _keys(self, step: int) -> list[str]:
        return [f"{self.name}/{step}/{rank}" for rank in range(self.size)]
