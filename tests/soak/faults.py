"""What goes wrong in a run, and how its ranks may then end."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from soak.plan import Plan

START = -1  # the step before the first: ranks make their communicator
EXIT_STATUS = 7  # of a rank that leaves by os._exit


@dataclass(frozen=True)
class Kind:
    """What a fault means to its rank and to the others.

    Attributes:
        ends: how its own rank may end, beside "right" and with an error that names another fault's rank.
        harms: whether others may end with an error that names its rank.
        hangs: whether the others end only at a deadline.
        planted: no run may have it: it stands for a fault of commlib's.
        at_start: whether it may also come while ranks make their communicator.
    """

    ends: tuple[str, ...] = ()
    harms: bool = True
    hangs: bool = False
    planted: bool = False
    at_start: bool = False


ANY_ERROR = "CommError"  # or a subclass, whichever rank it names
KINDS = {
    "kill": Kind(ends=("signal 9",), at_start=True),
    "stop": Kind(ends=(ANY_ERROR,), hangs=True, at_start=True),  # goes on when all others have ended
    "pause": Kind(harms=False, at_start=True),
    "exit": Kind(ends=(f"status {EXIT_STATUS}",), at_start=True),
    "raise": Kind(ends=("Planned",), at_start=True),
    "interrupt": Kind(ends=("KeyboardInterrupt",), at_start=True),
    "other_call": Kind(ends=(ANY_ERROR,)),
    "close": Kind(),
    "linger": Kind(ends=(ANY_ERROR,), hangs=True, at_start=True),
    "dawdle": Kind(harms=False, at_start=True),
    "fork_use": Kind(harms=False),
    "fork_close": Kind(harms=False),
    "fork_exit": Kind(harms=False),
    "drop": Kind(harms=False),
    "wrong_value": Kind(harms=False, planted=True),
    "hang": Kind(harms=False, planted=True),
}
FAULTS = [name for name, kind in KINDS.items() if not kind.planted]


@dataclass(frozen=True)
class Fault:
    """One thing that goes wrong in one rank."""

    kind: str
    victim: int
    step: int
    middle: bool  # of the step, where operations may be under way, else before it
    delay: float  # seconds until a signal comes
    choice: int  # of what the kind leaves open

    def __str__(self) -> str:
        where = "in" if self.middle else "before"
        step = "the start" if self.step == START else f"step {self.step}"
        late = f" + {self.delay * 1e3:g} ms" if self.delay else ""
        return f"{self.kind} rank {self.victim} {where} {step}{late} ({self.choice})"


@dataclass(frozen=True)
class End:
    """How a process ended.

    Attributes:
        name: "right"; an exception's class; "signal n", "status n", or "hang".
        text: of the exception.
        errors: names of the exception's classes.
        peers: ranks that it names.
        trouble: what else went wrong after it.
        seconds: from the start of the run.
    """

    name: str
    text: str = ""
    errors: tuple[str, ...] = ()
    peers: tuple[int, ...] = ()
    trouble: str = ""
    seconds: float = 0.0

    def __str__(self) -> str:
        more = f"; {self.trouble}" if self.trouble else ""
        return f"{self.name}{': ' if self.text else ''}{self.text}{more} ({self.seconds:.2f} s)"


def blamed(error: BaseException) -> tuple[int, ...]:
    """The ranks that an error names as its cause."""
    if peers := getattr(error, "peers", None):
        return tuple(peers)
    for pattern in (
        r"for ranks? (\d+(?:, \d+)*)",
        r"but rank (\d+) called",
        r"rank (\d+) could not (?:start|take)",
    ):
        if said := re.search(pattern, str(error)):
            return tuple(map(int, said[1].split(", ")))
    return ()


def judge(plan: Plan, ends: list[End]) -> list[str]:
    """What is wrong with the ends of a run's ranks; nothing if all ended as they should."""
    harmful = {fault.victim for fault in plan.faults if KINDS[fault.kind].harms}
    wrong = []
    for rank, end in enumerate(ends):
        own = next((KINDS[fault.kind].ends for fault in plan.faults if fault.victim == rank), ())
        names_a_victim = "CommError" in end.errors and end.peers and set(end.peers) <= harmful
        as_its_fault_has_it = end.name in own or (ANY_ERROR in own and ANY_ERROR in end.errors)
        if not (end.name == "right" or as_its_fault_has_it or names_a_victim):
            wrong.append(f"rank {rank} must not end so")
        if end.trouble:
            wrong.append(f"rank {rank}: {end.trouble}")
    return wrong
