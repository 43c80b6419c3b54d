"""Mixture-of-experts modules over :class:`commlib.ExpertParallel`."""

from .grouped import grouped_mm
from .moe import Experts, MoEAux, MoELayer, expert_parameters, shared_parameters
from .router import Routing, TopKRouter, load_balance_loss

__all__ = [
    "Experts",
    "MoEAux",
    "MoELayer",
    "Routing",
    "TopKRouter",
    "expert_parameters",
    "grouped_mm",
    "load_balance_loss",
    "shared_parameters",
]
