"""The peak of the memory that something takes, counted from before it is made."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import re
from pathlib import Path

import torch

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_RESET_PEAK = "5"  # proc_pid_clear_refs(5): sets the peak of resident memory to what is resident now


class PeakMemory:
    """Begins to watch when it is made.

    On the CPU the peak of this process's resident memory, as Linux counts it: pages of another rank's memory
    that this one has touched count here, too. On a GPU the most that PyTorch's allocator had, and what others
    (commlib's heap, NCCL) have taken meanwhile; the process has the GPU to itself.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        gc.collect()
        if device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            self._allocated, self._others = torch.cuda.memory_allocated(), _taken_by_others()
            return
        with contextlib.suppress(OSError, AttributeError):  # another C library has no such function
            ctypes.CDLL(None).malloc_trim(0)
        self._before = None
        with contextlib.suppress(OSError):
            _RESET.write_text(_RESET_PEAK)
            self._before = _resident("VmRSS")

    def peak(self) -> int | None:
        """Bytes above what there was; None: this system does not tell."""
        if self._device.type == "cuda":
            torch.cuda.synchronize()
            by_torch = torch.cuda.max_memory_allocated() - self._allocated
            return by_torch + _taken_by_others() - self._others
        return None if self._before is None else _resident("VmHWM") - self._before


def _resident(name: str) -> int:
    found = re.search(rf"^{name}:\s*(\d+) kB$", _STATUS.read_text(), re.MULTILINE)
    if found is None:
        raise OSError(f"{_STATUS} has no {name}")
    return int(found[1]) * 1024


def _taken_by_others() -> int:
    """Bytes on this GPU taken by anything but PyTorch's allocator."""
    free, total = torch.cuda.mem_get_info()
    return total - free - torch.cuda.memory_reserved()
