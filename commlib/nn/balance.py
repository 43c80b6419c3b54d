"""Balance without an auxiliary loss: a bias for each expert, moved after each step by all ranks' load."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from commlib.startup.group import Group, gather_numbers, resolve_group

from .agreement import number_of
from .router import TopKRouter


@torch.no_grad()
def update_bias(module: nn.Module, speed: float = 1e-3, group: Any = None) -> None:
    """Move the ``balance_bias`` of all routers in a model, after an optimizer's step.

    Up by ``speed`` for experts that were chosen less often than the mean of all since the last time, down
    for those chosen more often: ``b_e += speed * sign(mean - load_e)``, Wang et al., "Auxiliary-Loss-Free
    Load Balancing Strategy for Mixture-of-Experts" (arXiv 2408.15664, 2024), algorithm 1; DeepSeek-V3 does
    the same (arXiv 2412.19437, section 2.1.2; its gamma is 1e-3, and 0 at the end of the training).

    The load is that of all ranks' tokens, gathered for all layers at once as integers: the biases stay the
    same, bit for bit, on every rank. All ranks of ``group`` call it; a router that a rank has not run counts
    as 0 there.

    Args:
        module: with :class:`TopKRouter` s that have a ``balance_bias``; under DDP, after FSDP2, or plain.
        speed: of the bias, at least 0; scores are between 0 and 1.
        group: of all ranks that train the same model, as :class:`commlib.ExpertParallel` takes it; None: all
            ranks of the run, which may be more than those of a communicator.

    Raises:
        ValueError: no router has a bias to move, or ranks have different routers; on all ranks, and nothing
            has changed. A negative ``speed``.
    """
    if not speed >= 0:
        raise ValueError(f"speed must be at least 0, got {speed}")
    everyone = resolve_group(group)
    routers = {
        name: part
        for name, part in module.named_modules()
        if isinstance(part, TopKRouter) and part.balance_bias is not None
    }
    _check_same(everyone, routers)
    loads = [_load(router) for router in routers.values()]
    totals = gather_numbers(everyone, torch.cat(loads)).sum(0).split([len(load) for load in loads])
    for router, total in zip(routers.values(), totals, strict=True):
        assert router.balance_bias is not None
        # The sign of the mean's distance, in integers.
        error = (total.sum() - total * router.num_experts).sign()
        router.balance_bias += speed * error.to(router.balance_bias)
        router.load = None


def _load(router: TopKRouter) -> Tensor:
    assert router.balance_bias is not None
    if router.load is None:
        return torch.zeros(router.num_experts, dtype=torch.int64, device=router.balance_bias.device)
    return router.load.to(router.balance_bias.device)


def _check_same(group: Group, routers: dict[str, TopKRouter]) -> None:
    """Raise ValueError on all ranks unless all have the same routers, at least one, of the same sizes."""
    sizes = [router.num_experts for router in routers.values()]
    devices = [router.weight.device for router in routers.values()] or [torch.device("cpu")]
    said = torch.tensor([len(sizes), number_of([str(size) for size in sizes])], device=devices[0])
    everywhere = gather_numbers(group, said)
    counts = everywhere[:, 0].tolist()
    if not any(counts):
        raise ValueError("no router has a bias to move: make it by TopKRouter(..., balance_bias=True)")
    if bool((everywhere != everywhere[0]).any()):
        raise ValueError(
            f"ranks have different routers with a balance_bias, by rank {counts} of them: all ranks of the "
            "group must have the same model; give the group of those that have"
        )
