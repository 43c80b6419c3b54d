"""What one dispatch costs besides its rows, by number of ranks: computed up to 2048, and measured up to 16.

    python bench/scaling.py [--json FILE]

Messages and bytes are those that a rank sends to other nodes (``ExpertParallel.stats``), without what UCX and
the network add. Measured with in-process ranks, whose messages go through UCX as those of processes do.
docs/scaling.md has the formulas.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

import commlib
from bench.harness.machine import host
from bench.harness.report import Titled, show, table
from bench.harness.samples import write_samples
from commlib import ExpertParallel
from commlib.model import UniformRouting

HEADER, CHUNK_HEADER, CHUNK, MAILBOX, WORD = 24, 64, 60 << 10, 1152, 8
RING_BUDGET, LEAST_CHUNKS, MOST_CHUNKS = 64 << 20, 2, 32


@dataclass(frozen=True)
class Case:
    """A dispatch with uniform routing, two hops, one queue in each channel."""

    ranks: int
    node: int
    experts: int
    topk: int
    tokens: int
    hidden: int
    itemsize: int = 2

    @property
    def nodes(self) -> int:
        return self.ranks // self.node

    @property
    def far(self) -> int:
        return self.ranks - self.node

    @property
    def count_words(self) -> int:
        return self.ranks + math.ceil(self.experts / self.ranks)

    @property
    def frame_bytes(self) -> int:
        head = 4 + 4 * self.node + 4 * self.topk
        head = _up(_up(head, 8) + 4 * self.topk, 16)
        return head + _up(self.hidden * self.itemsize, 16)

    def frames(self) -> float:
        """Expected rows to each other node."""
        shares = UniformRouting(self.experts, self.topk, self.ranks, self.nodes).node_share
        return self.tokens * sum(shares) / len(shares)

    def sent(self) -> dict[str, float]:
        """Messages and bytes that one rank sends in one dispatch."""
        per_chunk = (max(CHUNK, CHUNK_HEADER + self.frame_bytes) - CHUNK_HEADER) // self.frame_bytes
        chunks = (self.nodes - 1) * max(1.0, self.frames() / per_chunk)
        rows = (self.nodes - 1) * self.frames() * self.hidden * self.itemsize
        frames = (self.nodes - 1) * self.frames() * self.frame_bytes
        words = self.far * (2 * HEADER + WORD + WORD * self.count_words)
        flow = chunks * (2 * HEADER + CHUNK_HEADER)
        return {
            "row messages": chunks,
            "other messages": 2 * self.far + chunks,
            "row bytes": rows,
            "other bytes": words + flow + frames - rows,
        }

    def memory(self) -> dict[str, float]:
        """Bytes of one rank besides its slots."""
        control = self.ranks * MAILBOX + 2 * self.ranks * WORD * self.count_words
        rings = 4 * (self.nodes - 1)
        chunks = LEAST_CHUNKS
        while chunks < MOST_CHUNKS and 2 * chunks * rings * CHUNK <= RING_BUDGET:
            chunks *= 2
        return {
            "control": control,
            "words for far ranks": self.far * 2 * WORD * self.count_words,
            "rings": rings * chunks * CHUNK,
        }


def _up(n: int, to: int) -> int:
    return (n + to - 1) // to * to


def measure(case: Case) -> dict[str, float]:
    """Messages and bytes of one dispatch, averaged over ranks."""

    def rank_main(rank: int) -> tuple[int, int, int]:
        g = torch.Generator().manual_seed(rank)
        idx = torch.rand(case.tokens, case.experts, generator=g).topk(case.topk).indices
        x = torch.zeros(case.tokens, case.hidden, dtype=torch.bfloat16)
        weights = torch.rand(case.tokens, case.topk, generator=g)
        with ExpertParallel(
            num_experts=case.experts,
            hidden=case.hidden,
            topk=case.topk,
            max_tokens=case.tokens,
            num_sms=1,
            routing="hierarchical",
            ranks_per_node=case.node,
        ) as ep:
            ep.dispatch(x, idx, weights)
            ep.group.barrier()  # all have received all rows, and have said so
            ep.dispatch(x, idx, weights)
            ep.group.barrier()
            stats = ep.stats()
            memory = ep.memory_report()
            return stats["network_messages"] // 2, stats["network_bytes"] // 2, memory.network

    results = commlib.run_ranks(rank_main, case.ranks)
    messages, sent, memory = (sum(r[i] for r in results) / case.ranks for i in range(3))
    return {"messages": messages, "bytes": sent, "network memory": memory}


def measured_table(measured: list[dict[str, Any]]) -> Titled:
    """What was sent beside what the formulas say."""
    rows = [
        [
            str(found["ranks"]),
            str(found["ranks"] // found["node"]),
            f"{found['messages']:.0f}",
            f"{found['predicted messages']:.0f}",
            f"{found['bytes']:,.0f}",
            f"{found['predicted bytes']:,.0f}",
            f"{found['bytes'] / found['predicted bytes']:.3f}",
        ]
        for found in measured
    ]
    title = "Measured: one dispatch, by one rank (T=128 H=1024 bf16, top-8 of 64, weights)"
    return title, ("ranks", "nodes", "messages", "worked out", "bytes", "worked out", "ratio"), [rows]


def predicted_table(predicted: list[dict[str, Any]]) -> Titled:
    """What the formulas say of more ranks than one machine has."""
    rows = [
        [
            str(found["ranks"]),
            f"{found['row messages']:,.0f}",
            f"{found['other messages']:,.0f}",
            f"{found['row bytes'] / 1e6:,.1f}",
            f"{found['other bytes'] / found['row bytes']:.1%}",
            f"{(found['control'] + found['words for far ranks']) / 1e6:,.1f}",
            f"{found['rings'] / 1e6:,.0f}",
        ]
        for found in predicted
    ]
    title = "Worked out: one dispatch, by one rank (T=4096 H=7168 bf16, top-8 of 256, 8 ranks a node)"
    columns = ("ranks", "row messages", "other messages", "rows MB", "beside them", "control MB", "rings MB")
    return title, columns, [rows]


def measure_beside_formulas(case: Case) -> dict[str, Any]:
    """What a case sends, and what the formulas say."""
    sent = case.sent()
    return (
        asdict(case)
        | measure(case)
        | {
            "predicted messages": sent["row messages"] + sent["other messages"],
            "predicted bytes": sent["row bytes"] + sent["other bytes"],
        }
    )


def predict() -> list[dict[str, Any]]:
    """The formulas, up to 2048 ranks."""
    large = Case(ranks=16, node=8, experts=256, topk=8, tokens=4096, hidden=7168)
    # More ranks than experts: in practice experts are then replicated; here their number grows.
    cases = [replace(large, ranks=r, experts=max(256, r)) for r in (16, 32, 64, 128, 256, 512, 1024, 2048)]
    return [asdict(case) | case.sent() | case.memory() for case in cases]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="where to write what was measured; default: nowhere")
    args = parser.parse_args()
    small = Case(ranks=4, node=2, experts=64, topk=8, tokens=128, hidden=1024)
    cases = [replace(small, ranks=r, node=n) for r, n in ((4, 2), (8, 2), (8, 4), (16, 2), (16, 4), (16, 8))]
    measured, predicted = [measure_beside_formulas(case) for case in cases], predict()
    show(table(*measured_table(measured)), table(*predicted_table(predicted)))
    if args.json:
        write_samples(args.json, {"machine": host(), "measured": measured, "predicted": predicted})


if __name__ == "__main__":
    main()
