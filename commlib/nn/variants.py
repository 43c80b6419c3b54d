"""Experts of models that are not plain SwiGLU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .experts import Experts
from .products import Products


class GptOssExperts(Experts):
    """GPT-OSS's: SwiGLU with biases, its halves clamped, its gate steeper, and 1 added to the other half.

    With ``g = min(x @ w1 + b1, limit)`` and ``u = clamp(x @ w3 + b3, -limit, limit)``:
    ``((u + 1) * g * sigmoid(alpha * g)) @ w2 + b2``, as OpenAI's gpt-oss (``swiglu`` in its
    ``torch/model.py``) and transformers' ``GptOssExperts`` compute it.

    Args:
        args, options: as of :class:`Experts`.
        alpha, limit: the constants.
    """

    def __init__(self, *args: Any, alpha: float = 1.702, limit: float = 7.0, **options: Any) -> None:
        super().__init__(*args, **options)
        self.alpha, self.limit = alpha, limit

    def shapes(self, hidden: int, ffn_hidden: int) -> dict[str, tuple[int, ...]]:
        biases = {"b1": (ffn_hidden,), "b3": (ffn_hidden,), "b2": (hidden,)}
        return super().shapes(hidden, ffn_hidden) | biases

    def compute(self, x: Tensor, offsets: Tensor, products: Products, **weights: Tensor) -> Tensor:
        biases = weights["b1"], weights["b3"]
        gate, up = products.first(x, offsets, weights["w1"], weights["w3"], biases=biases)
        gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        inner = (up + 1) * gate * torch.sigmoid(gate * self.alpha)
        return products.last(inner, offsets, weights["w2"], weights["b2"])
