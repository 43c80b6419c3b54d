"""A soak of random faults: many runs, each drawn from its seed, on ranks that are forked processes.

    python tests/soak [--runs 200] [--seed N] [--jobs 2] [--faults kill,pause] [--seconds S]

Run i has seed N + i. What goes wrong is printed with its seed: `--seed N --runs 1` does it again.
"""

import argparse
import json
import os
import random
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

import torch

from soak.faults import FAULTS, KINDS
from soak.plan import Plan, draw, with_plant
from soak.run import LIMIT, Outcome, Run, end_with_parent

CORES = len(os.sched_getaffinity(0))
HOW = ("right", "named errors", "failed")  # how a run ends


def main() -> int:
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written)
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--seed", type=int, default=None, help="of the first run; else another one each time")
    parser.add_argument("--jobs", type=int, default=CORES + 1, help="runs at once; most wait")
    parser.add_argument("--faults", type=lambda s: s.split(","), default=FAULTS, help=", ".join(FAULTS))
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds of a run, then it hangs")
    parser.add_argument("--plant", choices=[k for k in KINDS if k not in FAULTS], help="to test the soak")
    parser.add_argument("--verbose", action="store_true", help="print every run")
    args = parser.parse_args()
    first = random.SystemRandom().randrange(10**6) if args.seed is None else args.seed
    print(f"== {args.runs} runs of random faults from seed {first}, {args.jobs} at once", flush=True)
    torch.set_num_threads(1)  # a process with more threads could not be forked
    torch.testing.assert_close(torch.ones(1), torch.ones(1))  # loads what each rank would load for itself
    return Soak(args, first).run()


class Soak:
    """Many runs, some at a time."""

    def __init__(self, args: argparse.Namespace, first: int) -> None:
        self.args = args
        self.waiting = list(reversed(range(first, first + args.runs)))
        self.running: dict[int, tuple[Plan, int]] = {}  # by process, with the pipe for its outcome
        self.table: dict[str, Counter[str]] = defaultdict(Counter)
        self.longest: Counter[str] = Counter()
        self.failed: list[int] = []

    def run(self) -> int:
        begun = time.monotonic()
        while self.waiting or self.running:
            while self.waiting and len(self.running) < self.args.jobs:
                self._start(self.waiting.pop())
            pid, _ = os.wait()
            self._note(*self.running.pop(pid))
        self._print_table(time.monotonic() - begun)
        return 1 if self.failed else 0

    def _start(self, seed: int) -> None:
        plan = draw(seed, self.args.faults)
        if self.args.plant:
            plan = with_plant(plan, self.args.plant)
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.setsid()  # Ctrl-C is for the parent; all end with it
            end_with_parent()
            outcome = Run(plan, self.args.limit, self.args.verbose).run()
            os.write(writer, json.dumps(summary(outcome)).encode())
            os._exit(0)
        os.close(writer)
        self.running[pid] = plan, reader

    def _note(self, plan: Plan, reader: int) -> None:
        said = os.read(reader, 1 << 12)
        os.close(reader)
        how, seconds = json.loads(said) if said else ("failed", 0.0)
        if how == "failed":
            self.failed.append(plan.seed)
        for name in {fault.kind for fault in plan.faults}:
            self.table[name][how] += 1
            self.longest[name] = max(self.longest[name], seconds)

    def _print_table(self, seconds: float) -> None:
        print(f"{'fault':12}{'runs':>6}{''.join(f'{how:>14}' for how in HOW)}{'longest':>12}")
        for name in sorted(self.table):
            counts = self.table[name]
            cells = "".join(f"{counts[how]:14}" for how in HOW)
            print(f"{name:12}{sum(counts.values()):6}{cells}{self.longest[name]:10.2f} s")
        print(f"{self.args.runs} runs in {seconds:.0f} s, {len(self.failed)} failed")
        if self.failed:
            some = " ".join(map(str, sorted(self.failed)[:20]))
            faults = "" if self.args.faults == FAULTS else f" --faults {','.join(self.args.faults)}"
            print(f"again: python tests/soak --runs 1{faults} --seed N, where N is one of {some}")


def summary(outcome: Outcome) -> tuple[str, float]:
    """One of HOW, and the seconds it took."""
    if outcome.wrong:
        return "failed", outcome.seconds
    return "right" if all(end.name == "right" for end in outcome.ends) else "named errors", outcome.seconds


if __name__ == "__main__":
    sys.exit(main())
