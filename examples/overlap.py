"""Draw when a mixture-of-experts block communicates and computes: in sequence, in chunks, in two batches.

    mpirun -n 2 python examples/overlap.py --plot overlap.png --trace overlap.json

One rank's forward and backward of one block (attention, then experts over the ranks), three ways: sequential;
``MoELayer(overlap_chunks=n)``; and ``TwoBatch``, two half batches in turns. For each, the picture has a row
for compute and one for communication. ``--trace`` writes the last way for ui.perfetto.dev. On a machine with
fewer than two cores for each rank the threads take turns, and the picture shows that, too.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import commlib
from commlib.nn import MoELayer
from commlib.overlap import Steps, TwoBatch
from commlib.timeline import COMMUNICATION, COMPUTE, Timeline


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=1024, help="of a rank; a batch of two sequences")
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--ffn-hidden", type=int, default=512)
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--topk", type=int, default=4)
    parser.add_argument("--chunks", type=int, default=4)
    parser.add_argument("--partition", action="store_true", help="keep communication on a core of its own")
    parser.add_argument("--plot", type=Path, default=Path("overlap.png"))
    parser.add_argument("--trace", type=Path, help="Perfetto trace of TwoBatch")
    return parser.parse_args()


class Block(nn.Module):
    """Attention, then experts; notes on the timeline what it computes."""

    def __init__(self, args: argparse.Namespace, ep: commlib.ExpertParallel, chunks: int) -> None:
        super().__init__()
        h = args.hidden
        self.heads = 8
        self.qkv, self.out = nn.Linear(h, 3 * h, bias=False), nn.Linear(h, h, bias=False)
        self.moe = MoELayer(
            *(h, args.ffn_hidden, args.experts, args.topk, ep), overlap_chunks=chunks, dtype=torch.float32
        )
        self.timeline: Timeline | None = None
        experts = self.moe.experts.forward
        self.moe.experts.forward = lambda x, offsets: self.noted("experts", experts, x, offsets)

    def noted(self, name: str, fn: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """Run fn, and note it and its backward."""
        assert self.timeline is not None
        with self.timeline.compute(name):
            out = fn(*inputs)
        return out

    def attention(self, x: Tensor) -> Tensor:
        q, k, v = (
            t.view(x.shape[0], x.shape[1], self.heads, -1).transpose(1, 2) for t in self.qkv(x).chunk(3, -1)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + self.out(mixed.transpose(1, 2).reshape(x.shape))

    def forward(self, x: Tensor) -> Tensor:
        x = self.noted("attention", self.attention, x)
        return x + self.moe(x)[0]

    def steps(self, x: Tensor) -> Steps[Tensor]:
        x = self.noted("attention", self.attention, x)
        y, _ = yield from self.moe.steps(x)
        return x + y


def run(way: str, block: Block, x: Tensor) -> Tensor:
    if way == "two batches":
        return torch.cat(TwoBatch(block.steps)(*x.chunk(2)))
    return block(x)


def trace(way: str, args: argparse.Namespace, ep: commlib.ExpertParallel, rank: int) -> Timeline:
    """The second of two runs; the first starts threads and faults pages in."""
    torch.manual_seed(rank)
    block = Block(args, ep, args.chunks if way == "chunks" else 1)
    x = torch.randn(2, args.tokens // 2, args.hidden)
    for _ in range(2):
        ep.group.barrier()
        with Timeline(ep) as timeline:
            block.timeline = timeline
            out = run(way, block, x)
            loss = out.square().mean()
            with timeline.compute("backward (and its waits)"):
                loss.backward()
    return timeline


def plot(path: Path, timelines: dict[str, Timeline]) -> None:
    import matplotlib.pyplot as plt

    colors = {"attention": "#7aa6c2", "experts": "#2f6690", "backward (and its waits)": "#c9d6df"}
    figure, axes = plt.subplots(len(timelines), 1, sharex=True, figsize=(11, 2 + 1.5 * len(timelines)))
    for axis, (way, timeline) in zip(axes, timelines.items(), strict=True):
        for i in timeline.intervals:
            color = colors.get(
                i.name, {"dispatch": "#d1495b", "redispatch": "#e28995"}.get(i.name, "#edae49")
            )
            y = 1 if i.lane == COMPUTE else 0
            axis.barh(y, (i.end - i.begin) * 1e3, left=i.begin * 1e3, color=color, edgecolor="white", lw=0.4)
        axis.set(yticks=[0, 1], yticklabels=[COMMUNICATION, COMPUTE], title=way)
    axes[-1].set_xlabel("ms; red: dispatch, light red: along known routes (backward), yellow: combine")
    figure.savefig(path, dpi=150, bbox_inches="tight")


def main() -> None:
    args = parse_arguments()
    cores = len(os.sched_getaffinity(0))
    partition = commlib.SMPartition(comm=1, device="cpu") if args.partition and cores > 1 else None
    torch.set_num_threads(1)
    config = dict(num_experts=args.experts, hidden=args.hidden, topk=args.topk, max_tokens=args.tokens)
    with commlib.ExpertParallel(device="cpu", dtype=torch.float32, partition=partition, **config) as ep:
        timelines = {}
        for way in ("sequential", "chunks", "two batches"):
            timelines[way] = trace(way, args, ep, ep.rank)
        if ep.rank == 0:
            for way, t in timelines.items():
                length = max(i.end for i in t.intervals)
                print(
                    f"{way:12} {length * 1e3:7.1f} ms, communication {t.busy(COMMUNICATION) * 1e3:6.1f} ms, "
                    f"of which {t.both_busy() * 1e3:6.1f} ms beside compute"
                )
            plot(args.plot, timelines)
            if args.trace:
                timelines["two batches"].save_perfetto(args.trace)
        ep.group.barrier()


if __name__ == "__main__":
    main()
