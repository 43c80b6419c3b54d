"""The job that every system is given, and the right answer, computed without any communication."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

# Relative to the norm. Weights' gradients are summed over chunks, each part rounded to the dtype.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}


class WrongResults(Exception):
    """A system answered wrongly: there is nothing to measure."""


def require_equal_blocks(experts: int, ranks: int) -> None:
    """End the program unless each rank gets as many experts: what we compare with knows nothing else."""
    if experts % ranks:
        sys.exit(f"--experts {experts} do not divide by {ranks} ranks")


@dataclass(frozen=True)
class Shape:
    """The shape of what is moved, the same on all ranks."""

    tokens: int
    hidden: int
    experts: int
    topk: int
    dtype: torch.dtype
    seed: int

    @property
    def sizes(self) -> dict[str, Any]:
        """The sizes, by the names that ExpertParallel and the baselines have for them."""
        return {
            "num_experts": self.experts,
            "hidden": self.hidden,
            "topk": self.topk,
            "max_tokens": self.tokens,
            "dtype": self.dtype,
        }


@dataclass(frozen=True)
class Received:
    """What a dispatch yields: rows ``[N, H]``, local expert ids and weights ``[N, K]``."""

    rows: Tensor
    topk_idx: Tensor
    topk_weights: Tensor


@dataclass(frozen=True)
class Job:
    """One rank's part: its tokens, the rows it must receive, the experts' outputs, the sums."""

    x: Tensor  # [T, H]
    topk_idx: Tensor  # [T, K] int64
    topk_weights: Tensor  # [T, K] float32
    expected: Received
    y: Tensor  # [N, H] this rank's experts' outputs for the rows
    output: Tensor  # [N, H] an ordinary tensor for experts to write y to, before each combine
    expected_sum: Tensor  # [T, H] float32, not rounded to the rows' dtype

    @staticmethod
    def build(
        shape: Shape,
        rank: int,
        ranks: int,
        device: torch.device | str = "cpu",
        *,
        row_per_expert: bool = False,
        tokens: Sequence[int] | None = None,
    ) -> Job:
        """Make this rank's tokens, and the other ranks' too, to know what must come from them.

        An expert here scales a row by its rank's factor, so that a row summed from the wrong rank
        shows. Another kind of device draws other tokens.

        Args:
            row_per_expert: a token sends a row for each of its experts, not one for each rank.
            tokens: of each rank; None: the shape's, on every rank.
        """
        local_experts = shape.experts // ranks
        shapes = [
            shape if tokens is None else replace(shape, tokens=tokens[source]) for source in range(ranks)
        ]
        received = []
        for source in range(ranks):
            theirs = _tokens_of(shapes[source], source, device)
            sent = _pairs_of(*theirs) if row_per_expert else theirs
            received.append(_rows_for(rank, local_experts, *sent))
        rows, ids, weights = (torch.cat(parts) for parts in zip(*received, strict=True))
        x, topk_idx, topk_weights = _tokens_of(shapes[rank], rank, device)
        total = torch.zeros(x.shape, dtype=torch.float32, device=device)
        for owner in range(ranks):
            experts = (topk_idx // local_experts == owner).sum(1, keepdim=True)
            total += expert(x, owner) * (experts if row_per_expert else experts.clamp(max=1))
        y = expert(rows, rank)
        return Job(
            x=x,
            topk_idx=topk_idx,
            topk_weights=topk_weights,
            expected=Received(rows, ids, weights),
            y=y,
            output=torch.empty_like(y),
            expected_sum=total,
        )

    def wrong_rows(self, got: Received) -> list[str]:
        """The differences, bit for bit, from the rows and metadata that must arrive."""
        return different_rows(
            {
                "rows": (got.rows, self.expected.rows),
                "topk_idx": (got.topk_idx.long(), self.expected.topk_idx),
                "topk_weights": (got.topk_weights, self.expected.topk_weights),
            }
        )

    def wrong_sum(self, out: Tensor) -> list[str]:
        """Where a combine is further from the exact sum than one rounding to the rows' dtype."""
        exact = self.expected_sum
        largest = float(self.y.abs().max()) if self.y.numel() else 0.0
        rounding = torch.finfo(out.dtype).eps * exact.abs()
        summing = 32 * torch.finfo(exact.dtype).eps * largest
        return different_sums(out, exact, rounding + summing)


def different_rows(pairs: Mapping[str, tuple[Tensor, Tensor]]) -> list[str]:
    """The tensors, by name, that are not bit for bit as they must be; each is got, then expected."""
    return [text for name, (got, expected) in pairs.items() if (text := _difference(name, got, expected))]


def _difference(name: str, got: Tensor, expected: Tensor) -> str:
    if got.shape != expected.shape:
        return f"{name} {list(got.shape)}, not {list(expected.shape)}"
    if torch.equal(got, expected):
        return ""
    differ = got != expected
    rows = differ.any(1) if differ.dim() > 1 else differ
    return f"{name}: {int(rows.sum())} of {len(rows)} rows differ"


def different_sums(out: Tensor, exact: Tensor, allowed: Tensor) -> list[str]:
    """Where sums ``[T, H]`` are further from the exact ones than is allowed."""
    if out.shape != exact.shape:
        return [f"sum {list(out.shape)}, not {list(exact.shape)}"]
    off = ~((out.to(exact.dtype) - exact).abs() <= allowed)  # NaN is off, too
    return [f"sum: {int(off.sum())} of {off.numel()} values differ"] if off.any() else []


def _tokens_of(shape: Shape, rank: int, device: torch.device | str) -> tuple[Tensor, Tensor, Tensor]:
    """A rank's rows and routing: experts drawn uniformly, none twice for a token."""
    generator = torch.Generator(device).manual_seed(shape.seed * 4096 + rank)
    draw = {"generator": generator, "device": device}
    scores = torch.rand(shape.tokens, shape.experts, **draw)
    topk_idx = scores.topk(shape.topk, dim=1).indices
    logits = torch.randn(shape.tokens, shape.topk, **draw)
    x = torch.randn(shape.tokens, shape.hidden, **draw).to(shape.dtype)
    return x, topk_idx, logits.softmax(1)


def _pairs_of(x: Tensor, topk_idx: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Each (token, expert) pair as a token with one expert."""
    return x.repeat_interleave(topk_idx.shape[1], 0), topk_idx.reshape(-1, 1), weights.reshape(-1, 1)


def _rows_for(
    rank: int, local_experts: int, x: Tensor, topk_idx: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """A source's rows that go to `rank`, with ids as that rank counts its experts."""
    mine = topk_idx // local_experts == rank
    goes = mine.any(1)
    local = torch.where(mine, topk_idx % local_experts, -1)
    return x[goes], local[goes], torch.where(mine, weights, 0.0)[goes]


def expert(rows: Tensor, rank: int) -> Tensor:
    """The output of a rank's experts for rows."""
    return (rows.float() * (1 + rank / 4)).to(rows.dtype)


@dataclass(frozen=True)
class LinkRows:
    """Rows of the busiest rank that cross its link in one direction: once for each rank that a token goes to,
    and once for each of its experts."""

    unique: int
    each: int

    @staticmethod
    def of(topk_idx: Tensor, local_experts: int, rank: int) -> LinkRows:
        """Of one rank's tokens."""
        owner = topk_idx // local_experts
        remote = owner[owner != rank]
        unique = sum(int((owner == r).any(1).sum()) for r in remote.unique().tolist())
        return LinkRows(unique, remote.numel())

    @staticmethod
    def busiest(ranks: Sequence[LinkRows]) -> LinkRows:
        return LinkRows(max(r.unique for r in ranks), max(r.each for r in ranks))


def add_shape_arguments(parser: argparse.ArgumentParser, tokens: int | Sequence[int]) -> None:
    """Options for the rows that are moved; `tokens` is the default, several if the program takes several."""
    several: dict[str, Any] = {} if isinstance(tokens, int) else {"nargs": "+"}
    parser.add_argument("--tokens", type=int, default=tokens, help="tokens on each rank", **several)
    parser.add_argument("--hidden", type=int, default=7168)
    parser.add_argument("--experts", type=int, default=64, help="over all ranks")
    parser.add_argument("--topk", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)


def distance(got: Tensor, want: Tensor) -> float:
    """The distance of two tensors, relative to the norm of the second, if that is not 0."""
    off, norm = float((got.float() - want.float()).norm()), float(want.float().norm())
    return off / norm if norm else off
