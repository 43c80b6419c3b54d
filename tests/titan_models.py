"""torchtitan's own mixture-of-experts layer, tiny, for the tests of commlib under it."""

import torch
from torchtitan.config import OverrideConfig, apply_overrides
from torchtitan.distributed.utils import set_spmd_backend
from torchtitan.models.common.linear import Linear
from torchtitan.models.common.moe import GroupedExperts, MoE, RoutedExperts, TokenChoiceTopKRouter
from torchtitan.models.common.token_dispatcher import AllToAllTokenDispatcher

OVERRIDE = "commlib.integrations.torchtitan.token_dispatcher"
DIM, HIDDEN_DIM, TOPK, LENGTH = 16, 32, 3, 12
WEIGHTS = ("w1_EFD", "w3_EFD", "w2_EDF")


def moe_config(experts, dispatcher=AllToAllTokenDispatcher.Config, **options):
    """Of a layer with so many experts; ``options`` are the dispatcher's."""
    return MoE.Config(
        num_experts=experts,
        router=TokenChoiceTopKRouter.Config(
            num_experts=experts,
            gate=Linear.Config(in_features=DIM, out_features=experts),
            top_k=TOPK,
            score_func="softmax",
            route_norm=True,
        ),
        routed_experts=RoutedExperts.Config(
            inner_experts=GroupedExperts.Config(dim=DIM, hidden_dim=HIDDEN_DIM, num_experts=experts),
            token_dispatcher=dispatcher(num_experts=experts, top_k=TOPK, **options),
        ),
    )


def overridden(config, **arguments):
    """As ``--override.imports`` changes it."""
    apply_overrides(OverrideConfig(imports=[(OVERRIDE, arguments)]), config)
    return config


def build(config, rank=0, size=1):
    """A layer of seeded weights, with the experts of this rank only; its dispatcher is not wired."""
    moe = config.build()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in moe.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    moe.expert_bias_E.zero_()
    experts = moe.routed_experts.inner_experts
    mine = config.num_experts // size
    for name in WEIGHTS:
        whole = getattr(experts, name).detach()
        setattr(experts, name, torch.nn.Parameter(whole[rank * mine : (rank + 1) * mine].clone()))
    return moe


def wired(moe, mesh):
    """The layer over the ranks of an expert mesh, or none, without torchtitan's other parallelism."""
    set_spmd_backend("partial_dtensor")
    moe.routed_experts.token_dispatcher.wire_meshes(ep_mesh=mesh)
    return moe


def batch(rank, length=LENGTH, dtype=torch.float32):
    generator = torch.Generator().manual_seed(100 + rank)
    return torch.randn(2, length, DIM, generator=generator).to(dtype)
