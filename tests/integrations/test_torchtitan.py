"""commlib under torchtitan's own mixture-of-experts layer, beside torchtitan's own dispatchers."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import titan_models as titan
import torch
from titan_models import WEIGHTS, build, moe_config, overridden, wired
from torch.distributed.device_mesh import init_device_mesh
from torchtitan.config import OverrideConfig, apply_overrides
from torchtitan.config.override import parse_cli_imports
from torchtitan.distributed.activation_checkpoint import FullAC, SelectiveAC
from torchtitan.distributed.utils import get_spmd_context
from torchtitan.models.common.token_dispatcher import (
    DeepEPTokenDispatcher,
    HybridEPTokenDispatcher,
    LocalTokenDispatcher,
    TorchAOTokenDispatcher,
)

from commlib.integrations import torchtitan as integration
from commlib.integrations.versions import require

EXPERTS = 8


def expert_mesh(ranks):
    return init_device_mesh("cpu", (ranks,), mesh_dim_names=("ep",))


def ours(experts=EXPERTS, **arguments):
    return overridden(moe_config(experts), **arguments)


def step(moe, x):
    """Output, and gradients by name, x's among them. Each of x's sequences is a term of the loss."""
    x = x.clone().requires_grad_()
    out = titan.local(moe(x))
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


def test_a_rank_whose_experts_receive_nothing(torch_ranks):
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


def counted(f):
    """What ``f`` returns, and how often this rank's only communicator has sent meanwhile."""
    before = communicator().stats() if integration._communicators else {}
    result = f()
    sent = communicator().stats()
    return result, {
        name: sent[name] - before.get(name, 0) for name in ("dispatches", "redispatches", "combines")
    }


def communicator():
    (ep,) = integration._communicators.values()
    return ep


def layers_of(count, rank, ranks, mesh):
    return titan.Layers([wired(build(ours(), rank, ranks), mesh) for _ in range(count)])


def test_layers_that_are_alike_share_a_communicator_and_others_do_not(torch_ranks):
    def main(rank):
        mesh = expert_mesh(2)
        layers_of(3, rank, 2, mesh)(titan.batch(rank))
        alike = len(integration._communicators)
        wired(build(ours(4), rank, 2), mesh)(titan.batch(rank))
        layers_of(1, rank, 2, mesh).bfloat16()(titan.batch(rank, dtype=torch.bfloat16))
        different = len(integration._communicators)
        torch.distributed.destroy_process_group()
        del mesh
        return alike, different, len(integration._communicators)

    assert torch_ranks(main, 2) == [(1, 3, 0)] * 2


def test_batches_may_grow(torch_ranks):
    """Also beyond a communicator's room at first."""

    def main(rank):
        moe = wired(build(ours(), rank, 2), expert_mesh(2))
        with torch.no_grad():
            outs = [moe(titan.batch(rank, length=length)) for length in (12, 2500, 12)]
        return outs, communicator().stats()["growths"]

    whole = wired(build(moe_config(EXPERTS, LocalTokenDispatcher.Config)), None)
    for rank, (outs, growths) in enumerate(torch_ranks(main, 2)):
        assert growths == 1
        for out in outs:
            with torch.no_grad():
                torch.testing.assert_close(out, whole(titan.batch(rank, length=out.shape[1])))


@pytest.mark.parametrize("compiled", [False, True])
def test_selective_checkpointing_sends_nothing_again(torch_ranks, compiled):
    """With torchtitan's compilation a communicator is made while the first layer is traced."""

    def main(rank):
        mesh, x = expert_mesh(2), titan.batch(rank)

        def run(policy):
            model = layers_of(2, rank, 2, mesh)
            if policy is not None:
                policy(policy.Config()).apply(model)
            if compiled:
                titan.compile_as_torchtitan(model, "aot_eager")
            return counted(lambda: step(model, x))

        return run(SelectiveAC), run(None), run(None if compiled else FullAC)

    once = dict(dispatches=2, redispatches=2, combines=4)  # of two layers; dispatch's gradient is a combine
    for (selective, sent), (plain, sent_plainly), (full, sent_twice) in torch_ranks(main, 2):
        assert sent == sent_plainly == once
        assert sent_twice == once if compiled else dict(dispatches=4, redispatches=2, combines=6)
        names = "._checkpoint_wrapped_module"
        for out, gradients in selective, full:
            assert torch.equal(out, plain[0])
            gradients = {name.replace(names, ""): grad for name, grad in gradients.items()}
            for name, want in plain[1].items():
                assert torch.equal(gradients[name], want), name


@pytest.mark.parametrize(
    ("backend", "tp"), [("partial_dtensor", 1), ("partial_dtensor", 2), ("spmd_types", 1)]
)
def test_with_torchtitans_own_parallelize(torch_ranks, backend, tp):
    """Parameters are DTensors or its typed shards. Tensor-parallel ranks hold parts of the same sequences."""
    ranks = 2 * tp

    def main(rank):
        dims = titan.dimensions(ranks, ep=ranks, tp=tp, backend=backend)
        moe = titan.parallelized(ours(), dims)
        with get_spmd_context(parallel_dims=dims)():
            out, gradients = step(moe, titan.batch(rank))
        return out, {name: titan.local(gradients[name]) for name in gradients if "w1" in name}

    outs, gradients = zip(*torch_ranks(main, ranks), strict=True)
    whole = wired(build(moe_config(EXPERTS, LocalTokenDispatcher.Config)), None)
    out, wanted = step(whole, torch.cat([titan.batch(rank) for rank in range(ranks)]))
    torch.testing.assert_close(torch.cat(outs), out)
    for name in gradients[0]:
        got = torch.cat([found[name] for found in gradients])
        torch.testing.assert_close(got, wanted[name], rtol=1e-4, atol=1e-5)


def test_with_torchtitans_fsdp_gradients_are_those_of_its_all_to_all(torch_ranks):
    """Each two ranks share the experts, and the other two hold the same ones, sharded."""

    def main(rank):
        dims, said = titan.dimensions(4, ep=2), []
        for config in lambda: moe_config(EXPERTS), ours:
            model = titan.Layers([titan.parallelized(config(), dims) for _ in range(2)])
            out, gradients = step(titan.fully_sharded(model, dims), titan.batch(rank))
            said.append((out, {name: titan.local(grad) for name, grad in gradients.items()}))
        return said

    for theirs, mine in torch_ranks(main, 4):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


def test_results_are_the_same_bits_each_time(torch_ranks):
    def main(rank):
        moe = wired(build(ours(), rank, 4), expert_mesh(4)).bfloat16()
        steps = []
        for _ in range(3):
            moe.zero_grad()
            steps.append(step(moe, titan.batch(rank, dtype=torch.bfloat16)))
        return steps

    for (out, gradients), *others in torch_ranks(main, 4):
        for other, again in others:
            assert torch.equal(other, out)
            assert all(torch.equal(again[name], grad) for name, grad in gradients.items())


def test_without_expert_parallelism_it_is_torchtitans_local_dispatcher():
    x = titan.batch(0)
    local = wired(build(moe_config(EXPERTS, LocalTokenDispatcher.Config)), None)
    mine = wired(build(ours()), None)
    torch.testing.assert_close(step(mine, x), step(local, x), rtol=0, atol=0)


def test_the_override_takes_bounds_that_are_known():
    def bound(config):
        dispatcher = config.routed_experts.token_dispatcher
        assert type(dispatcher) is integration.CommlibTokenDispatcher.Config
        assert (dispatcher.num_experts, dispatcher.top_k) == (EXPERTS, titan.TOPK)
        return dispatcher.build().num_max_tokens_per_rank

    known = dict(num_max_tokens_per_rank=96, hidden_dim=titan.DIM)
    assert bound(ours()) is None
    assert bound(ours(num_max_tokens_per_rank=64)) == 64
    for theirs in DeepEPTokenDispatcher.Config, HybridEPTokenDispatcher.Config:
        assert bound(overridden(moe_config(EXPERTS, theirs, **known))) == 96
        assert bound(overridden(moe_config(EXPERTS, theirs, **known), num_max_tokens_per_rank=64)) == 64


@pytest.mark.parametrize(
    ("theirs", "options", "text"),
    [
        (
            TorchAOTokenDispatcher.Config,
            dict(pad_multiple=16),
            r"quantised \(TorchAO.*pad_multiple=16\).*converter",
        ),
        (HybridEPTokenDispatcher.Config, dict(pad_multiple=32), r"quantised \(HybridEP.*pad_multiple=32\)"),
        (DeepEPTokenDispatcher.Config, dict(cudagraphable=True), "cudagraphable=True, but .* CUDA graph"),
    ],
)
def test_what_the_override_refuses(theirs, options, text):
    with pytest.raises(ValueError, match=text):
        overridden(moe_config(EXPERTS, theirs, **options))


def test_the_flags_in_the_documentation_are_ones_that_torchtitan_takes():
    page = (Path(__file__).parents[2] / "docs/torchtitan.md").read_text()
    flags = re.findall(r"--override\.imports (?:'(.*)'|(\S+))", page)
    assert len(flags) == 2
    bounds = []
    for quoted, bare in flags:
        config = moe_config(EXPERTS)
        apply_overrides(OverrideConfig(imports=parse_cli_imports([quoted or bare])), config)
        bounds.append(config.routed_experts.token_dispatcher.num_max_tokens_per_rank)
    assert bounds == [None, 8192]


def test_a_bound_that_is_none_is_refused():
    with pytest.raises(ValueError, match="num_max_tokens_per_rank must be positive, got 0"):
        ours(num_max_tokens_per_rank=0).build()


def test_experts_that_do_not_spread_evenly_are_refused(torch_ranks):
    def main(rank):
        with pytest.raises(
            ValueError, match=r"num_experts is 9, no multiple of the 2 ranks.*parallel_degree"
        ):
            wired(build(ours(9)), expert_mesh(2))

    torch_ranks(main, 2)


def test_more_tokens_than_the_bound_are_refused_before_anything_is_sent(torch_ranks):
    def main(rank):
        moe = wired(build(ours(num_max_tokens_per_rank=24), rank, 2), expert_mesh(2))
        with pytest.raises(ValueError, match=r"26 tokens .* num_max_tokens_per_rank is 24"):
            moe(titan.batch(rank, length=13))
        return moe(titan.batch(rank, length=12)).shape

    assert torch_ranks(main, 2) == [(2, 12, titan.DIM)] * 2


IMPORT = """
from importlib import metadata

def version(name):
    if {version!r} is None:
        raise metadata.PackageNotFoundError(name)
    return {version!r}

metadata.version = version
import commlib.integrations.torchtitan
"""


@pytest.mark.parametrize(
    ("version", "text"),
    [
        (None, 'torchtitan is not installed: pip install "torchtitan>=0.3.0,<0.4"'),
        ("0.2.1", "torchtitan 0.2.1 is installed, but commlib is tested with >=0.3.0,<0.4"),
        ("0.10.0", "torchtitan 0.10.0 is installed, but commlib is tested with >=0.3.0,<0.4"),
    ],
)
def test_importing_it_says_which_torchtitan_it_is_tested_with(version, text):
    program = [sys.executable, "-c", IMPORT.format(version=version)]
    done = subprocess.run(program, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert f"ImportError: {text}" in done.stderr


def test_a_version_in_the_tested_range_is_taken(monkeypatch):
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.3.1.dev20261101+cpu")
    require("torchtitan", "0.3.0", "0.4")
