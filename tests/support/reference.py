"""What dispatch and combine must give, in plain PyTorch: all ranks' inputs at hand, nothing sharded."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass
class World:
    """One problem: every rank's tokens."""

    num_experts: int
    topk: int
    hidden: int
    dtype: torch.dtype
    x: list[Tensor]  # by rank, [T, H]
    topk_idx: list[Tensor]  # [T, K]
    topk_weights: list[Tensor]  # [T, K]

    @property
    def size(self) -> int:
        return len(self.x)

    @property
    def weight_dtype(self) -> torch.dtype:
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    @property
    def device(self) -> torch.device:
        return self.x[0].device

    @property
    def max_tokens(self) -> int:
        return max(1, *(len(x) for x in self.x))

    def experts_of(self, rank: int) -> range:
        r, e, n = rank, self.num_experts, self.size
        return range(r * e // n, (r + 1) * e // n)

    def config(self) -> dict:
        """Arguments for ExpertParallel."""
        return {
            "num_experts": self.num_experts,
            "hidden": self.hidden,
            "topk": self.topk,
            "max_tokens": self.max_tokens,
            "dtype": self.dtype,
            "device": self.device,
            "timeout": 30.0,
        }

    def to(self, device: torch.device | str) -> World:
        """The same problem with its tensors on ``device``."""
        x, topk_idx, topk_weights = (
            [t.to(device) for t in tensors] for tensors in (self.x, self.topk_idx, self.topk_weights)
        )
        return replace(self, x=x, topk_idx=topk_idx, topk_weights=topk_weights)


def make_world(
    tokens: list[int],
    num_experts: int = 8,
    topk: int = 2,
    hidden: int = 64,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    holes: float = 0.1,
    device: torch.device | str = "cpu",
) -> World:
    """Random rows and duplicate-free random routing, a share of its places (``holes``) left empty.

    The same values on every device.
    """
    g = torch.Generator().manual_seed(seed)
    idx, x, w = [], [], []
    weight_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    for t in tokens:
        chosen = torch.rand(t, num_experts, generator=g).topk(topk).indices
        chosen[torch.rand(t, topk, generator=g) < holes] = -1
        idx.append(chosen)
        x.append(torch.randn(t, hidden, generator=g, dtype=torch.float64).to(dtype))
        w.append(torch.rand(t, topk, generator=g, dtype=weight_dtype))
    return World(num_experts, topk, hidden, dtype, x, idx, w).to(device)


@dataclass
class Expected:
    """A rank's part of a dispatch, on the CPU whatever the world's device."""

    x: Tensor
    topk_idx: Tensor | None
    topk_weights: Tensor
    source: Tensor
    tokens_per_expert: list[int]
    offsets: list[int] | None


def expected_rank_layout(world: World, rank: int) -> Expected:
    """Unique rows, by source rank, then token."""
    world = world.to("cpu")
    mine = world.experts_of(rank)
    rows, ids, weights, source = [], [], [], []
    counts = [0] * len(mine)
    for src in range(world.size):
        for t, chosen in enumerate(world.topk_idx[src].tolist()):
            local = [e - mine.start if e in mine else -1 for e in chosen]
            if all(e < 0 for e in local):
                continue
            for e in local:
                counts[e] += e >= 0
            rows.append(world.x[src][t])
            ids.append(local)
            w = world.topk_weights[src][t]
            weights.append(torch.where(torch.tensor(local) >= 0, w, torch.zeros_like(w)))
            source.append([src, t])
    k = world.topk
    return Expected(
        x=torch.stack(rows) if rows else torch.empty(0, world.hidden, dtype=world.dtype),
        topk_idx=torch.tensor(ids, dtype=torch.int64).view(-1, k),
        topk_weights=torch.stack(weights) if rows else torch.empty(0, k, dtype=world.weight_dtype),
        source=torch.tensor(source, dtype=torch.int64).view(-1, 2),
        tokens_per_expert=counts,
        offsets=None,
    )


def expected_expert_layout(world: World, rank: int, align: int) -> Expected:
    """Rows grouped by local expert, each group padded with zeros to a multiple of ``align``."""
    world = world.to("cpu")
    unique = expected_rank_layout(world, rank)
    assert unique.topk_idx is not None
    rows, weights, source, offsets = [], [], [], [0]
    for expert in range(len(world.experts_of(rank))):
        group, place = (unique.topk_idx == expert).nonzero(as_tuple=True)
        padding = -len(group) % align
        rows += [unique.x[group], torch.zeros(padding, world.hidden, dtype=world.dtype)]
        weights += [
            unique.topk_weights[group, place],
            torch.zeros(padding, dtype=world.weight_dtype),
        ]
        source += [unique.source[group], torch.full((padding, 2), -1)]
        offsets.append(offsets[-1] + len(group) + padding)
    empty = torch.empty(0, world.hidden, dtype=world.dtype)
    return Expected(
        x=torch.cat([empty, *rows]),
        topk_idx=None,
        topk_weights=torch.cat([torch.empty(0, dtype=world.weight_dtype), *weights]),
        source=torch.cat([torch.empty(0, 2, dtype=torch.int64), *source]),
        tokens_per_expert=unique.tokens_per_expert,
        offsets=offsets,
    )


def copies_of_tokens(world: World, rank: int) -> Tensor:
    """How many ranks each of a rank's tokens goes to: ``[T, 1]`` int64, on the world's device."""
    counts = [
        sum(any(e in world.experts_of(r) for e in chosen) for r in range(world.size))
        for chosen in world.topk_idx[rank].tolist()
    ]
    return torch.tensor(counts, dtype=torch.int64, device=world.device).view(-1, 1)


def expert_scale(expert: int) -> float:
    """A stand-in for an expert: it multiplies its rows. Exact in every dtype."""
    return 1.0 + (expert % 4) / 4


def expected_combine(world: World, rank: int) -> Tensor:
    """sum over a token's experts of weight * expert(row), in float64, on the CPU."""
    world = world.to("cpu")
    out = torch.zeros(len(world.x[rank]), world.hidden, dtype=torch.float64)
    for t, chosen in enumerate(world.topk_idx[rank].tolist()):
        for k, e in enumerate(chosen):
            if e >= 0:
                w = world.topk_weights[rank][t, k].double()
                out[t] += w * expert_scale(e) * world.x[rank][t].double()
    return out


def apply_experts(world: World, rank: int, rows: Tensor, offsets: list[int]) -> Tensor:
    """Grouped rows through the stand-in experts of a rank."""
    out = rows.clone()
    for i, expert in enumerate(world.experts_of(rank)):
        out[offsets[i] : offsets[i + 1]] *= expert_scale(expert)
    return out


def tolerance(dtype: torch.dtype, terms: int) -> dict[str, float]:
    """For sums of ``terms`` products of rows of a dtype, rounded once on each rank and once at the end."""
    eps = torch.finfo(dtype).eps
    return {"rtol": 2 * eps, "atol": 4 * terms * eps}
