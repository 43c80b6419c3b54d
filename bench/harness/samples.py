"""The files that benchmarks write: every sample as JSON, and tables as text."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

BENCH = Path(__file__).parent.parent
RECORDED = BENCH / "results"  # the samples that README and docs/ cite; they must not change
RESULTS = RECORDED / "local"  # where benchmarks write; not in git


def options(args: argparse.Namespace) -> dict[str, Any]:
    """The options of a run, but for the places of files, which say nothing about its figures."""
    content = {name: value for name, value in vars(args).items() if not isinstance(value, Path)}
    return {name: sorted(value) if isinstance(value, set) else value for name, value in content.items()}


def write_samples(path: Path, content: dict[str, Any]) -> None:
    """Write samples as JSON; a path among them is refused."""
    write(path, laid_out(json.loads(json.dumps(content))) + "\n")


def laid_out(content: Any, indent: str = "") -> str:
    """JSON with an item on each line, but a list of numbers (or of words) on one: a run changes few lines."""
    inner = indent + " "
    if isinstance(content, dict) and content:
        items = [f"{json.dumps(key)}: {laid_out(value, inner)}" for key, value in content.items()]
        brackets = "{}"
    elif isinstance(content, list) and any(isinstance(item, (dict, list)) for item in content):
        items = [laid_out(item, inner) for item in content]
        brackets = "[]"
    else:
        return json.dumps(content)
    lines = f",\n{inner}".join(items)
    return f"{brackets[0]}\n{inner}{lines}\n{indent}{brackets[1]}"


def write(path: Path, text: str) -> None:
    """Replace a file at once: whenever this program is ended, the old text is there or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.new")
    beside.write_text(text)
    beside.replace(path)
