"""Runs a command that may hang, crash or leave processes behind, and is done with it when its time is up.

A command and all that it starts are found as descendants of this process, to which Linux is told to give
orphans. They are ended in four steps: the processes are listed; Pythons get SIGABRT, on which faulthandler
writes the stack of every thread; then SIGTERM for all; then SIGKILL.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import selectors
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

PASSED, FAILED, CUT, NOT_RUN = "passed", "failed", "cut", "not run"
STACKS, GRACE, LAST = 2.0, 3.0, 3.0  # seconds: to write stacks, to end after SIGTERM, to vanish after SIGKILL
ENDING = STACKS + GRACE + LAST  # the most that a command takes beyond its limit
PR_SET_CHILD_SUBREAPER = 36
KEPT = 1 << 13  # bytes of the end of the output

Sink = Callable[[bytes], None]


class Interrupted(Exception):
    """This process was asked to end."""


@dataclass(frozen=True)
class Ended:
    """How a command ended.

    Attributes:
        verdict: PASSED, FAILED or CUT.
        seconds: from its start to the end of all its processes.
        why: exit status or signal of a failed one, the reason why one was cut; else empty.
        tail: the end of its output.
    """

    verdict: str
    seconds: float
    why: str
    tail: str


def adopt_orphans() -> None:
    """On Linux, make processes whose parent has ended children of this one."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def run(command: Sequence[str], environment: Mapping[str, str], limit: float, sink: Sink) -> Ended:
    """Run a command for at most ``limit`` seconds; its output goes to ``sink`` as it comes.

    Raises:
        Interrupted: raised by a signal handler; the command is ended before it goes on.
    """
    begin = time.monotonic()
    others = set(_children_of().get(os.getpid(), ()))
    try:
        process = subprocess.Popen(
            command,
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            preexec_fn=os.setpgrp,
        )
    except OSError as error:
        sink(f"{error}\n".encode())
        return Ended(FAILED, 0.0, f"cannot be started: {error.strerror}", str(error))
    tree = _Tree(process, others)
    output = _Output(process, sink)
    try:
        ended = output.pump(limit, until=lambda: process.poll() is not None)
        if not ended:
            tree.end(output)
        elif left := tree.alive():
            output.say("it left behind: " + "; ".join(map(_describe, left)))
    except BaseException:
        tree.end(output)
        raise
    finally:
        tree.kill(output)
        output.close()
    seconds = time.monotonic() - begin
    if not ended:
        return Ended(CUT, seconds, f"after {limit:.0f} s", output.tail)
    verdict, why = _judge(process.returncode)
    return Ended(verdict, seconds, why, output.tail)


def _judge(status: int) -> tuple[str, str]:
    if status == 0:
        return PASSED, ""
    if status > 0:
        return FAILED, f"exit status {status}"
    with contextlib.suppress(ValueError):
        return FAILED, signal.Signals(-status).name
    return FAILED, f"signal {-status}"


class _Output:
    """What a command prints, for as long as it is to be read."""

    def __init__(self, process: subprocess.Popen[bytes], sink: Sink) -> None:
        assert process.stdout is not None
        self._pipe, self._sink, self._tail = process.stdout, sink, b""
        os.set_blocking(self._pipe.fileno(), False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._pipe, selectors.EVENT_READ)
        self._open = True

    @property
    def tail(self) -> str:
        return self._tail.decode(errors="replace")

    def say(self, text: str) -> None:
        """Insert a line of our own."""
        self._take(f"== {text}\n".encode())

    def pump(self, seconds: float, until: Callable[[], bool]) -> bool:
        """Pass output on until a condition holds, or for ``seconds``; whether it holds."""
        deadline = time.monotonic() + seconds
        while not (done := until()) and time.monotonic() < deadline:
            pause = min(0.05, max(deadline - time.monotonic(), 0.0))
            if not self._open:
                time.sleep(pause)
            elif self._selector.select(pause):
                self._read()
        return done

    def drain(self) -> None:
        """Pass on the output that is there, without waiting for more; of endless output, a bounded part."""
        for _ in range(1024):
            if not (self._open and self._selector.select(0)):
                break
            self._read()

    def close(self) -> None:
        self.drain()
        self._selector.close()
        self._pipe.close()

    def _read(self) -> None:
        data = os.read(self._pipe.fileno(), 1 << 16)
        if not data:
            self._open = False
            self._selector.unregister(self._pipe)
        self._take(data)

    def _take(self, data: bytes) -> None:
        self._tail = (self._tail + data)[-KEPT:]
        self._sink(data)


class _Tree:
    """A command and all processes that come from it."""

    def __init__(self, process: subprocess.Popen[bytes], others: set[int]) -> None:
        self._process, self._others = process, others

    def alive(self) -> list[int]:
        """All that still run, parents first."""
        self._process.poll()
        children = _children_of()
        found = [pid for pid in children.get(os.getpid(), ()) if pid not in self._others]
        for pid in found:
            found += children.get(pid, ())
        return [pid for pid in found if not self._reaped(pid)]

    def end(self, output: _Output) -> None:
        """End it as gently as bounded time allows."""
        pids = self.alive()
        output.say("time is up for: " + "; ".join(map(_describe, pids)))
        pythons = [pid for pid in pids if _is_python(pid)]
        self._signal(pythons, signal.SIGABRT)
        output.pump(STACKS, until=lambda: not set(pythons) & set(self.alive()))
        self._signal(self.alive(), signal.SIGTERM)
        output.pump(GRACE, until=lambda: not self.alive())

    def kill(self, output: _Output) -> None:
        """Leave nothing of it."""

        def gone() -> bool:
            left = self.alive()
            self._signal(left, signal.SIGKILL)
            return not left

        if not output.pump(LAST, until=gone):
            output.say("cannot be ended: " + "; ".join(map(_describe, self.alive())))

    def _reaped(self, pid: int) -> bool:
        """Whether it has ended; an orphan that has is reaped here."""
        if pid == self._process.pid:
            return self._process.returncode is not None
        with contextlib.suppress(ChildProcessError):
            return os.waitpid(pid, os.WNOHANG)[0] == pid
        return _state_of(pid) in ("Z", "")

    @staticmethod
    def _signal(pids: Sequence[int], number: signal.Signals) -> None:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)


def _children_of() -> dict[int, list[int]]:
    """Processes by their parent."""
    found: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*"):
        fields = _stat(int(entry.name))
        if len(fields) > 1:
            found.setdefault(int(fields[1]), []).append(int(entry.name))
    return found


def _stat(pid: int) -> list[str]:
    """State, parent, and the fields after them in /proc; nothing for one that is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return []


def _state_of(pid: int) -> str:
    return (_stat(pid) or [""])[0]


def _is_python(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(os.readlink(f"/proc/{pid}/exe")).name.startswith("python")
    return False


def _describe(pid: int) -> str:
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        command = ""
    return f"{pid} ({_state_of(pid) or 'gone'}) {command.strip()[:160]}"
