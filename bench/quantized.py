"""Dispatch of rows as they are and of rows that are quantized on their way, over links of a given rate.

    python bench/quantized.py [--link-gbps 0.5 0] [--tokens 1024] [--ranks 2] [--json FILE]

All in one run, in turns. The limit is emulated (``link_gbps``, 0: none), and each rank is a thread with one
communication thread, so that few cores do. Bytes are those of rows and scales to other ranks, of all ranks.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch

import commlib
from bench.harness.facts import commit
from bench.harness.machine import host
from bench.harness.report import show, table
from bench.harness.samples import write_samples
from bench.harness.stats import Stats
from commlib import ExpertParallel
from commlib.quantization import FORMATS

EXPERTS, HIDDEN, TOPK, WARM_UP = 64, 7168, 8, 3
PLAIN = "bf16"


def rank_main(rank: int, ranks: int, tokens: int, gbps: float, rounds: int) -> tuple[dict[str, Any], int]:
    """Seconds of each call by what was sent, and how many rows went to other ranks."""
    g = torch.Generator().manual_seed(rank)
    x = torch.randn(tokens, HIDDEN, generator=g).to(torch.bfloat16)
    topk_idx = torch.rand(tokens, EXPERTS, generator=g).topk(TOPK).indices
    taken: dict[str, list[float]] = {name: [] for name in (PLAIN, *FORMATS)}
    shape = dict(num_experts=EXPERTS, hidden=HIDDEN, topk=TOPK, max_tokens=tokens, num_sms=1, device="cpu")
    with ExpertParallel(**shape, link_gbps=gbps or None) as ep:
        for i in range(WARM_UP + rounds):
            for name, seconds in taken.items():
                ep.group.barrier()
                begun = time.perf_counter()
                ep.dispatch(x, topk_idx, zero_copy=True, quantize=None if name == PLAIN else name)
                if i >= WARM_UP:
                    seconds.append(time.perf_counter() - begun)
    owners = (topk_idx * ranks // EXPERTS).sort(-1).values  # EXPERTS is a multiple of ranks
    rows = tokens + int((owners[:, 1:] != owners[:, :-1]).sum())
    return taken, rows - int((owners == rank).any(-1).sum())


def bytes_of(name: str) -> int:
    """Of a row and its scales."""
    one = torch.zeros(1, HIDDEN, dtype=torch.bfloat16)
    parts = (one,) if name == PLAIN else commlib.quantize(one, name)
    return sum(part.nbytes for part in parts)


def measure(ranks: int, tokens: int, gbps: float, rounds: int) -> dict[str, Any]:
    """One limit: bytes, and seconds of the slowest rank, by what was sent."""
    found = commlib.run_ranks(rank_main, ranks, ranks, tokens, gbps, rounds, device="cpu")
    rows = sum(n for _, n in found)
    return {
        name: {
            "bytes": rows * bytes_of(name),
            "seconds": [max(each) for each in zip(*(taken[name] for taken, _ in found), strict=True)],
        }
        for name in found[0][0]
    }


def rows_of(gbps: float, result: dict[str, Any]) -> list[list[str]]:
    """One limit's part of the table."""
    link = f"{gbps:g} GB/s" if gbps else "no limit"
    stats = {name: Stats.of(each["seconds"]) for name, each in result.items()}
    return [
        [
            link,
            name,
            f"{result[name]['bytes'] / 1e6:.1f}",
            stats[name].text(),
            f"{stats[name].median / stats[PLAIN].median:.2f}",
        ]
        for name in result
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--link-gbps", type=float, nargs="+", default=[0.5, 0.0])
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    results = {g: measure(args.ranks, args.tokens, g, args.rounds) for g in args.link_gbps}
    sections = [rows_of(*item) for item in results.items()]
    columns = ["link", "rows", "MB to others", "ms (range)", "of bf16"]
    show(table(f"dispatch, {args.ranks} ranks of {args.tokens} tokens", columns, sections))
    if args.json:
        config = {name: value for name, value in vars(args).items() if name != "json"}
        samples = {f"{gbps:g}": result for gbps, result in results.items()}
        write_samples(args.json, {"machine": host(), "commit": commit(), "config": config, "links": samples})


if __name__ == "__main__":
    main()
