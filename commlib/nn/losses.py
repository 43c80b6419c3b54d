"""The losses that routers are trained with besides the model's, and what they count."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Scores(NamedTuple):
    """What a router's loss is made of, for T tokens and E experts, K of which a token chose.

    Attributes:
        logits: ``[T, E]`` float32 (float64 for float64 tokens).
        probs: ``[T, E]``, dtype of logits; a token's sum to 1.
        topk_idx: ``[T, K]`` int64.
    """

    logits: Tensor
    probs: Tensor
    topk_idx: Tensor


def load_balance_loss(probs: Tensor, topk_idx: Tensor) -> Tensor:
    """Auxiliary loss that is smallest, 1, when all experts get the same share of the tokens.

    ``E * sum_e f_e * P_e`` with f_e the fraction of the choices that fell on expert e and P_e the
    mean probability given to e: Fedus, Zoph, Shazeer, "Switch Transformers" (JMLR 23, 2022),
    equation 4 without its factor alpha, and with K choices for each token instead of one. The
    gradient goes through P alone, f is piecewise constant. It is taken over the tokens given, those
    of this rank, so ranks add no communication and each balances its own batch.

    Args:
        probs: ``[T, E]`` float32 or float64, over all experts.
        topk_idx: ``[T, K]``, the experts chosen, or -1.

    Returns:
        Scalar, dtype of ``probs``; 0 with no tokens.
    """
    tokens, num_experts = probs.shape
    choices = max(tokens * topk_idx.shape[1], 1)
    fraction = count_tokens(topk_idx, num_experts) / choices
    probability = probs.sum(0) / max(tokens, 1)
    return num_experts * (fraction * probability).sum()


def z_loss(logits: Tensor) -> Tensor:
    """Auxiliary loss that keeps a router's logits small: the mean of ``logsumexp(logits)^2``.

    Zoph et al., "ST-MoE: Designing Stable and Transferable Sparse Expert Models" (arXiv 2202.08906, 2022),
    equation 5; they add it with a factor of 1e-3.

    Args:
        logits: ``[T, E]`` float32 or float64, over all experts.

    Returns:
        Scalar, dtype of ``logits``; 0 with no tokens.
    """
    return logits.logsumexp(-1).square().sum() / max(logits.shape[0], 1)


def count_tokens(topk_idx: Tensor, num_experts: int) -> Tensor:
    """How often each expert was chosen: ``[num_experts]`` int64; -1 counts for none."""
    # scatter_add_ and not bincount: its shape does not depend on data, so torch.compile traces it.
    # Empty places (-1) are counted in one extra place, which is cut off.
    places = torch.where(topk_idx < 0, num_experts, topk_idx).flatten().long()
    counts = torch.zeros(num_experts + 1, dtype=torch.int64, device=topk_idx.device)
    return counts.scatter_add_(0, places, torch.ones_like(places))[:num_experts]
