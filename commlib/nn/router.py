"""Which experts a token goes to."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Routing(NamedTuple):
    """What a router returns for T tokens: any callable that returns such a triple is a router."""

    topk_idx: Tensor  # [T, K] int64, global expert ids; -1 leaves a place empty
    topk_weights: Tensor  # [T, K] float32 (float64 for float64 tokens)
    loss: Tensor  # scalar, to be added to the training loss (scaled as you like)


class TopKRouter(nn.Module):
    """Linear scores, softmax, the K best experts, their weights made to sum to 1.

    Computed in float32 (float64 for float64 tokens).

    With ``topk=1`` the weight stays the expert's probability (as in Switch Transformer): made to
    sum to 1 it would be the constant 1 and give the router no gradient.

    ``weight`` is ``[num_experts, hidden]`` and replicated: average its gradient over ranks.
    """

    def __init__(
        self,
        hidden: int,
        num_experts: int,
        topk: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if not 1 <= topk <= num_experts:
            raise ValueError(f"topk must be in 1..num_experts={num_experts}, got {topk}")
        self.num_experts = num_experts
        self.topk = topk
        self.weight = nn.Parameter(torch.empty(num_experts, hidden, dtype=dtype, device=device))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights anew, as :class:`torch.nn.Linear` does."""
        bound = self.weight.shape[1] ** -0.5
        nn.init.uniform_(self.weight, -bound, bound)

    def forward(self, x: Tensor) -> Routing:
        """Route ``x`` ``[T, hidden]``, any float dtype; T may be 0."""
        # bfloat16 has 8 bits of mantissa: too few to rank the scores of many experts.
        with torch.autocast(x.device.type, enabled=False):
            wide = torch.promote_types(x.dtype, torch.float32)
            probs = F.linear(x.to(wide), self.weight.to(wide)).softmax(-1)
        topk_weights, topk_idx = probs.topk(self.topk, dim=-1)
        if self.topk > 1:
            topk_weights = topk_weights / topk_weights.sum(-1, keepdim=True)
        return Routing(topk_idx, topk_weights, load_balance_loss(probs, topk_idx))

    def extra_repr(self) -> str:
        return f"hidden={self.weight.shape[1]}, num_experts={self.num_experts}, topk={self.topk}"


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


def count_tokens(topk_idx: Tensor, num_experts: int) -> Tensor:
    """How often each expert was chosen: ``[num_experts]`` int64; -1 counts for none."""
    # scatter_add_ and not bincount: its shape does not depend on data, so torch.compile traces it.
    # Empty places (-1) are counted in one place more, which is cut off.
    places = torch.where(topk_idx < 0, num_experts, topk_idx).flatten().long()
    counts = torch.zeros(num_experts + 1, dtype=torch.int64, device=topk_idx.device)
    return counts.scatter_add_(0, places, torch.ones_like(places))[:num_experts]
