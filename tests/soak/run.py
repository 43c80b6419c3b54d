"""One run: its ranks are forked, their faults happen, and how each ended is judged."""

from __future__ import annotations

import ctypes
import json
import os
import select
import shutil
import signal
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

from soak.faults import End, judge
from soak.plan import Plan
from soak.rank import NOTICE, be_rank, serve_store

LIMIT = 25.0  # seconds for a run beside what its faults themselves take
_TICK = 0.005
_SIGNALS = {
    "kill": signal.SIGKILL,
    "stop": signal.SIGSTOP,
    "pause": signal.SIGSTOP,
    "interrupt": signal.SIGINT,
}


def _shortened(lines: list[str], least: int = 30) -> list[str]:
    """The first and the last lines of many: a sanitizer begins with what matters, Python ends with it."""
    return lines if len(lines) <= 2 * least else [*lines[:least], "...", *lines[-least:]]


def end_with_parent() -> None:
    """This process is killed when its parent ends."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    ends: list[End]
    wrong: list[str]
    seconds: float


class Run:
    """The processes of a run."""

    def __init__(self, plan: Plan, limit: float, verbose: bool = False) -> None:
        self.plan, self.limit, self.verbose = plan, limit, verbose
        self.place = Path(tempfile.mkdtemp(prefix="commlib-soak-"))
        self.notices, self._write_end = os.pipe()
        self.alive: dict[int, int] = {}  # rank: process
        self.status: dict[int, int] = {}
        self.due: list[tuple[float, int, int]] = []  # when, to which rank, which signal

    def run(self) -> Outcome:
        begun = time.monotonic()
        self._fork()
        store = serve_store(self.place)  # has threads, and so comes after the ranks
        while self.alive and time.monotonic() - begun < self.limit:
            self._look()
        hung = list(self.alive)
        self._end_all()
        del store
        seconds = time.monotonic() - begun
        ends = [self._end_of(rank, rank in hung) for rank in range(self.plan.ranks)]
        outcome = Outcome(ends, judge(self.plan, ends), seconds)
        if outcome.wrong or self.verbose:
            self._tell(outcome)
        shutil.rmtree(self.place)
        return outcome

    def _fork(self) -> None:
        for rank in range(self.plan.ranks):
            pid = os.fork()
            if pid == 0:
                end_with_parent()
                try:
                    be_rank(self.plan, rank, self.place, self._write_end)
                except Exception:
                    traceback.print_exc()
                    os._exit(1)
            self.alive[rank] = pid
        os.close(self._write_end)

    def _look(self) -> None:
        """Wait a little, read what ranks ask for, and see which have ended."""
        if select.select([self.notices], [], [], _TICK)[0]:
            asked = os.read(self.notices, NOTICE)
            if asked:
                self._schedule(int.from_bytes(asked, "little"))
            else:  # all ranks have ended, or are about to
                time.sleep(_TICK)
        now = time.monotonic()
        for when, rank, number in [due for due in self.due if due[0] <= now]:
            self.due.remove((when, rank, number))
            self._send(rank, number)
        for rank, pid in list(self.alive.items()):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                del self.alive[rank]
                self.status[rank] = os.waitstatus_to_exitcode(status)
        self._let_go()

    def _schedule(self, rank: int) -> None:
        fault = next(f for f in self.plan.faults if f.victim == rank)
        when = time.monotonic() + fault.delay
        self.due.append((when, rank, _SIGNALS[fault.kind]))
        if fault.kind == "pause":
            self.due.append((when + 0.05 * (1 + fault.choice), rank, signal.SIGCONT))

    def _send(self, rank: int, number: int) -> None:
        if rank in self.alive:
            os.kill(self.alive[rank], number)

    def _let_go(self) -> None:
        """Let ranks go on that stay until the others have ended."""
        stay = [f for f in self.plan.faults if f.kind == "stop" or (f.kind == "close" and f.choice % 2)]
        waiting = {fault.victim for fault in stay}
        if self.alive and set(self.alive) <= waiting:
            (self.place / "over").touch()
            for rank in self.alive:
                self._send(rank, signal.SIGCONT)

    def _end_all(self) -> None:
        for number, seconds in ((signal.SIGCONT, 0.0), (signal.SIGUSR1, 0.5), (signal.SIGKILL, 0.0)):
            for rank in self.alive:
                self._send(rank, number)
            if self.alive:
                time.sleep(seconds)
        for pid in self.alive.values():
            os.waitpid(pid, 0)
        os.close(self.notices)

    def _end_of(self, rank: int, hung: bool) -> End:
        if hung:
            return End("hang", seconds=self.limit)
        written = self.place / f"end.{rank}"
        said = json.loads(written.read_text()) if written.exists() else None
        status = self.status[rank]
        if status == 0 and said:
            return End(**said | {"errors": tuple(said["errors"]), "peers": tuple(said["peers"])})
        name = f"signal {-status}" if status < 0 else f"status {status}"
        return End(name, text="" if said is None else f"after {said['name']}")

    def _tell(self, outcome: Outcome) -> None:
        """Print what a reader needs to know of a run that went wrong."""
        how = f"FAILED seed {self.plan.seed}: {'; '.join(outcome.wrong)}"
        lines = [how if outcome.wrong else f"seed {self.plan.seed}", f"  plan: {self.plan}"]
        for rank, end in enumerate(outcome.ends):
            lines.append(f"  rank {rank}: {end}")
            said = (self.place / f"said.{rank}").read_text(errors="replace").strip()
            lines += [f"    | {line}" for line in _shortened(said.splitlines())]
        print("\n".join(lines), flush=True)
