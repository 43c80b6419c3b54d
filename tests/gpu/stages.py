"""Run the steps of steps.py, each under a limit of its own, and say after each what has come of it.

    python tests/gpu/stages.py                     # all; `make gpu` calls it so
    python tests/gpu/stages.py --stage 1 --budget 540
    python tests/gpu/stages.py --steps module test_cuda

Writes NAME.json, NAME.md and NAME.log to the results' directory, NAME being the GPU, the date and what was
chosen. Exits with 0 if every step that was chosen has passed. Needs nothing but Python, for it is there to
tell what does not work.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import platform
import re
import resource
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import running
import steps as listed
from running import CUT, ENDING, FAILED, NOT_RUN, PASSED, Ended, Interrupted
from steps import Step

sys.path.insert(0, str(Path(__file__).parent.parent.parent / "bench"))
from bench.harness.facts import commit, driver, gpu_name, slug

ROOT = Path(__file__).parent.parent.parent
SHORTEST = 3.0  # seconds: a step is not begun with less
TAIL_LINES = 40
OF_MAKE = ("MAKEFLAGS", "MFLAGS", "MAKELEVEL")  # a step's make is not a part of the one that started this
COLUMNS = ("step", "stage", "result", "seconds", "limit", "why")


@dataclass
class Report:
    """The results of the steps so far, in three files."""

    machine: dict[str, Any]
    chosen: Sequence[Step]
    directory: Path
    name: str
    ended: dict[str, Ended] = field(default_factory=dict)
    begin: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        self._log: IO[bytes] = self._path("log").open("wb", buffering=0)

    def put(self, data: bytes) -> None:
        """To the log and to stdout, whether or not stdout is read."""
        self._log.write(data)
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.buffer.write(data)
            sys.stdout.buffer.flush()

    def say(self, text: str) -> None:
        self.put(f"{text}\n".encode())

    def write(self) -> None:
        """JSON and Markdown of the results by now."""
        content = {
            "machine": self.machine,
            "seconds": round(time.monotonic() - self.begin, 1),
            "steps": [self._as_json(step) for step in self.chosen],
        }
        self._replace("json", json.dumps(content, indent=1) + "\n")
        self._replace("md", self._markdown())

    def passed(self, name: str) -> bool:
        return name in self.ended and self.ended[name].verdict == PASSED

    def count(self) -> Counter[str]:
        """Steps by result."""
        return Counter(self._of(step).verdict for step in self.chosen)

    def table(self) -> str:
        """For a terminal; its last line sums up."""
        rows = [COLUMNS, *self._rows()]
        widths = [max(len(row[i]) for row in rows) for i in range(len(COLUMNS))]
        lines = [
            "  ".join(
                cell.rjust(width) if 1 <= i <= 4 and i != 2 else cell.ljust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in rows
        ]
        return "\n".join([*lines, self.summary()])

    def summary(self) -> str:
        count = self.count()
        parts = [
            f"{count[verdict]} {verdict}" for verdict in (PASSED, FAILED, CUT, NOT_RUN) if count[verdict]
        ]
        seconds = time.monotonic() - self.begin
        return f"{len(self.chosen)} steps: {', '.join(parts)}; {seconds:.0f} s; {self.name}.md"

    def _of(self, step: Step) -> Ended:
        return self.ended.get(step.name, Ended(NOT_RUN, 0.0, "", ""))

    def _rows(self) -> Iterator[tuple[str, ...]]:
        for step in self.chosen:
            ended = self._of(step)
            yield (
                *(step.name, str(step.stage), ended.verdict),
                *(f"{ended.seconds:.1f}", f"{step.limit:.0f}", ended.why),
            )

    def _as_json(self, step: Step) -> dict[str, Any]:
        ended = self._of(step)
        return {
            "step": step.name,
            "stage": step.stage,
            "command": list(step.command),
            "environment": dict(step.environment),
            "limit": step.limit,
            "result": ended.verdict,
            "seconds": round(ended.seconds, 1),
            "why": ended.why,
            "tail": _last_lines(ended.tail),
        }

    def _markdown(self) -> str:
        facts = ", ".join(f"{key} {value}" for key, value in self.machine.items())
        lines = [f"**{facts}**", "", "| " + " | ".join(COLUMNS) + " |", "|---|---:|---|---:|---:|---|"]
        lines += ["| " + " | ".join(row) + " |" for row in self._rows()]
        lines += ["", f"{self.summary()}, {self.name}.log", ""]
        for step in self.chosen:
            if self._of(step).verdict in (FAILED, CUT):
                lines += [f"The end of {step.name}:", "", "```", *_last_lines(self._of(step).tail), "```", ""]
        return "\n".join(lines)

    def _path(self, suffix: str) -> Path:
        return self.directory / f"{self.name}.{suffix}"

    def _replace(self, suffix: str, text: str) -> None:
        """A process killed here leaves the old file or the new one."""
        new = self._path(f"{suffix}.new")
        new.write_text(text)
        new.replace(self._path(suffix))


def _last_lines(text: str) -> list[str]:
    """With files named as in the repository, wherever that was."""
    return text.replace(f"{ROOT}/", "").splitlines()[-TAIL_LINES:]


def run_all(report: Report, budget: float, words: dict[str, str]) -> None:
    """Every step in turn, as far as the budget goes."""
    for step in report.chosen:
        left = budget - ENDING - (time.monotonic() - report.begin)
        limit = min(step.limit, left)
        if step.needs in {other.name for other in report.chosen} and not report.passed(step.needs or ""):
            report.ended[step.name] = Ended(NOT_RUN, 0.0, f"needs {step.needs}", "")
        elif limit < SHORTEST:
            report.ended[step.name] = Ended(NOT_RUN, 0.0, f"of {budget:.0f} s too few are left", "")
        else:
            run_step(report, step, limit, words)
        report.write()


def run_step(report: Report, step: Step, limit: float, words: dict[str, str]) -> None:
    command = [fill(part, words) for part in step.command]
    report.say(f"\n== {step.name} (stage {step.stage}, at most {limit:.0f} s): {' '.join(command)}")
    begin = time.monotonic()
    try:
        ended = running.run(command, environment_of(step), limit, report.put)
    except Interrupted as error:
        report.ended[step.name] = Ended(CUT, time.monotonic() - begin, str(error), "")
        raise
    report.ended[step.name] = ended
    report.say(f"== {step.name}: {ended.verdict} {ended.why}".rstrip() + f", {ended.seconds:.1f} s")


def fill(part: str, words: dict[str, str]) -> str:
    """Insert the words; other braces are the command's own."""
    return re.sub(r"\{(\w+)\}", lambda found: words.get(found[1], found[0]), part)


def environment_of(step: Step) -> dict[str, str]:
    """The runner's own, the checkout first among modules, and stacks when it crashes or is cut."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    own = {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1"}
    inherited = {key: value for key, value in os.environ.items() if key not in OF_MAKE}
    return {**inherited, **own, **step.environment}


def choose(steps: Sequence[Step], stages: Sequence[int], names: Sequence[str]) -> list[Step]:
    """The steps of the stages, or with these names, in order; before them the steps that they need."""
    if unknown := set(names) - {step.name for step in steps}:
        raise ValueError(f"no such step: {', '.join(sorted(unknown))}; see --list")
    if stages and not any(step.stage in stages for step in steps):
        raise ValueError(f"no such stage: {', '.join(map(str, stages))}; see --list")
    chosen = [
        step for step in steps if (not stages or step.stage in stages) and (not names or step.name in names)
    ]
    needed = {step.needs for step in chosen}
    return [step for step in steps if step in chosen or step.name in needed]


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stage", type=int, nargs="+", default=[], help="default: all")
    parser.add_argument("--steps", nargs="+", default=[], help="names, instead of all steps")
    parser.add_argument(
        "--budget",
        type=float,
        default=float("inf"),
        help="seconds for everything; what no time is left for is not run",
    )
    parser.add_argument("--results", type=Path, default=ROOT / "bench/results/local")
    parser.add_argument("--list", action="store_true", help="show the steps, and run none")
    return parser.parse_args(argv)


def facts() -> dict[str, Any]:
    return {
        "GPU": gpu_name() or "none",
        "driver": driver(),
        "commit": commit(),
        "Python": platform.python_version(),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }


def name_of(machine: dict[str, Any], args: argparse.Namespace) -> tuple[str, str]:
    """The prefix of this run's files, and the name of its own."""
    begin = f"{slug(machine['GPU']) if machine['driver'] else 'no-gpu'}-{datetime.date.today()}"
    chosen = "steps" if args.steps else f"stage{'-'.join(map(str, args.stage))}" if args.stage else "stages"
    return begin, f"{begin}-{chosen}"


def on_signal(number: int, frame: Any) -> None:
    raise Interrupted(f"by {signal.Signals(number).name}")


def main(argv: Sequence[str] | None = None, steps: Sequence[Step] = listed.STEPS) -> int:
    """Run them; the exit status."""
    args = parse_arguments(argv)
    try:
        chosen = choose(steps, args.stage, args.steps)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    if args.list:
        print("\n".join(f"{s.stage}  {s.name:16} {s.limit:4.0f} s  {' '.join(s.command)}" for s in chosen))
        return 0
    begin = time.monotonic()
    machine = facts()
    prefix, name = name_of(machine, args)
    report = Report(machine, chosen, args.results.resolve(), name, begin=begin)
    running.adopt_orphans()
    _, most = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(
        resource.RLIMIT_CORE, (0, most)
    )  # a core of a process with a GPU takes minutes to write
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, on_signal)
    os.chdir(ROOT)
    report.say("== " + ", ".join(f"{key} {value}" for key, value in machine.items()))
    words = {"python": sys.executable, "make": os.environ.get("MAKE", "make"), "name": prefix}
    try:
        run_all(report, args.budget, {**words, "results": str(report.directory)})
    except Interrupted as error:
        report.say(f"== cut {error}")
    report.write()
    report.say(f"\n== results: {report.directory}\n\n{report.table()}")
    return 0 if report.count()[PASSED] == len(chosen) else 1


if __name__ == "__main__":
    sys.exit(main())
