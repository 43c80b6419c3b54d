"""TopKRouter chooses and weighs as models' own routers do, and its bias balances the load over ranks."""

from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.distributed as dist
from moe_models import HIDDEN, TOPK, Model, batch, connect
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import commlib
from commlib.nn import MoELayer, TopKRouter, fully_shard_experts, load_balance_loss, update_bias, z_loss

EXPERTS = 16
V3 = dict(scores="sigmoid", scale=2.5, groups=4, topk_groups=2, group_score="best two", balance_bias=True)


def tokens(count=64, seed=1):
    return torch.randn(count, HIDDEN, generator=torch.Generator().manual_seed(seed))


def in_order(topk_idx, topk_weights):
    """By expert: some routers leave a token's choices in any order."""
    ids, order = topk_idx.sort(-1)
    return ids, topk_weights.gather(-1, order)


def mixtral(normalise):
    from transformers.models.mixtral.modeling_mixtral import MixtralConfig, MixtralTopKRouter

    return MixtralTopKRouter(
        MixtralConfig(hidden_size=HIDDEN, num_local_experts=EXPERTS, num_experts_per_tok=4)
    )


def qwen3(normalise):
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeConfig, Qwen3MoeTopKRouter

    sizes = dict(hidden_size=HIDDEN, num_experts=EXPERTS, num_experts_per_tok=4)
    return Qwen3MoeTopKRouter(Qwen3MoeConfig(norm_topk_prob=normalise, **sizes))


def deepseek_v2(normalise):
    from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Config, DeepseekV2TopkRouter

    sizes = dict(hidden_size=HIDDEN, n_routed_experts=EXPERTS, num_experts_per_tok=4)
    groups = dict(topk_method="group_limited_greedy", n_group=4, topk_group=2, routed_scaling_factor=1.5)
    return DeepseekV2TopkRouter(DeepseekV2Config(**sizes, **groups))


def deepseek_v3(normalise):
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Config, DeepseekV3TopkRouter

    sizes = dict(hidden_size=HIDDEN, n_routed_experts=EXPERTS, num_experts_per_tok=4)
    groups = dict(n_group=4, topk_group=2, norm_topk_prob=normalise, routed_scaling_factor=2.5)
    return DeepseekV3TopkRouter(DeepseekV3Config(**sizes, **groups))


def glm4(normalise):
    from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeConfig, Glm4MoeTopkRouter

    sizes = dict(hidden_size=HIDDEN, n_routed_experts=EXPERTS, num_experts_per_tok=4)
    groups = dict(n_group=1, topk_group=1, norm_topk_prob=normalise, routed_scaling_factor=1.0)
    return Glm4MoeTopkRouter(Glm4MoeConfig(**sizes, **groups))


def gpt_oss(normalise):
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssConfig, GptOssTopKRouter

    sizes = dict(hidden_size=HIDDEN, num_local_experts=EXPERTS, num_experts_per_tok=4)
    return GptOssTopKRouter(GptOssConfig(**sizes))


V2 = dict(scale=1.5, groups=4, topk_groups=2)
MODELS = [
    (mixtral, True, {}),
    (qwen3, True, {}),
    (qwen3, False, {}),
    (deepseek_v2, False, V2),
    (deepseek_v3, True, V3),
    (deepseek_v3, False, V3),
    (glm4, True, dict(scores="sigmoid", balance_bias=True)),
    (gpt_oss, True, dict(bias=True)),
]


@pytest.mark.parametrize(("make", "normalise", "options"), MODELS)
def test_ids_and_weights_are_those_of_the_models_own_router(make, normalise, options):
    theirs = make(normalise)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for t in (*theirs.parameters(), *theirs.buffers()):
            t.normal_(0, 0.3, generator=generator)
    ours = TopKRouter(HIDDEN, EXPERTS, 4, normalise=normalise, **options)
    names = {"e_score_correction_bias": "balance_bias"}
    ours.load_state_dict({names.get(name, name): t for name, t in theirs.state_dict().items()})

    x, mine = tokens().requires_grad_(), tokens().requires_grad_()
    _, weights, ids = theirs(x)
    routing = ours(mine)
    want_ids, want = in_order(ids, weights)
    got_ids, got = in_order(routing.topk_idx, routing.topk_weights)
    assert torch.equal(got_ids, want_ids)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    (want.sin().sum()).backward()
    (got.sin().sum()).backward()
    torch.testing.assert_close(mine.grad, x.grad, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(ours.weight.grad, theirs.weight.grad, rtol=1e-4, atol=1e-5)


def test_a_bias_takes_part_in_the_choice_and_not_in_the_weights():
    router = TopKRouter(HIDDEN, EXPERTS, 2, scores="sigmoid", normalise=False, balance_bias=True, loss=None)
    router.balance_bias[5] = 2.0
    x = tokens()
    ids, weights, loss = router(x)
    assert bool((ids == 5).any(-1).all()) and loss == 0
    torch.testing.assert_close(weights, (x @ router.weight.T).sigmoid().gather(-1, ids))


def test_softmax_over_chosen_logits_holds_where_their_probabilities_vanish():
    """Groups and biases may choose experts that are far from the best."""
    router = TopKRouter(HIDDEN, 4, 2, balance_bias=True)
    with torch.no_grad():
        router.weight.zero_()
        router.weight[0, 0] = 300.0
        router.balance_bias += torch.tensor([-9.0, 0.0, 9.0, 9.0])
    x = torch.zeros(1, HIDDEN)
    x[0, 0] = 1.0
    ids, weights, _ = router(x)
    assert sorted(ids[0].tolist()) == [2, 3]
    assert weights.tolist() == [[0.5, 0.5]]


def test_losses_are_composed():
    def both(scores):
        return load_balance_loss(scores.probs, scores.topk_idx) + 0.5 * z_loss(scores.logits)

    router = TopKRouter(HIDDEN, EXPERTS, 2, scores="sigmoid", loss=both)
    x = tokens()
    ids, _, loss = router(x)
    logits = x @ router.weight.T
    probs = logits.sigmoid() / logits.sigmoid().sum(-1, keepdim=True)
    fraction = torch.nn.functional.one_hot(ids, EXPERTS).sum((0, 1)) / ids.numel()
    want = EXPERTS * (fraction * probs.mean(0)).sum() + 0.5 * logits.exp().sum(-1).log().square().mean()
    torch.testing.assert_close(loss, want)
    assert z_loss(torch.empty(0, EXPERTS)) == 0
    assert z_loss(torch.zeros(3, 1)) == 0  # its least value


def test_a_router_compiles_with_all_its_options(device):
    router = TopKRouter(HIDDEN, EXPERTS, 4, bias=True, device=device, **V3)
    x = tokens().to(device)
    want = router(x)
    counted = router.load.clone()
    torch._dynamo.reset()
    compiled = torch.compile(router, fullgraph=True, backend="aot_eager")
    for got, eager in zip(compiled(x), want, strict=True):
        torch.testing.assert_close(got, eager)
    assert torch.equal(router.load, 2 * counted)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (dict(topk=17), r"topk must be in 1\.\.num_experts=16, got 17"),
        (dict(groups=3), "num_experts=16 do not divide into groups=3"),
        (dict(groups=4, topk_groups=5), r"topk_groups must be in 1\.\.groups=4, got 5"),
        (dict(groups=4, topk_groups=0), "topk_groups must be at least 1, got 0"),
        (dict(groups=0), "groups must be at least 1, got 0"),
        (dict(hidden=0), "hidden must be at least 1, got 0"),
        (dict(topk=9, groups=4, topk_groups=2), "topk=9 experts are more than the 8 of topk_groups=2"),
        (dict(groups=16, topk_groups=4, group_score="best two"), "needs groups of 2 experts"),
        (dict(scores="softplus"), "scores must be .* got 'softplus'"),
        (dict(group_score="mean"), "group_score must be .* got 'mean'"),
        (dict(scale=float("nan")), "scale must be positive and finite, got nan"),
        (dict(scale=-1), "scale must be positive and finite, got -1"),
        (dict(scale=10**400), "scale must be positive and finite, got inf"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, text):
    with pytest.raises(ValueError, match=text):
        TopKRouter(**dict(hidden=HIDDEN, num_experts=EXPERTS, topk=4) | options)


@pytest.mark.parametrize("scale", [Fraction(5, 2), np.float32(2.5), 10**30])
def test_any_number_is_a_scale(scale):
    torch.manual_seed(0)
    plain = TopKRouter(HIDDEN, EXPERTS, 4)
    router = TopKRouter(HIDDEN, EXPERTS, 4, scale=scale)
    router.load_state_dict(plain.state_dict())
    want = plain(tokens()).topk_weights * float(scale)
    torch._dynamo.reset()
    for route in (router, torch.compile(router, fullgraph=True, backend="eager")):
        torch.testing.assert_close(route(tokens()).topk_weights, want)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (dict(topk=True), "topk must be an int, got True"),
        (dict(num_experts=16.0), r"num_experts must be an int, got 16\.0"),
        (dict(scale="1"), "scale must be a number, got '1'"),
        (dict(loss=3), "loss must be callable or None, got 3"),
    ],
)
def test_options_of_other_types_are_refused(options, text):
    with pytest.raises(TypeError, match=text):
        TopKRouter(**dict(hidden=HIDDEN, num_experts=EXPERTS, topk=4) | options)


# -- the bias of balance -------------------------------------------------------------------------------------


def balanced(**options):
    return TopKRouter(HIDDEN, 8, TOPK, scores="sigmoid", balance_bias=True, loss=None, **options)


def moved(loads, speed):
    """Biases of zero after one update."""
    mean = loads.sum() / len(loads)
    return speed * (mean - loads).sign()


def test_the_bias_moves_by_the_load_of_all_ranks():
    """Of several layers; a rank's own load would move its biases otherwise."""

    def rank_main(rank):
        layers = nn.ModuleList([MoELayer(HIDDEN, 16, 8, TOPK, None, router=balanced()) for _ in range(2)])
        for i, layer in enumerate(layers):
            layer.router.weight.data.copy_(tokens(8, seed=5 + i))
        counts = []
        for step in range(3 if rank else 1):  # ranks may differ in their number of forwards; rank 2 has none
            if rank < 2:
                counts.append([layer(batch(rank, step))[1].tokens_per_expert for layer in layers])
        with torch.no_grad():
            layers[0](batch(rank, 9))  # not training
        layers[1].eval()(batch(rank, 9))
        layers.train()
        loads = [torch.stack(c).sum(0) if c else torch.zeros(8) for c in zip(*counts, strict=True)]
        update_bias(layers, 0.25)
        first = [layer.router.balance_bias.clone() for layer in layers]
        update_bias(layers, 0.25)  # nothing has been chosen since
        assert all(torch.equal(b, layer.router.balance_bias) for b, layer in zip(first, layers, strict=True))
        return loads or [torch.zeros(8)] * 2, first

    said = commlib.run_ranks(rank_main, 3)
    totals = [sum(loads[i] for loads, _ in said) for i in range(2)]
    alone = 0
    for loads, biases in said:
        for load, total, bias in zip(loads, totals, biases, strict=True):
            assert torch.equal(bias, moved(total, 0.25))
            alone += not torch.equal(bias, moved(load, 0.25))
    assert alone >= 3  # of six: those that a rank's own load would have moved otherwise


def test_load_becomes_even():
    router = TopKRouter(HIDDEN, 8, TOPK, scores="sigmoid", balance_bias=True, loss=None)
    router.weight.data.copy_(0.1 * tokens(8, seed=5))
    x = tokens(256) + 1.5  # not around zero: some experts are preferred
    unevenness = []
    for _ in range(150):
        router(x)
        unevenness.append((router.load.max() / router.load.float().mean()).item())
        update_bias(router, 0.01)
    assert unevenness[0] > 1.8 and max(unevenness[-10:]) < 1.3


def test_balanced_routers_train_under_ddp_and_load_again(torch_ranks):
    def main(rank):
        ep = connect(8)
        model = Model(8, ep, router=balanced())
        ddp = DistributedDataParallel(model)
        optimizer = torch.optim.SGD(ddp.parameters(), 0.05)
        wanted = torch.zeros(8)
        for step in range(3):
            optimizer.zero_grad()
            ddp(batch(rank, step)).backward()
            load = model.moe.router.load.clone()
            optimizer.step()
            dist.all_reduce(load)
            wanted += moved(load.double(), 0.125).float()
            update_bias(ddp, 0.125)
            assert torch.equal(model.moe.router.balance_bias, wanted)
        again = Model(8, ep, router=balanced(), seed=4)
        again.load_state_dict(model.state_dict())
        assert torch.equal(again.moe.router.balance_bias, wanted)

    torch_ranks(main, 2)


def test_fsdp_ranks_with_the_same_experts_have_one_bias(torch_ranks):
    """Their communicators are two, of two ranks each; the load is that of all four."""

    def main(rank):
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "ep"))
        model = Model(8, connect(8, mesh["ep"]), router=balanced())
        fully_shard_experts(model, mesh["dp"])
        fully_shard(model, mesh=mesh)
        model(batch(rank, 0)).backward()
        load = model.moe.router.load.clone()
        dist.all_reduce(load)
        update_bias(model, 0.125)
        assert torch.equal(model.moe.router.balance_bias, moved(load.double(), 0.125).float())

    torch_ranks(main, 4)


def test_a_cast_leaves_the_bias_in_float32():
    router = balanced()
    router.balance_bias += 1 + 2**-20
    router.to(torch.bfloat16)
    assert router.weight.dtype == torch.bfloat16
    assert router.balance_bias.dtype == torch.float32 and bool((router.balance_bias == 1 + 2**-20).all())


def test_biases_that_cannot_be_moved_are_refused_on_all_ranks():
    def rank_main(rank):
        with pytest.raises(ValueError, match=r"different routers with a balance_bias, by rank \[1, 0\]"):
            update_bias(balanced() if rank == 0 else TopKRouter(HIDDEN, 8, TOPK))
        with pytest.raises(ValueError, match=r"different routers"):
            update_bias(TopKRouter(HIDDEN, 8 + 8 * rank, TOPK, balance_bias=True))
        with pytest.raises(ValueError, match=r"no router has a bias to move.*balance_bias=True"):
            update_bias(TopKRouter(HIDDEN, 8, TOPK))
        with pytest.raises(ValueError, match=r"speed must be at least 0, got -1"):
            update_bias(balanced(), -1)

    commlib.run_ranks(rank_main, 2)
