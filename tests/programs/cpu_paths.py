"""`bench/dispatch_combine.py` with a fault, named by the first argument; the others are the benchmark's."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))

from bench import dispatch_combine
from bench.systems.grouped import CommlibGrouped, Groups
from bench.systems.grouped_windows import GroupedWindows
from bench.systems.windows import WindowsBaseline


def after(owner, name, change):
    """Change what a function returns."""
    right = getattr(owner, name)

    def wrong(*arguments):
        return change(right(*arguments))

    setattr(owner, name, wrong)


def one_more(rows):
    rows[-1, 0] += 1
    return rows


def without_weights(groups):
    groups.weights.fill_(1)
    return groups


FAULTS = {
    "windows-dispatch": lambda: after(WindowsBaseline, "dispatch", one_more),
    "windows-combine": lambda: after(WindowsBaseline, "combine", one_more),
    "grouped-combine": lambda: after(GroupedWindows, "combine", one_more),
    "commlib-combine": lambda: after(CommlibGrouped, "combine", one_more),
    "weights": lambda: after(Groups, "of", without_weights),
}
FAULTS[sys.argv.pop(1)]()
dispatch_combine.main()
