"""What a call costs besides its rows: one rank, which waits for no other, and one token.

    python bench/one_rank.py [--calls 6000] [--json FILE]

Without a copy (``zero_copy``), one communication thread, no gradient. Only Python, PyTorch and the core work
here, so the fastest calls say most on a machine that does other things besides.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch

from bench.harness.machine import host
from bench.harness.report import show, table
from bench.harness.samples import write_samples
from commlib import ExpertParallel

EXPERTS, HIDDEN, TOPK = 64, 7168, 8


def measure(calls: int) -> dict[str, list[float]]:
    """Seconds of each call, by its name."""
    x = torch.randn(1, HIDDEN).to(torch.bfloat16)
    topk_idx = torch.randperm(EXPERTS)[:TOPK].view(1, TOPK)
    taken: dict[str, list[float]] = {"dispatch": [], "combine": []}
    shape = dict(num_experts=EXPERTS, hidden=HIDDEN, topk=TOPK, max_tokens=128)
    with ExpertParallel(**shape, num_sms=1, device="cpu") as ep:
        for _ in range(calls):
            begun = time.perf_counter()
            d = ep.dispatch(x, topk_idx, zero_copy=True)
            between = time.perf_counter()
            ep.combine(d.x, d.handle)
            ended = time.perf_counter()
            taken["dispatch"].append(between - begun)
            taken["combine"].append(ended - between)
            del d
    return taken


def row(name: str, seconds: list[float]) -> list[str]:
    tenth = statistics.quantiles(seconds, n=10)[0]
    return ["one rank, one token", name, *(f"{s * 1e6:.1f}" for s in (tenth, statistics.median(seconds)))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--calls", type=int, default=6000)
    parser.add_argument("--json", type=Path, help="where all samples go")
    args = parser.parse_args()
    torch.set_num_threads(1)
    taken = measure(args.calls)
    taken["both"] = [sum(pair) for pair in zip(taken["dispatch"], taken["combine"], strict=True)]
    columns = ("what", "call", "µs, 10 % below", "median")
    show(table("What a call costs besides its rows", columns, [[row(*item) for item in taken.items()]]))
    if args.json:
        write_samples(args.json, {"machine": host(), "config": {"calls": args.calls}, "samples_s": taken})


if __name__ == "__main__":
    main()
