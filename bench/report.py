"""How a benchmark reports its findings: tables of fixed width on stdout, and JSON beside them."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from common import Launch, usable_cores
from facts import commit, driver, slug
from rich.console import Console
from rich.table import Table

import commlib
from commlib import cuda

# Not in git: the samples beside it are those that README and docs/ cite, and must not change.
RESULTS = Path(__file__).parent / "results/local"
CUDA_ENVIRONMENT = ("CUDA_MODULE_LOADING", "CUDA_DEVICE_MAX_CONNECTIONS")
TABLE_WIDTH = 110
NO_GPU = 2  # exit status

Titled = tuple[str, Sequence[str], Iterable[Iterable[Sequence[str]]]]  # as `table` and `markdown` take it


def show(*renderables: Any) -> None:
    """Print at a fixed width, so that a file reads like the terminal."""
    Console(width=TABLE_WIDTH, highlight=False, force_terminal=False).print(*renderables, sep="\n")


def table(title: str, columns: Sequence[str], sections: Iterable[Iterable[Sequence[str]]]) -> Table:
    """A table of sections of rows. The first two columns are words, the others figures."""
    result = Table(title=title, title_justify="left", title_style="bold", expand=True)
    for place, column in enumerate(columns):
        result.add_column(column, justify="left" if place < 2 else "right")
    for section in sections:
        for row in section:
            result.add_row(*row)
        result.add_section()
    return result


def machine(launch: Launch) -> dict[str, Any]:
    """Facts that the figures depend on besides the configuration."""
    return host() | {
        "ranks": launch.size,
        "threads_per_rank": torch.get_num_threads(),
        "mpi": _mpi_version(launch),
    }


def host() -> dict[str, Any]:
    """The part of it that every benchmark has."""
    return {
        "cpu": _cpu_model(),
        "cores": usable_cores(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commlib": commlib.__version__,
        "commit": commit(),
    }


def gpu(index: int = 0) -> dict[str, Any]:
    """The GPU and the software that runs it."""
    properties = cuda.properties(index)
    return {
        "gpu": properties.name,
        "sms": properties.sms,
        "gpu_memory": properties.total_memory,
        "gpus": torch.cuda.device_count(),
        "cuda_of_torch": torch.version.cuda,
        "driver": driver(),
        "environment": {name: os.environ.get(name) for name in CUDA_ENVIRONMENT},
    }


def where(facts: dict[str, Any]) -> str:
    """Ranks and machine, from :func:`machine`, or :func:`host` and :func:`gpu`."""
    if "gpu" in facts:
        return f"{facts['ranks']} ranks on one {facts['gpu']} ({facts['sms']} SMs)"
    return f"{facts['ranks']} ranks on {facts['cores']} cores ({facts['cpu']})"


def device_name(facts: dict[str, Any]) -> str:
    """The device's name, for a file's name."""
    return slug(facts["gpu"]) if "gpu" in facts else "cpu"


def markdown(title: str, columns: Sequence[str], sections: Iterable[Iterable[Sequence[str]]]) -> str:
    """The table of :func:`table` in Markdown."""
    lines = [f"**{title}**", "", "| " + " | ".join(columns) + " |"]
    lines.append("|" + "|".join("---" if place < 2 else "---:" for place in range(len(columns))) + "|")
    for section in sections:
        for row in section:
            cells = [*row, *[""] * (len(columns) - len(row))]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def write_json(path: Path, content: dict[str, Any]) -> None:
    write(path, json.dumps(content, indent=1) + "\n")


def write(path: Path, text: str) -> None:
    """Replace a file at once: whenever this program is ended, the old text is there or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.new")
    beside.write_text(text)
    beside.replace(path)


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _mpi_version(launch: Launch) -> str | None:
    if launch.comm is None:
        return None
    from mpi4py import MPI

    return MPI.Get_library_version().split(",")[0].strip("\0 \n")
