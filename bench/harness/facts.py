"""Facts by which results are named. Without PyTorch, for programs that must report that PyTorch fails."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

LONGEST = 30  # seconds: a driver in trouble answers no question


def commit() -> str | None:
    """COMMLIB_COMMIT, or the checkout's commit, marked where the working tree differs from it.

    None: unknown. A copy of a working tree may come with a history that is not its own.
    """
    described = _ask(["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"])
    return os.environ.get("COMMLIB_COMMIT") or described


def driver() -> str | None:
    """The version of NVIDIA's driver."""
    return _ask_nvidia_smi("driver_version")


def gpu_name() -> str | None:
    """The driver's name for the first GPU."""
    return _ask_nvidia_smi("name")


def slug(name: str) -> str:
    """A name as part of a file's name."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _ask_nvidia_smi(field: str) -> str | None:
    answer = _ask(["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader"])
    return answer.partition("\n")[0].strip() if answer else None


def _ask(command: Sequence[str]) -> str | None:
    """A program's answer; None if the program is missing, fails, or prints nothing."""
    try:
        asked = subprocess.run(
            command,
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=False,
            timeout=LONGEST,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return (asked.stdout.strip() or None) if asked.returncode == 0 else None
