"""Teams: what all communicators of a rank with the same other ranks have in common."""

from __future__ import annotations

import os
import weakref
from dataclasses import replace
from typing import Any, Generic, Protocol, TypeVar

import torch

from commlib import _core
from commlib.settings import Settings
from commlib.startup.conversation import Group
from commlib.weak import WeakMap, WeakSet


class Member(Protocol):
    """What a team asks of its communicators."""

    number: int
    closed: bool

    def set_timeout(self, seconds: float) -> None: ...


M = TypeVar("M", bound=Member)


class Team(Generic[M]):
    """The communicators of one rank with the same others, on one device.

    Each has an order of operations, and memory, of its own. They have one timeout, and give up together: who
    waits for a rank in one of them hears of its failure in any other. Communicators keep their team.

    Attributes:
        uid: the same on all its ranks, and no other team's.
        timeout: seconds that a rank waits for a peer.
        core: by which they give up together.
    """

    def __init__(self, uid: str, timeout: float) -> None:
        self.uid, self.timeout = uid, timeout
        self.core = _core.Team()
        self._members: WeakSet[M] = WeakSet()

    @property
    def communicators(self) -> list[M]:
        """Those that are open, the oldest first."""
        return sorted((c for c in self._members if not c.closed), key=lambda c: c.number)

    def add(self, communicator: M) -> None:
        """Take in one that is connected, on all ranks."""
        self._members.add(communicator)

    def set_timeout(self, seconds: float) -> None:
        """Of later operations of all its communicators."""
        self.timeout = seconds
        for communicator in self.communicators:
            communicator.set_timeout(seconds)

    def check_timeout(self, seconds: float | None) -> None:
        """Raise ValueError where another timeout is asked for than the team has; None: any will do."""
        if seconds is not None and seconds != self.timeout:
            raise ValueError(
                f"timeout={seconds:g}, but communicators of the same ranks are open whose timeout is "
                f"{self.timeout:g}, and they have one: leave it out, or set ep.timeout later, for all. "
                "exclusive=True gives this ExpertParallel a timeout of its own"
            )


def shape_of(settings: Settings) -> Settings:
    """What ExpertParallels that share a communicator have in common: all that was asked for but timeouts."""
    return replace(settings, timeout=0.0, grouped_rows=0)


_Key = tuple[int, int, int, torch.device]  # process, rank, size, device

# The newest team of each group, by the group's origin: groups that stand for the same ranks have one origin,
# rank and size. Communicators keep their team, this does not. A forked child finds none of its parent's.
_teams: WeakMap[object, dict[_Key, weakref.ref[Team[Any]]]] = WeakMap()


def find_team(group: Group, device: torch.device) -> Team[Any] | None:
    """This rank's team of the group, if it can be used: it has open communicators, and none has given up."""
    ref = _teams.get(group.origin, {}).get(_key(group, device))
    team = ref() if ref else None
    return team if team and team.communicators and not team.core.has_given_up else None


def keep_team(group: Group, device: torch.device, team: Team[Any]) -> None:
    """Let it be found from now on, as long as a communicator of it is there."""
    _teams.setdefault(group.origin, {})[_key(group, device)] = weakref.ref(team)


def _key(group: Group, device: torch.device) -> _Key:
    return os.getpid(), group.rank, group.size, device
