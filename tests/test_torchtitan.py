"""commlib under torchtitan's own mixture-of-experts layer, beside torchtitan's own dispatchers."""

import pytest
import titan_models as titan
import torch
from titan_models import WEIGHTS, build, moe_config, overridden, wired
from torch.distributed.device_mesh import init_device_mesh
from torchtitan.models.common.token_dispatcher import (
    LocalTokenDispatcher,
)

EXPERTS = 8


def expert_mesh(ranks):
    return init_device_mesh("cpu", (ranks,), mesh_dim_names=("ep",))


def ours(experts=EXPERTS, **arguments):
    return overridden(moe_config(experts), **arguments)


def step(moe, x):
    """Output, and gradients by name, x's among them. Each of x's sequences is a term of the loss."""
    x = x.clone().requires_grad_()
    out = moe(x)
    (out.float() * torch.linspace(-1, 1, out[0].numel()).view(out[0].shape)).sum().backward()
    return out.detach(), {name: p.grad for name, p in moe.named_parameters()} | {"x": x.grad}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ranks", [2, 4])
def test_results_and_gradients_are_those_of_torchtitans_all_to_all(torch_ranks, ranks, dtype):
    def main(rank):
        x, mesh = titan.batch(rank, dtype=dtype), expert_mesh(ranks)
        layers = [build(config, rank, ranks).to(dtype) for config in (moe_config(EXPERTS), ours())]
        return [step(wired(moe, mesh), x) for moe in layers]

    # torchtitan rounds each expert's row to the rows' type, commlib a rank's sum.
    close = {} if dtype == torch.float32 else dict(rtol=2e-2, atol=2e-2)
    for theirs, mine in torch_ranks(main, ranks):
        torch.testing.assert_close(mine, theirs, **close)


@pytest.mark.parametrize("ranks", [2, 4])
def test_results_and_gradients_are_those_of_a_layer_with_all_experts(torch_ranks, ranks):
    def main(rank):
        moe = build(ours(), rank, ranks)
        return step(wired(moe, expert_mesh(ranks)), titan.batch(rank))

    outs, gradients = zip(*torch_ranks(main, ranks), strict=True)
    whole = wired(build(moe_config(EXPERTS, LocalTokenDispatcher.Config)), None)
    out, wanted = step(whole, torch.cat([titan.batch(rank) for rank in range(ranks)]))
    torch.testing.assert_close(torch.cat(outs), out)
    for name, want in wanted.items():
        of_ranks = [found[name] for found in gradients]
        got = sum(of_ranks) if "router" in name else torch.cat(of_ranks)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: name + text)


def test_rows_counts_and_their_order_are_torchtitans(torch_ranks):
    def main(rank):
        mesh, generator = expert_mesh(2), torch.Generator().manual_seed(rank)
        x, scores = (
            torch.randn(5, titan.DIM, generator=generator),
            torch.rand(5, titan.TOPK, generator=generator),
        )
        ids = torch.stack([torch.randperm(EXPERTS, generator=generator)[: titan.TOPK] for _ in range(5)])
        counts = torch.bincount(ids.flatten(), minlength=EXPERTS)
        layers = [wired(build(config, rank, 2), mesh) for config in (moe_config(EXPERTS), ours())]
        dispatchers = [moe.routed_experts.token_dispatcher for moe in layers]
        return [dispatcher.dispatch(x, scores, ids, counts)[:2] for dispatcher in dispatchers]

    for theirs, mine in torch_ranks(main, 2):
        for got, want in zip(mine, theirs, strict=True):
            assert got.dtype == want.dtype
            assert torch.equal(got, want)


def test_a_rank_to_whose_experts_nobody_sends(torch_ranks):
    def main(rank):
        layers = [build(config, rank, 4) for config in (moe_config(EXPERTS), ours())]
        for moe in layers:
            moe.expert_bias_E[:3] = 100.0  # all tokens choose experts 0, 1 and 2: of ranks 0 and 1
        return [step(wired(moe, expert_mesh(4)), titan.batch(rank)) for moe in layers]

    said = torch_ranks(main, 4)
    for theirs, mine in said:
        torch.testing.assert_close(mine, theirs)
    for name in WEIGHTS:
        _, (_, gradients) = said[3]
        assert not gradients[f"routed_experts.inner_experts.{name}"].any()
