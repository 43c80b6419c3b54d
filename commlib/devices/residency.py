"""Whether the blocks of all communicators of this process fit on a GPU at once."""

from __future__ import annotations

import sys
import threading
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch

_NOT_THE_USER = (f"{Path(__file__).parents[1]}/", f"{Path(torch.__file__).parent}/")


class Residency:
    """Blocks that communicators may have running on each GPU, all outside partitions.

    The blocks of an operation wait for each other, so all of them must run at once. Operations of one
    communicator take turns, but those of two may be under way together; if each holds some of the SMs that
    both need, neither goes on.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()  # inside, a communicator may be collected and take itself off
        self._blocks: dict[str, Counter[int]] = {}  # by device: communicators by their number of blocks
        self._warned: set[str] = set()

    def add(self, device: str, name: str, blocks: int, sms: int) -> Callable[[], None]:
        """Count a communicator; warn, once for each device, if there are now more blocks than SMs.

        The warning points at the user's line: the nearest that is neither ours nor PyTorch's.

        Args:
            device: what is the same for communicators on one GPU.
            name: of the GPU, for people.
            blocks: how many the communicator's operations run on.
            sms: how many the GPU has.

        Returns:
            A function that takes the communicator off again. Calling it twice does no harm.
        """
        with self._lock:
            alive = self._blocks.setdefault(device, Counter())
            alive[blocks] += 1
            warn = alive.total() > 1 and _sum(alive) > sms and device not in self._warned
            if warn:
                self._warned.add(device)
                text = _warning(name, alive, sms)
        left = [blocks]

        def remove() -> None:
            with self._lock:
                if left:
                    alive[left.pop()] -= 1

        if warn:
            try:
                warnings.warn(text, RuntimeWarning, stacklevel=_level_of_user())
            except RuntimeWarning:  # where warnings are errors
                remove()
                raise
        return remove

    def blocks_on(self, device: str) -> int:
        """Blocks of all communicators counted on a device."""
        with self._lock:
            return _sum(self._blocks.get(device, Counter()))


def _level_of_user() -> int:
    """The stacklevel at which the caller's warning points at the user's line."""
    frame, level = sys._getframe(1), 1
    while frame.f_back and frame.f_code.co_filename.startswith(_NOT_THE_USER):
        frame, level = frame.f_back, level + 1
    return level


def _sum(alive: Counter[int]) -> int:
    return sum(blocks * count for blocks, count in alive.items())


def _warning(name: str, alive: Counter[int], sms: int) -> str:
    each = " + ".join(f"{count} x {blocks}" for blocks, count in sorted(alive.items()) if count)
    return (
        f"the communicators of this process on {name} want {_sum(alive)} SMs together ({each}), and it has "
        f"{sms}. All blocks of an operation must run at once: should operations of several communicators be "
        "under way together, they can wait for each other until their timeout. Lower num_sms, or let layers "
        "share a communicator"
    )


of_this_process = Residency()
