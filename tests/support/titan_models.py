"""torchtitan's own mixture-of-experts layer, tiny, for the tests of commlib under it."""

import spmd_types as spmd
import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torchtitan.config import OverrideConfig, apply_overrides
from torchtitan.distributed import parallel_dims
from torchtitan.distributed.fsdp import apply_fsdp_to_decoder
from torchtitan.distributed.utils import set_spmd_backend
from torchtitan.models.common.linear import Linear
from torchtitan.models.common.moe import GroupedExperts, MoE, RoutedExperts, TokenChoiceTopKRouter
from torchtitan.models.common.moe_sharding import set_moe_sharding_config
from torchtitan.models.common.token_dispatcher import AllToAllTokenDispatcher

OVERRIDE = "commlib.integrations.torchtitan.token_dispatcher"
DIM, HIDDEN_DIM, TOPK, LENGTH = 16, 32, 3, 12
WEIGHTS = ("w1_EFD", "w3_EFD", "w2_EDF")


def moe_config(experts, dispatcher=AllToAllTokenDispatcher.Config, **options):
    """Of a layer with ``experts`` experts; ``options`` are the dispatcher's."""
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
        setattr(experts, name, nn.Parameter(whole[rank * mine : (rank + 1) * mine].clone()))
    return moe


def wired(moe, mesh):
    """The layer over the ranks of an expert mesh, or none, without torchtitan's other parallelism."""
    set_spmd_backend("partial_dtensor")
    moe.routed_experts.token_dispatcher.wire_meshes(ep_mesh=mesh)
    return moe


class Block(nn.Module):
    moe_enabled = True

    def __init__(self, moe):
        super().__init__()
        self.moe = moe

    def forward(self, x):
        return x + self.moe(x)


class Layers(nn.Module):
    """Like torchtitan's models: blocks in ``layers``, by number, and what else it asks for."""

    tok_embeddings = norm = lm_head = None
    enable_weight_tying = False

    def __init__(self, moes):
        super().__init__()
        self.layers = nn.ModuleDict({str(i): Block(moe) for i, moe in enumerate(moes)})

    def forward(self, x):
        for layer in self.layers.values():
            x = layer(x)
        return x


def compile_as_torchtitan(model, backend):
    """Like its ``apply_compile``, which also takes its whole configuration."""
    torch._dynamo.config.capture_scalar_outputs = True
    torch._dynamo.config.skip_fwd_side_effects_in_bwd_under_checkpoint = True
    for layer in model.layers.values():
        layer.compile(backend=backend, fullgraph=True)


def dimensions(ranks, *, ep, tp=1, backend="partial_dtensor"):
    """torchtitan's meshes over the ranks: each ``ep`` of them share experts, each ``tp`` sequences."""
    parallel_dims.device_type = "cpu"  # torchtitan takes CUDA where there is no accelerator
    set_spmd_backend(backend)
    dims = parallel_dims.ParallelDims(
        dp_replicate=1,
        dp_shard=ranks // tp,
        cp=1,
        tp=tp,
        pp=1,
        ep=ep,
        world_size=ranks,
        spmd_backend=backend,
    )
    dims.build_mesh()
    return dims


def parallelized(config, dims):
    """A layer over the ranks by its own ``parallelize``."""
    sharded = {"w1_EFD": spmd.S(1), "w2_EDF": spmd.S(2), "w3_EFD": spmd.S(1)}
    set_moe_sharding_config(config, enable_ep=True, enable_sp=dims.tp > 1, expert_param_layout=sharded)
    moe = build(config)
    moe.parallelize(dims)
    return moe


def fully_sharded(model, dims):
    """torchtitan's FSDP: experts over the ranks that hold the same ones, all else over all ranks."""
    exact = dict(param_dtype=torch.float32, reduce_dtype=torch.float32)
    apply_fsdp_to_decoder(
        model,
        dims.get_mesh("fsdp"),
        **exact,
        pp_enabled=False,
        ep_degree=dims.ep,
        edp_mesh=dims.get_mesh("efsdp"),
    )
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)  # gloo has no other
    return model


def local(tensor):
    """This rank's part of what may be a DTensor."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def batch(rank, length=LENGTH, dtype=torch.float32):
    generator = torch.Generator().manual_seed(100 + rank)
    return torch.randn(2, length, DIM, generator=generator).to(dtype)
