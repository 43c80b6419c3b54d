"""What torch.compile is told of the ops: they have an effect.

So it always calls them, and in the program's order. All ranks must issue the same operations in the same
order, but a rank may leave a result unused, and the compiler orders by sizes, which differ by rank.

PyTorch has no public name for effects yet. Before 2.13 it cannot compile checkpointing around an op
that has one (seen with 2.11), and loses sizes that are known only at run time (2.6). So nothing is declared
there: ops are called in the order in which they were traced.
"""

from __future__ import annotations

import operator
from typing import Any

import torch

HAS_EFFECTS = torch.__version__ >= "2.13" and hasattr(torch.library, "_register_effectful_op")


def keep_in_order(op: Any) -> None:
    """Declare that ``op`` has an effect."""
    if HAS_EFFECTS:
        from torch._library.effects import EffectType

        torch.library._register_effectful_op(op, EffectType.ORDERED)


def save_results() -> None:
    """Called where autograd notes the op traced last: activation checkpointing saves its results.

    Compiled code cannot compute ops with an effect again. (A program that is not compiled does.)
    """
    if not HAS_EFFECTS or not torch.compiler.is_compiling():
        return
    from torch.fx.experimental.proxy_tensor import get_proxy_mode
    from torch.utils.checkpoint import CheckpointPolicy

    mode = get_proxy_mode()
    for node in () if mode is None else reversed(mode.tracer.graph.nodes):
        if node.target is operator.getitem or node.target is torch.ops.higher_order.with_effects:
            node.meta["recompute"] = CheckpointPolicy.MUST_SAVE
        if node.target is torch.ops.higher_order.with_effects:
            return


def refuse_vmap(*_: Any) -> Any:
    """The ops' rule for torch.vmap."""
    raise NotImplementedError(
        "dispatch and combine cannot be batched by torch.vmap: ranks must agree on how many there are"
    )
