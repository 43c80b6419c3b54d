"""Which experts a token goes to."""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Real
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from commlib.arguments import as_int

from .losses import Scores, count_tokens, load_balance_loss

_TINY = 1e-20  # which DeepSeek-V3 adds to a sum that it divides by


class RouterOutput(NamedTuple):
    """What a router returns for T tokens: any callable that returns such a triple is a router.

    Attributes:
        topk_idx: ``[T, K]`` int64, global expert ids; -1 leaves a place empty.
        topk_weights: ``[T, K]`` float32 (float64 for float64 tokens).
        loss: a scalar, to be added to the training loss (scaled as you like).
    """

    topk_idx: Tensor
    topk_weights: Tensor
    loss: Tensor


def balance(scores: Scores) -> Tensor:
    """The default loss of a router: :func:`load_balance_loss`."""
    return load_balance_loss(scores.probs, scores.topk_idx)


class TopKRouter(nn.Module):
    """Linear scores, and for each token the K best experts; options make it most models' router.

    By default as in Mixtral: softmax, the K largest, made to sum to 1. docs/layer.md has the options of
    other models. Computed in float32 (float64 for float64 tokens).

    ``weight`` is ``[num_experts, hidden]``, ``bias`` ``[num_experts]``, both replicated: average their
    gradients over ranks.

    Attributes:
        balance_bias: with that option: a buffer ``[num_experts]`` float32, whatever dtype the module is cast
            to, the same on every rank.
        load: how often each expert was chosen in training since the last :func:`commlib.nn.update_bias`:
            ``[num_experts]`` int64, by this rank's tokens; None: never, or without ``balance_bias``. A
            forward that activation checkpointing repeats counts twice, unless it is reentrant.

    Args:
        hidden, num_experts, topk: sizes H, E and K.
        scores: of the logits. "softmax" over all experts, or "sigmoid" of each by itself (DeepSeek-V3,
            arXiv 2412.19437, equation 15).
        normalise: whether a token's weights are made to sum to 1; a softmax over all experts then becomes one
            over the chosen ones (GPT-OSS). None: if ``topk > 1``: the weight of a single expert would
            be the constant 1, and give the router no gradient (Switch Transformer uses its probability).
        scale: factor of the weights, applied last (``routed_scaling_factor``).
        groups: experts are in this many groups of neighbours, of equal sizes.
        topk_groups: a token chooses among the experts of this many groups, its best; None: of all.
        group_score: what makes a group good: its "best" score (DeepSeek-V2, arXiv 2405.04434, section
            2.2.2), or the sum of its "best two" (DeepSeek-V3, section 2.1.2).
        bias: whether the logits have a trained bias (GPT-OSS).
        balance_bias: whether each expert has a bias that counts in the choice but not in the weights, and
            that :func:`commlib.nn.update_bias` moves: balance without an auxiliary loss.
        loss: ``Scores -> scalar``; None: 0. It is in ``MoEAux.loss``. Your own may sum
            :func:`load_balance_loss` and :func:`z_loss`.
        dtype, device: of the parameters.

    Raises:
        ValueError: sizes that do not fit each other, an unknown option, or a scale that is not positive.
        TypeError: sizes that are not ints, a scale that is not a number, or a loss that cannot be called.
    """

    def __init__(
        self,
        hidden: int,
        num_experts: int,
        topk: int,
        *,
        scores: Literal["softmax", "sigmoid"] = "softmax",
        normalise: bool | None = None,
        scale: float = 1.0,
        groups: int = 1,
        topk_groups: int | None = None,
        group_score: Literal["best", "best two"] = "best",
        bias: bool = False,
        balance_bias: bool = False,
        loss: Callable[[Scores], Tensor] | None = balance,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        hidden, num_experts = as_int("hidden", hidden, 1), as_int("num_experts", num_experts, 1)
        topk, groups = as_int("topk", topk, 1), as_int("groups", groups, 1)
        topk_groups = groups if topk_groups is None else as_int("topk_groups", topk_groups, 1)
        _check_sizes(num_experts, topk, groups, topk_groups)
        if loss is not None and not callable(loss):
            raise TypeError(f"loss must be callable or None, got {loss!r}")
        if scores not in ("softmax", "sigmoid"):
            raise ValueError(f'scores must be "softmax" or "sigmoid", got {scores!r}')
        if group_score not in ("best", "best two"):
            raise ValueError(f'group_score must be "best" or "best two", got {group_score!r}')
        if topk_groups < groups and group_score == "best two" and num_experts // groups < 2:
            raise ValueError(f'group_score="best two" needs groups of 2 experts, {groups=} leaves 1')
        self.num_experts, self.topk = num_experts, topk
        self.scores, self.scale, self.loss = scores, _checked_scale(scale), loss
        self.normalise = topk > 1 if normalise is None else normalise
        self.groups, self.topk_groups, self.group_score = groups, topk_groups, group_score
        options: dict[str, Any] = dict(dtype=dtype, device=device)
        self.weight = nn.Parameter(torch.empty(num_experts, hidden, **options))
        self.bias = nn.Parameter(torch.empty(num_experts, **options)) if bias else None
        moved = torch.zeros(num_experts, dtype=torch.float32, device=device) if balance_bias else None
        self.register_buffer("balance_bias", moved)
        self.balance_bias: Tensor | None
        # Not a buffer: DistributedDataParallel would overwrite it with the first rank's.
        self.load: Tensor | None = None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the weights anew, as :class:`torch.nn.Linear` does; ``balance_bias`` is zero."""
        bound = self.weight.shape[1] ** -0.5
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)
        if self.balance_bias is not None:
            self.balance_bias.zero_()
        self.load = None

    def forward(self, x: Tensor) -> RouterOutput:
        """Route ``x`` ``[T, hidden]``, any float dtype; T may be 0."""
        # bfloat16 has 8 bits of mantissa: too few to rank the scores of many experts.
        with torch.autocast(x.device.type, enabled=False):
            wide = torch.promote_types(x.dtype, torch.float32)
            bias = None if self.bias is None else self.bias.to(wide)
            logits = F.linear(x.to(wide), self.weight.to(wide), bias)
        scores = logits.sigmoid() if self.scores == "sigmoid" else logits.softmax(-1)
        topk_idx = self._choose(scores.detach())
        if self.balance_bias is not None and self.training and torch.is_grad_enabled():
            self._count(topk_idx)
        loss = logits.new_zeros(())
        if self.loss is not None:
            probs = scores / (scores.sum(-1, keepdim=True) + _TINY) if self.scores == "sigmoid" else scores
            loss = self.loss(Scores(logits, probs, topk_idx))
        return RouterOutput(topk_idx, self._weigh(logits, scores, topk_idx), loss)

    def _choose(self, scores: Tensor) -> Tensor:
        if self.balance_bias is not None:
            scores = scores + self.balance_bias
        if self.topk_groups < self.groups:
            grouped = scores.unflatten(-1, (self.groups, -1))
            counted = 2 if self.group_score == "best two" else 1
            best = grouped.topk(counted, dim=-1).values.sum(-1).topk(self.topk_groups, dim=-1).indices
            out = torch.ones(grouped.shape[:-1], dtype=torch.bool, device=scores.device)
            out.scatter_(-1, best, False)
            scores = grouped.masked_fill(out.unsqueeze(-1), -torch.inf).flatten(-2)
        return scores.topk(self.topk, dim=-1).indices

    def _weigh(self, logits: Tensor, scores: Tensor, topk_idx: Tensor) -> Tensor:
        weights = scores.gather(-1, topk_idx)
        if self.normalise and self.scores == "softmax":
            # The same as dividing by the sum, and it works where all chosen ones are too small for that.
            weights = logits.gather(-1, topk_idx).softmax(-1)
        elif self.normalise:
            weights = weights / (weights.sum(-1, keepdim=True) + _TINY)
        return weights if self.scale == 1 else weights * self.scale

    def _count(self, topk_idx: Tensor) -> None:
        counts = count_tokens(topk_idx, self.num_experts)
        self.load = counts if self.load is None else self.load.to(counts.device) + counts

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> TopKRouter:
        kept = self.balance_bias
        super()._apply(fn, recurse)
        now = self.balance_bias
        if kept is not None and now is not None and now.dtype != kept.dtype:
            # bfloat16 would lose the small steps of the bias.
            self.balance_bias = kept.to(now.device)
        return self

    def extra_repr(self) -> str:
        told = f"hidden={self.weight.shape[1]}, num_experts={self.num_experts}, topk={self.topk}"
        told += f", scores={self.scores}, normalise={self.normalise}, scale={self.scale}"
        if self.topk_groups < self.groups:
            told += f", topk_groups={self.topk_groups} of {self.groups} by {self.group_score}"
        return told + f", bias={self.bias is not None}, balance_bias={self.balance_bias is not None}"


def _checked_scale(scale: Any) -> float:
    if not isinstance(scale, Real) or isinstance(scale, bool):
        raise TypeError(f"scale must be a number, got {scale!r}")
    try:
        number = float(scale)  # NumPy's too, or a Fraction: a form that tensors and torch.compile take
    except OverflowError:
        number = math.inf
    if not 0 < number < math.inf:
        raise ValueError(f"scale must be positive and finite, got {number:g}")
    return number


def _check_sizes(num_experts: int, topk: int, groups: int, topk_groups: int) -> None:
    if topk > num_experts:
        raise ValueError(f"topk must be in 1..num_experts={num_experts}, got {topk}")
    if num_experts % groups:
        raise ValueError(f"num_experts={num_experts} do not divide into groups={groups}")
    if topk_groups > groups:
        raise ValueError(f"topk_groups must be in 1..groups={groups}, got {topk_groups}")
    if topk > (available := topk_groups * num_experts // groups):
        raise ValueError(f"topk={topk} experts are more than the {available} of topk_groups={topk_groups}")
