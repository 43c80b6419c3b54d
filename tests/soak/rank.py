"""One rank of a run: a process that takes the plan's steps, and in which its faults happen."""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import torch.distributed as dist
from whole_files import write_whole

import commlib
from commlib.startup.group import StoreGroup
from soak.faults import EXIT_STATUS, START, End, Fault, blamed
from soak.plan import Plan
from soak.steps import Reference, Step

NOTICE = 8  # bytes with which a rank asks for a signal
CHILD_SECONDS = 15.0


def serve_store(place: Path) -> dist.TCPStore:
    """The store over which ranks meet, as torchrun serves it: no rank can stop while it holds its lock."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    write_whole(place / "port", str(store.port).encode())
    return store


def connect_to_store(place: Path) -> dist.TCPStore:
    while not (place / "port").exists():
        time.sleep(0.001)
    return dist.TCPStore("127.0.0.1", int((place / "port").read_text()), wait_for_workers=False)


class Planned(Exception):
    """An error that the program itself raises."""


class Leaves(BaseException):
    """Ends a rank that has closed before the others."""


class Child(SystemExit):
    """Ends a process that a rank has forked."""


class Rank:
    """One rank of a run.

    Args:
        place: a directory of the run.
        notices: where to write for a signal.
    """

    def __init__(self, plan: Plan, rank: int, place: Path, notices: int) -> None:
        self.plan, self.rank, self.place, self.notices = plan, rank, place, notices
        self.faults = [fault for fault in plan.faults if fault.victim == rank]
        self.exits = plan.leave == "exit" and rank == plan.seed % plan.ranks  # all would take seconds
        self.begun = time.monotonic()
        self.pid = os.getpid()
        self.children: list[int] = []
        self.trouble: list[str] = []
        self.ep: commlib.ExpertParallel | None = None

    def run(self) -> None:
        """The whole rank; writes how it ended."""
        sys.unraisablehook = self._note_ignored
        try:
            end = self._end()
            gc.collect()  # what was dropped is closed
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        except KeyboardInterrupt as late:  # it had ended, and was about to write so
            end = End(type(late).__name__)
        for child in self.children:
            self._reap(child)
        said = {"trouble": "; ".join(self.trouble), "seconds": time.monotonic() - self.begun}
        write_whole(self.place / f"end.{self.rank}", json.dumps(asdict(end) | said).encode())
        if self.exits:
            sys.exit()
        os._exit(0)

    def _note_ignored(self, it: sys.UnraisableHookArgs) -> None:
        """Python drops an error, also a Ctrl-C that comes in a callback of its own or PyTorch's."""
        frames = traceback.walk_tb(it.exc_traceback)
        ours = any(frame.f_globals.get("__name__", "").startswith("commlib") for frame, _ in frames)
        if ours or not isinstance(it.exc_value, KeyboardInterrupt):
            self.trouble.append(f"ignored: {it.exc_value!r} in {it.object!r}")

    def _end(self) -> End:
        """How its work ends."""
        try:
            self._work()
        except Child:
            raise
        except Leaves:
            pass
        except BaseException as error:
            names = tuple(kind.__name__ for kind in type(error).__mro__)
            self._expect_refusal(error)
            return End(names[0], str(error), names, blamed(error))
        return End("right")

    def _work(self) -> None:
        reference = Reference(self.plan, self.rank)
        with self._communicator() as ep:
            for number in range(len(self.plan.steps)):
                faults = [fault for fault in self.faults if fault.step == number]
                self._happen([fault for fault in faults if not fault.middle])
                self._step(number, reference, ep, faults)

    def _step(
        self, number: int, reference: Reference, ep: commlib.ExpertParallel, faults: list[Fault]
    ) -> None:
        def middle() -> None:
            self._happen([fault for fault in faults if fault.middle])

        drops = any(fault.kind == "drop" for fault in faults)
        step = Step(self.plan, self.rank, number, reference, ep, middle, drops)
        if any(fault.kind == "wrong_value" for fault in faults):
            step.x += 1
        step.run()

    @contextlib.contextmanager
    def _communicator(self) -> Iterator[commlib.ExpertParallel]:
        plan = self.plan
        if plan.network:
            os.environ["UCX_TLS"] = plan.network
        self._happen([fault for fault in self.faults if fault.step == START])
        store = connect_to_store(self.place)
        worlds = plan.worlds()
        capacity = None if plan.seed % 4 == 1 else plan.capacity(worlds)
        sizes = {"max_tokens": None, "capacity": 1} if plan.grows else {"capacity": capacity}
        self.ep = commlib.ExpertParallel(
            StoreGroup(store, self.rank, plan.ranks),
            **worlds[0].config() | sizes | {"timeout": plan.start_timeout},
            slots=plan.slots,
            num_sms=plan.sms,
            routing=plan.routing,
            ranks_per_node=plan.node,
            grouping="once" if plan.seed % 3 == 0 else "auto",
        )
        self.ep.timeout = plan.timeout
        if plan.leave == "with":
            with self.ep:
                yield self.ep
            return
        try:
            yield self.ep
        finally:
            if plan.leave == "close" or (plan.leave == "exit" and not self.exits):
                self.ep.close()
            elif plan.leave == "drop":
                self.ep = None  # _work has the last reference

    def _expect_refusal(self, error: BaseException) -> None:
        """A communicator is of no use after an error, and says so."""
        if self.ep is None or not isinstance(error, commlib.CommError):
            return
        try:
            world = self.plan.worlds()[0]
            self.ep.dispatch(world.x[self.rank], world.topk_idx[self.rank])
            self.trouble.append("used after an error, it did not refuse")
        except Exception as error:
            if not isinstance(error, commlib.CommError):
                self.trouble.append(f"used after an error, it said {error!r}")

    # -- faults

    def _happen(self, faults: list[Fault]) -> None:
        for fault in faults:
            getattr(self, f"_{fault.kind}")(fault)

    def _ask_for_signal(self, fault: Fault) -> None:
        os.write(self.notices, self.rank.to_bytes(NOTICE, "little"))

    _kill = _stop = _pause = _interrupt = _ask_for_signal

    def _exit(self, fault: Fault) -> None:
        os._exit(EXIT_STATUS)

    def _raise(self, fault: Fault) -> None:
        raise Planned("an exception of the program's own")

    def _other_call(self, fault: Fault) -> None:
        world = self.plan.worlds()[0]
        self.ep.dispatch(world.x[self.rank], world.topk_idx[self.rank], overflow="drop")

    def _close(self, fault: Fault) -> None:
        """Closes; half of them stay until the others have ended."""
        self.ep.close()
        if fault.choice % 2:
            while not (self.place / "over").exists():
                time.sleep(0.01)
        raise Leaves

    def _linger(self, fault: Fault) -> None:
        time.sleep(1.7 * (self.plan.start_timeout if fault.step == START else self.plan.timeout))

    def _dawdle(self, fault: Fault) -> None:
        time.sleep(0.05 * (1 + fault.choice))

    def _drop(self, fault: Fault) -> None:
        """The step does it."""

    _wrong_value = _drop

    def _hang(self, fault: Fault) -> None:
        time.sleep(3600)

    def _fork_use(self, fault: Fault) -> None:
        def use() -> str:
            world = self.plan.worlds()[0]
            try:
                if fault.choice % 2:
                    self.ep.synchronize()
                self.ep.dispatch(world.x[self.rank], world.topk_idx[self.rank])
            except commlib.CommError:
                return ""
            return "no error in a forked child"

        self._fork(fault, use)

    def _fork_close(self, fault: Fault) -> None:
        def close() -> str:
            self.ep.close()
            return ""

        self._fork(fault, close)

    def _fork_exit(self, fault: Fault) -> None:
        self._fork(fault, lambda: "")

    def _fork(self, fault: Fault, act: Callable[[], str]) -> None:
        """A child that acts, and ends in Python's way or at once; half of them while the rank goes on."""
        self.children.append(os.fork())
        if self.children[-1]:
            if fault.choice // 2:
                self._reap(self.children.pop())
            return
        signal.alarm(int(4 * CHILD_SECONDS))  # the rank may die meanwhile
        try:
            said = act()
        except BaseException as error:
            said = f"a forked child got {error!r}"
        if said:
            print(said, file=sys.stderr, flush=True)
        if said or fault.kind != "fork_exit" or fault.choice % 2:
            os._exit(1 if said else 0)
        raise Child

    def _reap(self, child: int) -> None:
        limit = time.monotonic() + CHILD_SECONDS
        while not (ended := os.waitpid(child, os.WNOHANG))[0]:
            if time.monotonic() > limit:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                self.trouble.append(f"its forked child had not ended after {CHILD_SECONDS:g} s")
                return
            time.sleep(0.002)
        if ended[1]:
            self.trouble.append(f"its forked child ended with status {os.waitstatus_to_exitcode(ended[1])}")


def be_rank(plan: Plan, rank: int, place: Path, notices: int) -> None:
    """The whole life of a process forked to be a rank: it returns only to exit."""
    said = os.open(place / f"said.{rank}", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(said, 1)
    os.dup2(said, 2)
    faulthandler.enable(2)
    faulthandler.register(signal.SIGUSR1, file=2, all_threads=True)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # also where it was ignored
    gc.freeze()
    Rank(plan, rank, place, notices).run()
