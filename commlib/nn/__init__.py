"""Mixture-of-experts modules over :class:`commlib.ExpertParallel`, and what training needs around them."""

from . import convert
from .balance import update_bias
from .checkpoint import full_state_dict
from .experts import Experts
from .gradients import clip_grad_norm_, sync_gradients
from .grouped import grouped_mm
from .losses import Scores, load_balance_loss, z_loss
from .moe import MoEAux, MoELayer
from .products import Products
from .router import RouterOutput, TopKRouter
from .sharded import ShardedExperts, expert_parameters, shared_parameters
from .variants import GptOssExperts
from .wrappers import fully_shard_experts

__all__ = [
    "Experts",
    "GptOssExperts",
    "MoEAux",
    "MoELayer",
    "Products",
    "RouterOutput",
    "Scores",
    "ShardedExperts",
    "TopKRouter",
    "clip_grad_norm_",
    "convert",
    "expert_parameters",
    "full_state_dict",
    "fully_shard_experts",
    "grouped_mm",
    "load_balance_loss",
    "shared_parameters",
    "sync_gradients",
    "update_bias",
    "z_loss",
]
