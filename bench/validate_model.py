"""Compare commlib.model with published results of others: bench/published.csv, row by row.

    python bench/validate_model.py              # the table
    python bench/validate_model.py --markdown   # as in docs/model.md

Two predictions for each row. "docs": all constants are from datasheets and projects' documentation, none from
the rows. "fitted": four constants are fitted on a row each; these rows are marked * and left out of its
summary. The table does not depend on the machine it is computed on.
"""

from __future__ import annotations

import argparse
import csv
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bench.harness.report import Titled, markdown, show, table
from commlib.model import DOCUMENTED, FITTED, Assumptions, Config, Operation, predict, preset
from commlib.model.presets import FITTED_ROWS

PUBLISHED = Path(__file__).with_name("published.csv")
COLUMNS = ("row", "what", "EP", "SMs", "published", "docs", "error", "fitted", "error", "binds", "")
SUMMARY = ("", "docs: rows", "median", "max", "fitted: rows", "median", "max")
MODES = ("throughput, one node", "throughput, several nodes", "latency, one node", "latency, several nodes")

# The GPU that a row means, and the assumption behind it.
GPUS = {
    "H800": ("H800", ""),
    "H100": ("H100", ""),
    "H200": ("H200", ""),
    "SM90": ("H100", "a"),
    "SM100": ("B200", "b"),
}
ASSUMED = {
    "a": 'the table says "SM90": H100 is taken, for an H800\'s NVLink cannot carry the figure of row 21',
    "b": 'the table says "SM100": B200 is taken',
    "c": "the network is not stated: 400 Gb/s for each GPU is taken, as in a DGX",
    "d": "routing over at most 4 nodes, as the document says; its best expert makes a node one of a token's",
    "e": "a row for each expert that a token chose, straight to its rank, over NVLink inside a node",
    "f": "16 x 200 Gb/s EFA for 8 GPUs counted as 50 GB/s for each; EFA is not modelled beyond that",
}
GENERAL = (
    "Where a row gives no number of SMs, they are taken not to bind. "
    "Routing is taken as uniform, ranks as 8 to a node."
)
GPUS_PER_NODE = 8
NODE_LIMIT = 4


@dataclass(frozen=True)
class Row:
    """A line of the CSV that can be predicted."""

    number: int
    what: str
    mode: str
    published: float
    unit: str
    sms: int | None
    gpu: str
    config: Config
    operation: str
    measure: str  # an attribute of Operation
    assumed: str

    def predicted(self, assumptions: Assumptions) -> tuple[float, Operation]:
        hardware = preset(self.gpu, assumptions)
        both = predict(hardware, self.config, self.sms or hardware.sms)
        operation: Operation = getattr(both, self.operation)
        value = getattr(operation, self.measure)
        return (value * 1e6 if self.unit == "us" else value), operation

    def error(self, assumptions: Assumptions) -> float:
        return self.predicted(assumptions)[0] / self.published - 1

    @property
    def fitted(self) -> bool:
        return self.number in FITTED_ROWS.values()

    @property
    def hardware_stated(self) -> bool:
        return not set("abcf") & set(self.assumed)


def read(path: Path = PUBLISHED) -> tuple[list[Row], dict[int, str]]:
    """The rows that can be predicted, and why not for the others."""
    rows, left_out = [], {}
    with path.open(newline="") as lines:
        for number, line in enumerate(csv.DictReader(lines), 1):
            try:
                rows.append(_row(number, line))
            except ValueError as reason:
                left_out[number] = f"{line['system']} {line['op']}, EP {line['ep']}: {reason}"
    return rows, left_out


def _row(number: int, line: dict[str, str]) -> Row:
    if line["gpu"] not in GPUS:
        raise ValueError(f"no constants for {line['gpu'] or 'an unnamed GPU'}")
    gpu, assumed = GPUS[line["gpu"]]
    nodes, latency = int(line["nodes"]), line["mode"] == "latency"
    if nodes > 1 and not line["nic"]:
        assumed += "c"
    if nodes > 1 and "EFA" in line["nic"]:
        assumed += "f"
    # Only these two documents say so; "top-4 groups" limits nothing on 4 nodes or fewer.
    limited = not latency and nodes > NODE_LIMIT and (line["version"] == "V1" or line["system"] == "UCCL-EP")
    measure, published, unit = _measure(line)
    config = Config(
        ranks=int(line["ep"]),
        tokens=int(line["tokens_per_rank"]),
        hidden=int(line["hidden"]),
        topk=int(line["topk"]),
        experts=int(line["experts"]),
        dispatch_dtype=line["dispatch_dtype"] or "bf16",
        combine_dtype=line["combine_dtype"] or "bf16",
        ranks_per_node=GPUS_PER_NODE,
        node_limit=NODE_LIMIT if limited else None,
        direct=latency,
        dedup=not latency,
    )
    where = f"{line['system']} {line['version']}".strip()
    sms = int(line["sms"]) if line["sms"] else None
    return Row(
        number=number,
        what=f"{where} {line['gpu']} {line['op']}",
        mode=f"{line['mode']}, {'one node' if nodes == 1 else 'several nodes'}",
        published=published,
        unit=unit,
        sms=sms,
        gpu=gpu,
        config=config,
        operation=line["op"],
        measure=measure,
        assumed=assumed + "d" * limited + "e" * latency,
    )


def _measure(line: dict[str, str]) -> tuple[str, float, str]:
    """The model's measure for the row's figure, the figure, and its unit."""
    if not line["gbytes_per_s"]:
        if not line["latency_us"]:
            raise ValueError("no figure")
        return "seconds", float(line["latency_us"]), "us"
    if line["mode"] == "latency":
        measure = "selection_gbps"  # DeepEP tests/test_low_latency.py, NCCL contrib/nccl_ep/ep_bench.cu
    elif line["bandwidth_kind"].startswith("NVLink"):
        measure = "nvlink_gbps"  # DeepEP tests/test_intranode.py
    elif line["bandwidth_kind"].startswith("RDMA"):
        measure = "rdma_gbps"  # DeepEP tests/test_internode.py
    else:
        raise ValueError(f"unknown kind of bandwidth {line['bandwidth_kind']!r}")
    return measure, float(line["gbytes_per_s"]), "GB/s"


def table_rows(rows: list[Row]) -> Iterator[list[str]]:
    for row in rows:
        documented, fitted = (row.predicted(a) for a in (DOCUMENTED, FITTED))
        yield [
            f"{row.number}{'*' if row.fitted else ''}",
            row.what,
            str(row.config.ranks),
            str(row.sms or ""),
            f"{row.published:g} {row.unit}",
            f"{documented[0]:.0f}",
            f"{row.error(DOCUMENTED):+.0%}",
            f"{fitted[0]:.0f}",
            f"{row.error(FITTED):+.0%}",
            fitted[1].limit,
            row.assumed,
        ]


def summary_rows(rows: list[Row]) -> Iterator[list[str]]:
    """Absolute errors; for "fitted", without the rows that it was fitted on."""
    groups = [(mode, [row for row in rows if row.mode == mode]) for mode in MODES]
    groups.append(("all", rows))
    groups.append(("all, GPU and network stated, no EFA", [r for r in rows if r.hardware_stated]))
    for name, members in groups:
        documented = [abs(row.error(DOCUMENTED)) for row in members]
        fitted = [abs(row.error(FITTED)) for row in members if not row.fitted]
        yield [name, *_stats(documented), *_stats(fitted)]


def _stats(errors: list[float]) -> tuple[str, str, str]:
    if not errors:
        return "0", "", ""
    return str(len(errors)), f"{statistics.median(errors):.1%}", f"{max(errors):.0%}"


def findings() -> tuple[list[Titled], list[str]]:
    """The tables, and notes on them."""
    rows, left_out = read()
    sections = [list(table_rows([row for row in rows if row.mode == mode])) for mode in MODES]
    tables: list[Titled] = [
        ("Published and predicted", COLUMNS, sections),
        ("Absolute error, of rows that nothing was fitted on", SUMMARY, [list(summary_rows(rows))]),
    ]
    notes = [
        f"{letter}: {text}" for letter, text in ASSUMED.items() if any(letter in r.assumed for r in rows)
    ]
    notes += ['*: a constant of "fitted" was fitted on this row', GENERAL]
    notes.append(f"predicted: {len(rows)} of {len(rows) + len(left_out)} rows")
    notes += [f"not predicted: row {number}, {reason}" for number, reason in left_out.items()]
    return tables, notes


def as_markdown() -> str:
    """The tables and notes as in docs/model.md."""
    tables, notes = findings()
    return "\n".join([*(markdown(*each) for each in tables), *(f"* {note}" for note in notes)]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--markdown", action="store_true", help="print Markdown")
    if parser.parse_args().markdown:
        print(as_markdown(), end="")
    else:
        tables, notes = findings()
        show(*(table(*each) for each in tables), *notes)


if __name__ == "__main__":
    main()
