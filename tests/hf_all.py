"""Every model of transformers with an expert plan that can be made tiny: spread over ranks, and unsharded.

``make test-hf-all``. Prints each one's result, and fails where a model was made and computes something else.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import io
import sys
import traceback
import warnings
from collections import Counter
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, logging
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import commlib
from commlib.integrations.transformers import parallelize
from commlib.nn import ShardedExperts

RANKS, TOKENS = 2, 9
TOLERANCE, OF_GRADIENTS = 1e-4, 1e-3  # float32, sums in another order
REFUSED = "experts that share something cannot be spread"  # parallelize says so, before it changes anything
LEAST = 50  # models that must be found right; with fewer, this program or transformers is wrong

# The names of sizes in configs. Those that a config lacks are left out.
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 48,
    "shared_expert_intermediate_size": 48,
    "moe_shared_expert_intermediate_size": 48,
    "expert_dim": 48,
    "ffn_dim": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "vocab_size": 128,
    "num_experts": 5,
    "num_local_experts": 5,
    "n_routed_experts": 5,
    "moe_num_experts": 5,
    "num_experts_per_tok": 2,
    "moe_k": 2,
    "moe_topk": 2,
    "top_k_experts": 2,
    "n_group": 1,
    "topk_group": 1,
    "num_expert_group": 1,
    "num_limited_groups": 1,
    "first_k_dense_replace": 0,
    "num_dense_layers": 0,
    "moe_layer_start_index": 0,
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "max_position_embeddings": 64,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "mamba_d_state": 8,
    "mamba_n_heads": 4,
    "mamba_d_head": 32,
    "mamba_n_groups": 1,
    "mamba_num_heads": 4,
    "mamba_head_dim": 32,
    "n_groups": 1,
    "ssm_state_size": 8,
    "vocab_size_per_layer_input": 128,
    "hidden_size_per_layer_input": 8,
    "n_shared_experts": 1,
    "mlp_only_layers": [],
    "enable_moe_block": True,
}
# Tried in turn: some configs want lists as long as there are layers.
SPARSE = {"mlp_layer_types": ["sparse"] * 2}
FULL = {"layer_types": ["full_attention"] * 2}
VARIANTS: tuple[dict[str, Any], ...] = ({}, SPARSE, {"layer_types": None}, FULL, SPARSE | FULL)
# What single configs insist on.
EXCEPTIONS: dict[str, dict[str, Any]] = {
    "Ernie4_5_VLMoeTextConfig": {"moe_intermediate_size": [48, 24]},
    "Glm5NextTextConfig": {"qk_rope_head_dim": 0},
    "HYV4VLTextConfig": {"rope_parameters": {"rope_type": "default", "mrope_section": [4, 2, 2]}},
    "ZayaConfig": {"num_experts_per_tok": 1},
}


def configs() -> list[type[PreTrainedConfig]]:
    """Those whose plan dispatches experts, also where they are a part of another config."""
    found = {}
    for kind in CONFIG_MAPPING:
        with contextlib.suppress(Exception):  # one whose packages are missing
            whole = CONFIG_MAPPING[kind]
            for one in (whole, *(getattr(whole, "sub_configs", None) or {}).values()):
                plan = getattr(one, "base_model_ep_plan", None) or {}
                if "ep_dispatch_experts" in plan.values():
                    found[one.__name__] = one
    return [found[name] for name in sorted(found)]


def tiny_model(config: type[PreTrainedConfig]) -> torch.nn.Module:
    known = config().to_dict() | config.attribute_map
    sizes = {name: size for name, size in SIZES.items() if name in known}
    sizes |= EXCEPTIONS.get(config.__name__, {})
    torch.manual_seed(0)
    errors = []
    for more in VARIANTS:
        for make in (AutoModelForCausalLM.from_config, AutoModel.from_config, *_classes_for(config)):
            try:
                model = make(config(**(sizes | more)), dtype=torch.float32)
                with torch.no_grad():
                    for p in model.parameters():  # some leave routers, or experts, empty
                        if not p.isfinite().all() or not p.any():
                            p.normal_(std=0.02)
                outputs(model, batch(0))
                if any(hasattr(part, "_is_expert_parallel") for part in model.modules()):
                    return model.eval()
                errors.append(ValueError("it has no experts"))
            except Exception as error:
                errors.append(error)
    raise errors[0]


def _classes_for(config: type[PreTrainedConfig]) -> list[Any]:
    """Models of a config that is a part of another, which the Auto classes do not know."""
    try:
        module = importlib.import_module(config.__module__.replace(".configuration_", ".modeling_"))
    except ImportError:
        return []
    found = [
        one
        for one in vars(module).values()
        if isinstance(one, type) and issubclass(one, PreTrainedModel) and one.config_class is config
    ]
    return [one._from_config for one in found if "PreTrained" not in one.__name__]


def batch(rank: int) -> torch.Tensor:
    return torch.randint(3, 128, (1, TOKENS + rank), generator=torch.Generator().manual_seed(rank))


def outputs(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids, use_cache=False)[0]


def loss_of(out: torch.Tensor) -> torch.Tensor:
    """Not of squares: some models end with a norm, and their squares add up to a constant."""
    pattern = torch.randn(out.shape, generator=torch.Generator().manual_seed(0))
    return (out * pattern).sum()


def compare(model: torch.nn.Module) -> str:
    """Nothing, or what is wrong."""
    wanted = [outputs(model, batch(rank)) for rank in range(RANKS)]
    sum(map(loss_of, wanted)).backward()
    copies = [copy.deepcopy(model) for _ in range(RANKS)]
    for one in copies:
        one.zero_grad()

    def rank_main(rank: int) -> tuple[torch.Tensor, dict[str, Any], int]:
        own = parallelize(copies[rank])
        out = outputs(own, batch(rank))
        loss_of(out).backward()
        spread = sum(isinstance(part, ShardedExperts) for part in own.modules())
        return out.detach(), {name: p.grad for name, p in own.named_parameters()}, spread

    got = commlib.run_ranks(rank_main, RANKS)
    if not got[0][2]:
        return "no experts were spread"
    for rank, (out, _, _) in enumerate(got):
        if not torch.allclose(out, wanted[rank], rtol=TOLERANCE, atol=TOLERANCE):
            return f"outputs differ by {(out - wanted[rank]).abs().max().item():.1e}"
    for name, p in model.named_parameters():
        parts = [grads[name] for _, grads, _ in got]
        if p.grad is None or any(part is None for part in parts):
            if any(part is not None and part.any() for part in parts):
                return f"{name} has a gradient on some ranks only"
            continue
        parts = [part.as_subclass(torch.Tensor) for part in parts]
        grad = sum(parts) if parts[0].shape == p.shape else torch.cat(parts)
        if (grad - p.grad).norm() > OF_GRADIENTS * p.grad.norm() + 1e-6:
            return f"the gradient of {name} differs by {((grad - p.grad).norm() / p.grad.norm()).item():.1e}"
    return ""


def main() -> int:
    logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    table = Table("config", "result", "why")
    counts: Counter[str] = Counter()
    for config in configs():
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                model = tiny_model(config)
        except Exception as error:
            result, why = "not tiny", f"{type(error).__name__}: {error}"
        else:
            try:
                why = compare(model)
            except Exception as error:
                why = f"{type(error).__name__}: {error}"
                if "--trace" in sys.argv:
                    traceback.print_exc()
            result = "refused" if REFUSED in why else "FAILED" if why else "right"
        counts[result] += 1
        table.add_row(config.__name__, result, " ".join(why.split())[:100])
    Console(width=170).print(table)
    print(f"{dict(counts)} of {sum(counts.values())} configs, {RANKS} ranks, 5 experts")
    return 1 if counts["FAILED"] or counts["right"] < LEAST else 0


if __name__ == "__main__":
    sys.exit(main())
