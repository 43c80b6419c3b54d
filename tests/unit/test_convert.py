"""Weights of other libraries' layers: the same outputs and gradients, and back without a bit lost."""

import pytest
import torch
import torch.nn.functional as F

import commlib
from commlib.nn import GptOssExperts, MoELayer, TopKRouter, full_state_dict
from commlib.nn.convert import from_layout, to_layout

HIDDEN, FFN, EXPERTS, TOPK = 32, 24, 8, 2


def tokens(seed=1):
    return torch.randn(20, HIDDEN, generator=torch.Generator().manual_seed(seed))


def mixtral():
    from transformers.models.mixtral.modeling_mixtral import MixtralConfig, MixtralSparseMoeBlock

    sizes = dict(hidden_size=HIDDEN, intermediate_size=FFN)
    return MixtralSparseMoeBlock(
        MixtralConfig(num_local_experts=EXPERTS, num_experts_per_tok=TOPK, **sizes, router_jitter_noise=0.0)
    )


def qwen3():
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeConfig, Qwen3MoeSparseMoeBlock

    sizes = dict(hidden_size=HIDDEN, moe_intermediate_size=FFN, num_experts=EXPERTS, num_experts_per_tok=TOPK)
    return Qwen3MoeSparseMoeBlock(Qwen3MoeConfig(norm_topk_prob=False, **sizes))


def deepseek_v3():
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Config, DeepseekV3MoE

    sizes = dict(hidden_size=HIDDEN, moe_intermediate_size=FFN, n_routed_experts=EXPERTS, n_shared_experts=1)
    groups = dict(num_experts_per_tok=TOPK, n_group=4, topk_group=2, routed_scaling_factor=2.5)
    return DeepseekV3MoE(DeepseekV3Config(**sizes, **groups))


def gpt_oss():
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssConfig, GptOssMLP

    sizes = dict(hidden_size=HIDDEN, intermediate_size=FFN)
    return GptOssMLP(GptOssConfig(num_local_experts=EXPERTS, num_experts_per_tok=TOPK, **sizes))


V3 = dict(scores="sigmoid", scale=2.5, groups=4, topk_groups=2, group_score="best two", balance_bias=True)
BLOCKS = {
    "mixtral": (mixtral, "transformers", {}, {}),
    "qwen3": (qwen3, "transformers", dict(normalise=False), {}),
    "deepseek_v3": (deepseek_v3, "transformers", V3, {}),
    "gpt_oss": (gpt_oss, "gpt_oss", dict(bias=True), dict(experts=GptOssExperts)),
}


def drawn(block):
    """With weights that are not zero, and large enough for GPT-OSS's clamps to clamp some."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for t in (*block.parameters(), *block.buffers()):
            t.normal_(0, 0.6, generator=generator)
    return block.float()


def layer_like(block, layout, router, options):
    router = TopKRouter(HIDDEN, EXPERTS, TOPK, **router)
    shared = getattr(block, "shared_experts", None)
    layer = MoELayer(HIDDEN, FFN, EXPERTS, TOPK, None, router, shared=shared, **options)
    layer.load_state_dict(from_layout(block.state_dict(), layout))
    return layer


@pytest.mark.parametrize("name", BLOCKS)
def test_outputs_and_gradients_are_those_of_the_models_own_block(name):
    make, layout, *options = BLOCKS[name]
    block = drawn(make())
    layer = layer_like(block, layout, *options)
    x, mine = tokens()[None].requires_grad_(), tokens()[None].requires_grad_()
    want, got = block(x), layer(mine)[0]
    want = want[0] if isinstance(want, tuple) else want
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    upstream = tokens(2)[None]
    want.backward(upstream)
    wanted = {name: p.grad.clone() for name, p in block.named_parameters()}
    block.zero_grad()  # the shared expert is in both
    got.backward(upstream)
    torch.testing.assert_close(mine.grad, x.grad, rtol=1e-4, atol=1e-4)
    gradients = {name: p.grad for name, p in layer.named_parameters()}
    buffers = {name: t for name, t in layer.state_dict().items() if name not in gradients}
    converted = to_layout(gradients | buffers, layout)  # gradients are laid out as their weights
    for name, grad in wanted.items():
        torch.testing.assert_close(converted[name], grad, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", BLOCKS)
def test_back_again_it_is_the_same_bit_for_bit(name):
    make, layout, *_ = BLOCKS[name]
    state = drawn(make()).bfloat16().state_dict()
    back = to_layout(from_layout(state, layout), layout)
    assert back.keys() == state.keys()
    for key, t in state.items():
        assert torch.equal(back[key], t) and back[key].dtype == t.dtype and back[key].is_contiguous()
        assert back[key].data_ptr() != t.data_ptr()


def state_of_layer(balance_bias=True):
    generator = torch.Generator().manual_seed(4)
    router = TopKRouter(HIDDEN, EXPERTS, TOPK, balance_bias=balance_bias)
    state = MoELayer(HIDDEN, FFN, EXPERTS, TOPK, None, router).state_dict()
    return {name: t.normal_(generator=generator) for name, t in state.items()}


@pytest.mark.parametrize("layout", ["transformers", "hub", "mixtral_hub", "torchtitan"])
def test_layouts_without_biases_hold_what_the_layer_has(layout):
    state = state_of_layer()
    there = to_layout(state, layout, prefix="model.layers.3.mlp.")
    assert all(name.startswith("model.layers.3.mlp.") for name in there)
    back = from_layout(there | {"model.norm.weight": torch.ones(1)}, layout, prefix="model.layers.3.mlp.")
    assert back.keys() == state.keys() and all(torch.equal(back[name], t) for name, t in state.items())


@pytest.mark.parametrize(
    ("layout", "names"),
    [
        ("hub", [f"experts.5.{part}_proj.weight" for part in ("gate", "up", "down")]),
        ("mixtral_hub", [f"experts.5.{part}.weight" for part in ("w1", "w3", "w2")]),
        ("torchtitan", [f"routed_experts.inner_experts.{p}" for p in ("w1_EFD", "w3_EFD", "w2_EDF")]),
    ],
)
def test_an_expert_computes_by_linear_layers_with_what_is_laid_out(layout, names):
    """As the libraries of the layouts do: ``F.linear`` with each matrix."""
    state = state_of_layer()
    w1, w3, w2 = (to_layout(state, layout)[name] for name in names)
    if layout == "torchtitan":
        w1, w3, w2 = w1[5], w3[5], w2[5]
    assert w1.shape == w3.shape == (FFN, HIDDEN) and w2.shape == (HIDDEN, FFN)
    x = tokens()
    want = F.linear(F.silu(F.linear(x, w1)) * F.linear(x, w3), w2)
    experts = MoELayer(HIDDEN, FFN, EXPERTS, TOPK, None).experts
    experts.load_state_dict({n.removeprefix("experts."): t for n, t in state.items() if "experts." in n})
    offsets = torch.tensor([0] * 6 + [len(x)] * 3)  # all rows are expert 5's
    torch.testing.assert_close(experts(x, offsets), want, rtol=1e-4, atol=1e-4)


def test_checkpoints_of_the_hub_are_as_transformers_takes_them_apart():
    """The stacked weights that transformers makes of a checkpoint are the checkpoint's."""
    state = state_of_layer()
    stacked, single = to_layout(state, "transformers"), to_layout(state, "hub")
    for i in range(EXPERTS):
        halves = [single[f"experts.{i}.{part}_proj.weight"] for part in ("gate", "up")]
        assert torch.equal(stacked["experts.gate_up_proj"][i], torch.cat(halves))
        assert torch.equal(stacked["experts.down_proj"][i], single[f"experts.{i}.down_proj.weight"])


def test_ranks_load_their_part_and_give_all_back(torch_ranks):
    block = drawn(mixtral())
    whole = layer_like(block, "transformers", {}, {})
    x = tokens()
    want = whole(x)[0].detach()
    theirs = block.state_dict()

    def main(rank):
        shape = dict(num_experts=EXPERTS, hidden=HIDDEN, topk=TOPK, max_tokens=32)
        ep = commlib.ExpertParallel(dtype=torch.float32, device="cpu", timeout=30.0, **shape)
        layer = MoELayer(HIDDEN, FFN, EXPERTS, TOPK, ep)
        layer.load_state_dict(from_layout(theirs, "transformers"))
        torch.testing.assert_close(layer(x)[0], want, rtol=1e-4, atol=1e-4)
        with pytest.raises(ValueError, match=r"experts\.w1 is one rank's part.*full_state_dict"):
            to_layout(layer.state_dict(), "transformers")
        state = full_state_dict(layer)
        if rank == 0:
            back = to_layout(state, "transformers")
            assert all(torch.equal(back[name], t) for name, t in theirs.items())

    torch_ranks(main, 3)


@pytest.mark.parametrize(
    ("change", "layout", "text"),
    [
        (
            lambda s: s.pop("experts.down_proj"),
            "transformers",
            r"experts\.down_proj missing among experts\.gate_up",
        ),
        (lambda s: s.clear(), "transformers", "missing among no weights at all"),
        (lambda s: s.update({"experts.down_proj_blocks": torch.ones(1)}), "transformers", "quantised"),
        (lambda s: s.update({"experts.down_proj": torch.ones(8, 24, 32)}), "transformers", "another layout"),
        (lambda s: s.update({"gate.weight": torch.ones(4, 32)}), "transformers", r"router\.weight is to be"),
        (
            lambda s: s.pop("experts.3.w2.weight"),
            "mixtral_hub",
            r"experts\.3\.w2\.weight missing among .* and \d+ more$",
        ),
        (lambda s: s, "hub", r"experts\.0\.gate_proj\.weight missing among"),
        (lambda s: s, "megatron", "layout must be one of transformers, .*, got 'megatron'"),
    ],
)
def test_weights_that_do_not_fit_are_refused(change, layout, text):
    known = "mixtral_hub" if layout == "mixtral_hub" else "transformers"
    state = to_layout(state_of_layer(), known)
    change(state)
    with pytest.raises(ValueError, match=text):
        from_layout(state, layout)


def test_what_a_layout_cannot_hold_is_refused():
    with pytest.raises(ValueError, match=r"experts\.b1, experts\.b3, experts\.b2 missing"):
        to_layout(state_of_layer(False), "gpt_oss")
    experts = MoELayer(HIDDEN, FFN, EXPERTS, TOPK, None, experts=GptOssExperts).state_dict()
    with pytest.raises(ValueError, match=r"no place for experts\.b1, experts\.b3, experts\.b2"):
        to_layout(experts, "hub")
