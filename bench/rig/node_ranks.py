"""The ranks of a rig's nodes, which meet without using a link, and count what crosses theirs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from bench.harness.launch import SETTLE_SECONDS, Launch
from bench.rig.netns import own_link
from commlib.cli.measuring import Interval, timed

POLL_SECONDS = 0.001

Traffic = tuple[int, int]  # bytes that this rank's node sent and received


class Meeting:
    """Where ranks that share a host meet: a file with a place for each, mapped by all.

    It uses no link. A rank may be one round ahead of another, so two rounds have places.
    """

    def __init__(self, path: Path, rank: int, size: int) -> None:
        self._rank, self._round = rank, 0
        self._places = np.memmap(path, np.float64, "r+", shape=(3, size))

    @staticmethod
    def create(path: Path, size: int) -> None:
        np.zeros((3, size)).tofile(path)

    def latest(self, moment: float, meanwhile: Callable[[], Any]) -> float:
        """The latest of all ranks' moments, once all have come."""
        self._round += 1
        rounds, moments = self._places[2], self._places[self._round % 2]
        moments[self._rank] = moment
        rounds[self._rank] = self._round
        while rounds.min() < self._round:
            meanwhile()
            time.sleep(POLL_SECONDS)
        return float(moments.max())


@dataclass(frozen=True)
class NodesLaunch(Launch):
    """Ranks of several nodes on one host. Their fences leave the links alone, and the bytes that an operation
    sends over its node's link are noted."""

    nodes: int = 1
    meeting: Meeting | None = None
    noted: list[Traffic] = field(default_factory=list)

    @property
    def ranks_per_node(self) -> int:
        return self.size // self.nodes

    @property
    def node(self) -> int:
        return self.rank // self.ranks_per_node

    def fence(self) -> None:
        _sleep_until(self._agreed_moment())

    def fenced(self, operation: Callable[[], Any]) -> tuple[Interval, Any]:
        moment = self._agreed_moment()
        before = own_link()  # no rank sends now: all have come, and none goes on before the moment
        _sleep_until(moment)
        interval, result = timed(operation)
        self.fence()  # TCP's last acknowledgements are over, too
        sent, received = (now - then for now, then in zip(own_link(), before, strict=True))
        self.noted.append((sent, received))
        return interval, result

    def _agreed_moment(self) -> float:
        """A moment shortly after all have come here."""
        assert self.meeting is not None
        # MPI moves messages that it has accepted only while it is called.
        progress = (lambda: None) if self.comm is None else self.comm.Iprobe
        return self.meeting.latest(time.monotonic() + SETTLE_SECONDS, progress)


def busiest_bytes(per_node: list[list[list[int]]]) -> float:
    """The median of what the busiest direction of any node's link carried in an operation."""
    return statistics.median(max(map(max, iteration)) for iteration in zip(*per_node, strict=True))


def _sleep_until(moment: float) -> None:
    time.sleep(max(moment - time.monotonic(), 0.0))
