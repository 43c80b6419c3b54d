"""Tiny random transformers models with experts, and the same model unsharded beside them."""

import torch
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    GptOssConfig,
    MixtralConfig,
    Qwen3MoeConfig,
)

VOCAB, EXPERTS = 128, 5  # 5 on 3 ranks: 1, 2, 2
_SMALL = dict(
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=VOCAB,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
_LATENT = dict(q_lora_rank=32, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=16)
NAMES = ("mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss")


def config(name, experts=EXPERTS):
    if name == "mixtral":
        return MixtralConfig(num_local_experts=experts, num_experts_per_tok=2, head_dim=16, **_SMALL)
    if name == "qwen3_moe":
        return Qwen3MoeConfig(
            num_experts=experts, num_experts_per_tok=2, moe_intermediate_size=48, head_dim=16, **_SMALL
        )
    if name == "deepseek_v3":
        return DeepseekV3Config(
            n_routed_experts=experts,
            num_experts_per_tok=2,
            moe_intermediate_size=48,
            n_group=1,
            topk_group=1,
            first_k_dense_replace=1,
            **(_SMALL | _LATENT | {"num_key_value_heads": 4}),
        )
    layers = ["full_attention"] * 2
    return GptOssConfig(
        num_local_experts=experts, num_experts_per_tok=2, layer_types=layers, head_dim=16, **_SMALL
    )


def model_of(name, experts=EXPERTS, dtype=torch.float32, implementation=None):
    """Weights depend on the name alone."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config(name, experts), dtype=dtype)
    if implementation is not None:
        model.set_experts_implementation(implementation)
    return model


def batch(rank, tokens=None):
    """``[1, tokens]``: by default another length on each rank."""
    generator = torch.Generator().manual_seed(rank)
    return torch.randint(3, VOCAB, (1, tokens or 9 + 4 * rank), generator=generator)


def unsharded(model, batches):
    """Loss and logits of each batch, and the gradients of the sum of losses, by name."""
    outputs = [model(input_ids=ids, labels=ids) for ids in batches]
    sum(out.loss for out in outputs).backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    return [(out.loss.detach(), out.logits.detach()) for out in outputs], gradients


def whole_gradients(by_rank, like):
    """Of the sum of the ranks' losses, from each rank's: experts' are separate, all others add up."""
    found = {}
    for name, want in like.items():
        parts = [None if grads[name] is None else grads[name].as_subclass(torch.Tensor) for grads in by_rank]
        if want is None:
            assert not any(part is not None and part.any() for part in parts), name
        elif parts[0].shape == want.shape:
            found[name] = sum(parts)
        else:
            found[name] = torch.cat(parts)
    return found
