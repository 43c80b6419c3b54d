"""Statistics of samples."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Stats:
    """Seconds an operation took: the median and the range of its samples."""

    median: float
    lowest: float
    highest: float

    @staticmethod
    def of(samples: Sequence[float]) -> Stats:
        return Stats(statistics.median(samples), min(samples), max(samples))

    def text(self, unit: float = 1e-3, digits: int = 1) -> str:
        """``median (lowest-highest)`` in a unit given in seconds."""
        m, lo, hi = (f"{value / unit:.{digits}f}" for value in (self.median, self.lowest, self.highest))
        return f"{m} ({lo}-{hi})"
