"""Which tokens go where, from ids of experts or from a mask of ranks."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from commlib._core import Placement
from commlib.compat.deep_ep.errors import require

topk_idx_t = torch.int64
MAX_TOPK = 32  # of commlib


class Layout(NamedTuple):
    """What ``Buffer.get_dispatch_layout`` finds."""

    num_tokens_per_rank: Tensor  # [R] int32
    num_tokens_per_expert: Tensor  # [E] int32
    is_token_in_rank: Tensor  # [T, R] bool


def local_experts(num_experts: int, ranks: int) -> int:
    """Experts of each rank.

    Raises:
        Refused: E is not a positive multiple of R, as DeepEP needs.
    """
    require(
        num_experts > 0 and num_experts % ranks == 0,
        f"num_experts must be a positive multiple of the {ranks} ranks, got {num_experts}",
    )
    return len(Placement(num_experts, ranks).experts_of(0))


def check_topk_idx(topk_idx: Any, num_experts: int) -> None:
    """Check that ids can be dispatched. On a GPU not their range: the host would have to wait.

    Raises:
        TypeError, Refused: they are not ``[T, K]`` topk_idx_t.
        ValueError: an id lies outside [-1, E).
    """
    if not isinstance(topk_idx, Tensor):
        raise TypeError(f"topk_idx must be a tensor, got {type(topk_idx).__name__}")
    require(topk_idx.dim() == 2, f"topk_idx must be [tokens, topk], got {list(topk_idx.shape)}")
    require(
        topk_idx.dtype == topk_idx_t,
        f"topk_idx must be deep_ep.topk_idx_t, {topk_idx_t}, got {topk_idx.dtype}",
    )
    if topk_idx.is_cuda:
        return
    wrong = ((topk_idx < -1) | (topk_idx >= num_experts)).nonzero()
    if len(wrong):
        token, place = wrong[0].tolist()
        raise ValueError(
            f"topk_idx[{token}, {place}] is {topk_idx[token, place].item()}, outside [-1, {num_experts})"
        )


def check_topk(topk: int, num_experts: int) -> None:
    """Check a token's number of places.

    Raises:
        ValueError: more than 32, more than experts, or none.
    """
    if not 1 <= topk <= min(MAX_TOPK, num_experts):
        raise ValueError(
            f"topk_idx has {topk} places for each token; commlib takes 1 to {MAX_TOPK}, and no more than the "
            f"{num_experts} experts"
        )


def find_layout(topk_idx: Tensor, num_experts: int, ranks: int) -> Layout:
    """The layout of ids; -1 is nowhere. A token counts once for each of its ranks, and of its places."""
    known = (topk_idx >= 0) & (topk_idx < num_experts)
    expert = torch.where(known, topk_idx, num_experts)
    rank = torch.where(known, topk_idx // local_experts(num_experts, ranks), ranks)
    mask = torch.zeros(len(topk_idx), ranks + 1, dtype=torch.bool, device=topk_idx.device)
    mask = mask.scatter_(1, rank, True)[:, :ranks].contiguous()
    counts = torch.zeros(num_experts + 1, dtype=torch.int32, device=topk_idx.device)
    flat = expert.flatten()
    counts.scatter_add_(0, flat, torch.ones_like(flat, dtype=torch.int32))
    return Layout(mask.sum(0, dtype=torch.int32), counts[:num_experts].clone(), mask)


def check_beside(x: Tensor, **tensors: Any) -> None:
    """Check that tensors are on the device of the rows.

    Raises:
        TypeError, Refused: one is no tensor, or elsewhere.
    """
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        require(tensor.device == x.device, f"{name} must be on {x.device}, as x is, got {tensor.device}")


def check_layout(layout: Layout, x: Tensor, ranks: int) -> int:
    """The number of experts in a caller's layout.

    Raises:
        TypeError, Refused: tensors of the wrong kind, device, shape or dtype.
    """
    check_beside(x, **layout._asdict())
    tokens = len(x)
    per_rank, per_expert, mask = layout
    require(
        per_rank.shape == (ranks,) and per_rank.dtype == torch.int32,
        f"num_tokens_per_rank must be [{ranks}] int32, got {list(per_rank.shape)} {per_rank.dtype}",
    )
    require(
        per_expert.dim() == 1 and per_expert.dtype == torch.int32,
        f"num_tokens_per_expert must be [experts] int32, got {list(per_expert.shape)} {per_expert.dtype}",
    )
    require(
        mask.shape == (tokens, ranks) and mask.dtype == torch.bool,
        f"is_token_in_rank must be [{tokens}, {ranks}] bool, got {list(mask.shape)} {mask.dtype}",
    )
    local_experts(len(per_expert), ranks)
    return len(per_expert)


def check_agreement(layout: Layout, topk_idx: Tensor) -> None:
    """Check that the mask agrees with the ids, by which commlib sends; not on a GPU.

    Raises:
        ValueError: a token's ranks differ.
    """
    if topk_idx.is_cuda:
        return
    ranks = layout.is_token_in_rank.shape[1]
    found = find_layout(topk_idx, len(layout.num_tokens_per_expert), ranks)
    wrong = (found.is_token_in_rank != layout.is_token_in_rank).any(1).nonzero()
    if len(wrong):
        token = int(wrong[0])
        raise ValueError(
            f"is_token_in_rank[{token}] is {layout.is_token_in_rank[token].tolist()}, but topk_idx[{token}] "
            f"is {topk_idx[token].tolist()}: put -1 into topk_idx where a token is not to go"
        )


def ranks_as_ids(is_token_in_rank: Tensor) -> Tensor:
    """A mask as ids of ranks, ``[T, min(R, 32)]`` int64, as if each rank were an expert.

    Raises:
        ValueError: a token goes to more than 32 ranks.
    """
    ranks = is_token_in_rank.shape[1]
    ids = torch.where(is_token_in_rank, torch.arange(ranks, device=is_token_in_rank.device), -1)
    if ranks <= MAX_TOPK:
        return ids
    most = int(is_token_in_rank.sum(1).max()) if len(ids) else 0
    if most > MAX_TOPK:
        raise ValueError(
            f"a token goes to {most} ranks; commlib sends to {MAX_TOPK} at most without topk_idx"
        )
    return ids.sort(dim=1, descending=True).values[:, :MAX_TOPK].contiguous()


def rounded_up(counts: list[int], alignment: int) -> list[int]:
    """Each count, rounded up to a multiple of ``alignment``."""
    return [-(-n // alignment) * alignment for n in counts]


def check_weights(name: str, weights: Any, shape: tuple[int | None, ...]) -> None:
    """Check that weights are float32 of a shape, in which None is any positive number.

    Raises:
        TypeError, Refused: they are not.
    """
    if not isinstance(weights, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(weights).__name__}")
    fits = weights.dim() == len(shape) and all(
        given == wanted or (wanted is None and given > 0)
        for given, wanted in zip(weights.shape, shape, strict=True)
    )
    told = ["topk" if n is None else n for n in shape]
    require(
        fits and weights.dtype == torch.float32,
        f"{name} must be {told} float32, got {list(weights.shape)} {weights.dtype}",
    )
