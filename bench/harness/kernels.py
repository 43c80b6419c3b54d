"""How long commlib's kernels run, from PyTorch's profiler: wall time without what the host adds.

The profiler slows the host down, so it watches a few extra iterations, after those that are timed. It is
optional: where it cannot start, or sees nothing, `KernelProfile.why_not` has the reason.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from bench.harness.report import one_line

_LABEL = "commlib bench "  # and the number of the operation
_KERNEL = re.compile(
    r"\bcommlib::[^<]*?\b(\w+_kernel)\b"
)  # the profiler's names are demangled, with arguments

ALL = "all"  # an operation's kernels together

Key = tuple[str, int | None, str]  # system, SMs of a rank, operation


@dataclass(frozen=True)
class Launched:
    """One run of a kernel, or one operation: microseconds on the profiler's clock."""

    name: str
    begin: float
    end: float


@dataclass(frozen=True)
class KernelSeries:
    """One kernel in one operation of one system.

    Attributes:
        kernel: its name, such as ``rows_kernel``; "all" is the whole operation, from the first kernel's begin
            to the last one's end, whatever the host does between them.
        ranks: how many launched it.
        seconds: of each launch of each rank, waits for other ranks included; for "all" of each operation.
        per_operation: the time of all of a rank's launches in one operation, mean over ranks; 0 where an
            operation did without this kernel.
    """

    system: str
    num_sms: int | None
    operation: str
    kernel: str
    ranks: int
    seconds: list[float]
    per_operation: list[float]

    @property
    def launches(self) -> float:
        """Launches of a rank in one operation."""
        return len(self.seconds) / len(self.per_operation) / self.ranks


class KernelProfile:
    """The profiler, on one of several in-process ranks; it sees the kernels of all.

    While :meth:`window` is open, only the operation that it names may launch commlib's kernels.
    """

    def __init__(self) -> None:
        self.why_not = ""
        self._keys: list[Key] = []
        self._events: list[Any] = []

    @contextmanager
    def running(self) -> Iterator[None]:
        """Watch what happens inside. An error of the profiler becomes the reason, and is not raised."""
        profiler = None
        try:
            profiler = profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA])
            profiler.start()
        except Exception as error:  # CUPTI's have no particular type
            self.why_not, profiler = _reason("cannot start", error), None
        try:
            yield
        finally:
            if profiler is not None:
                self._stop(profiler)

    @contextmanager
    def window(self, key: Key) -> Iterator[None]:
        """The kernels that begin inside belong to this operation."""
        with record_function(f"{_LABEL}{len(self._keys)}"):
            self._keys.append(key)
            yield

    def series(self, ranks: int) -> list[KernelSeries]:
        """The kernels that were seen; empty where there were none, and then `why_not` says why."""
        windows, kernels = _sort(self._events, self._keys)
        found = kernel_series(windows, kernels, ranks)
        if not found and not self.why_not:
            self.why_not = "the profiler saw no kernel of commlib; may this user profile the GPU?"
        return found

    def _stop(self, profiler: profile) -> None:
        try:
            profiler.stop()
            self._events = list(profiler.events() or [])
        except Exception as error:
            self.why_not = _reason("gave nothing", error)


def kernel_series(
    windows: Sequence[tuple[Key, Launched]], kernels: Iterable[Launched], ranks: int
) -> list[KernelSeries]:
    """Kernels by the operation in whose window they begin, and by name, in the order of their first begin.

    A kernel may end slightly after its window, by as much as the host's clock and the GPU's disagree.
    """
    ordered = sorted(kernels, key=lambda kernel: kernel.begin)
    operations: dict[
        Key, list[dict[str, list[float]]]
    ] = {}  # each with the seconds of each kernel's launches
    for key, window in windows:
        inside = [k for k in ordered if window.begin <= k.begin < window.end]
        if inside:  # else the profiler lost them
            operations.setdefault(key, []).append(_by_name(inside))
    return [
        KernelSeries(
            *key,
            name,
            ranks,
            [seconds for operation in of_key for seconds in operation.get(name, [])],
            [sum(operation.get(name, [])) / (1 if name == ALL else ranks) for operation in of_key],
        )
        for key, of_key in operations.items()
        for name in dict.fromkeys(name for operation in of_key for name in operation)
    ]


def _by_name(kernels: Sequence[Launched]) -> dict[str, list[float]]:
    """Seconds of the launches of one operation, in the order of their begins."""
    by_name: dict[str, list[float]] = {}
    for kernel in kernels:
        by_name.setdefault(kernel.name, []).append((kernel.end - kernel.begin) * 1e-6)
    by_name[ALL] = [(max(k.end for k in kernels) - kernels[0].begin) * 1e-6]
    return by_name


def _sort(events: Iterable[Any], keys: Sequence[Key]) -> tuple[list[tuple[Key, Launched]], list[Launched]]:
    """The profiler's events: operations by the labels on the host, and commlib's kernels."""
    windows, kernels = [], []
    for event in events:
        on_host = event.device_type == torch.autograd.DeviceType.CPU
        begin, end = event.time_range.start, event.time_range.end
        if on_host and event.name.startswith(_LABEL):
            key = keys[int(event.name.removeprefix(_LABEL))]
            windows.append((key, Launched(event.name, begin, end)))
        elif not on_host and (kernel := _KERNEL.search(event.name)):
            kernels.append(Launched(kernel[1], begin, end))
    return windows, kernels


def _reason(what: str, error: Exception) -> str:
    return f"the profiler {what}: {one_line(error)}"
