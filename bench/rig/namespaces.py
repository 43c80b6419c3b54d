"""Our network namespaces on this host: made for one program, and gone with it.

Their names say which program made them, so that runs do not clash and leftovers of dead ones are recognised.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

PACKAGES = {"ip": "iproute2", "tc": "iproute2", "bridge": "iproute2", "unshare": "util-linux"}
_NAMES = re.compile(r"commlib\.(\d+)\.(\d+)\.\d+\.\w+")  # process id, when it started, number, node


class RigError(RuntimeError):
    """A rig could not be made or used; the text says what to do."""


def why_not() -> str | None:
    """Why no rig can be made here; None: one can."""
    if os.geteuid() != 0:
        return "network namespaces need root: run it as root, or with sudo"
    missing = [tool for tool in PACKAGES if shutil.which(tool) is None]
    if missing:
        packages = sorted({PACKAGES[tool] for tool in missing})
        return f"{', '.join(missing)} not found in PATH: install {' and '.join(packages)}"
    tried = subprocess.run(["unshare", "--net", "--uts", "true"], capture_output=True, text=True, check=False)
    if tried.returncode:
        return f"root may not make namespaces here ({tried.stderr.strip()}): an unprivileged container?"
    return None


def own_prefix(number: int) -> str:
    """The beginning of the names of this program's namespaces."""
    return f"commlib.{os.getpid()}.{_started(os.getpid())}.{number}."


def clean() -> list[str]:
    """Remove what rigs of dead programs left behind; return the namespaces removed."""
    leftovers = [name for name, alive in existing().items() if not alive]
    with signals_wait():
        remove(leftovers)
    return leftovers


def existing() -> dict[str, bool]:
    """Namespaces of all rigs, and whether the program that made each is still running."""
    found = {}
    for name in _namespaces():
        made_by = _NAMES.fullmatch(name)
        if made_by:
            found[name] = _started(int(made_by[1])) == made_by[2]
    return found


def call(*argv: str) -> str:
    """Run a command; return its output."""
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RigError(f"{' '.join(argv)}: {done.stderr.strip() or f'exit {done.returncode}'}")
    return done.stdout


def _started(process: int) -> str | None:
    """When a process started, which tells it from a later one of the same number; None: no such process."""
    try:
        stat = Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return None
    return stat.rpartition(")")[2].split()[19]


def _namespaces() -> list[str]:
    return [line.split()[0] for line in call("ip", "netns", "list").splitlines()]


def remove(namespaces: Sequence[str], patience: float = 2.0) -> None:
    """End the processes in these namespaces, politely first, and delete those namespaces that exist."""
    present = [name for name in _namespaces() if name in namespaces]
    for number, seconds in ((signal.SIGTERM, patience), (signal.SIGKILL, patience)):
        deadline = time.monotonic() + seconds
        for process in _processes(present):
            with suppress(ProcessLookupError):
                os.kill(process, number)
        while _processes(present) and time.monotonic() < deadline:
            time.sleep(0.02)
    for name in present:
        call("ip", "netns", "delete", name)


def _processes(namespaces: Sequence[str]) -> list[int]:
    return [int(process) for name in namespaces for process in call("ip", "netns", "pids", name).split()]


@contextmanager
def signals_wait() -> Iterator[None]:
    """Defer signals that would end this program until the block is done."""
    waiting = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, waiting)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
