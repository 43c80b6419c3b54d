"""Models of transformers over processes: transformers' own loading, DDP, saving, generation."""

import copy
import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hf_models import NAMES, batch, model_of, unsharded
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

import commlib
from commlib.integrations.transformers import gather_state_dict, parallelize
from commlib.nn import clip_grad_norm_

ROOT = Path(__file__).parents[2]
CLOSE = dict(rtol=1e-5, atol=1e-5)


def whole(t):
    return t.full_tensor() if hasattr(t, "full_tensor") else t


def saved(name, place, experts=4):
    model = model_of(name, experts=experts)
    model.save_pretrained(place)
    return model


def load(place, **sizes):
    config = DistributedConfig(ep_implementation="commlib", **sizes)
    return AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32, distributed_config=config)


# Ranks that share a batch (tp) send a part of it each; ranks with the same experts (efsdp) shard those.
SIZES = [
    dict(fsdp_size=2, ep_size=2),
    dict(tp_size=2, ep_size=2),
    dict(fsdp_size=4, ep_size=2),
    dict(fsdp_size=2, tp_size=2, ep_size=4),
    dict(fsdp_size=2, dp_replicate_size=2, ep_size=2),
]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_distributed_config_gives_the_unsharded_logits_and_gradients(name, sizes, torch_ranks, tmp_path):
    tp = sizes.get("tp_size", 1)
    ranks = sizes.get("fsdp_size", 1) * sizes.get("dp_replicate_size", 1) * tp
    model = saved(name, tmp_path / "whole")
    # Batches of one length: ranks of one batch gather its logits.
    batches = [batch(i, tokens=11) for i in range(ranks // tp)]
    wanted, gradients = unsharded(model, batches)

    def main(rank):
        model = load(tmp_path / "whole", **sizes)
        mine = rank // tp
        out = model(input_ids=batches[mine], labels=batches[mine])
        torch.testing.assert_close(whole(out.logits), wanted[mine][1], **CLOSE)
        out.loss.backward()
        for at, p in model.named_parameters():
            if gradients[at] is not None and "experts" in at:
                scale = gradients[at].abs().max().item()
                got = whole(p.grad) * len(batches)
                torch.testing.assert_close(got, gradients[at], rtol=0, atol=1e-4 * scale, msg=at)

    torch_ranks(main, ranks)


def test_a_rank_whose_experts_get_no_rows_does_not_keep_fsdp_waiting(torch_ranks, tmp_path):
    """FSDP2 reduces the gradients of its experts with those of ranks that hold the same ones."""
    model = model_of("mixtral", experts=4)
    with torch.no_grad():
        model.model.embed_tokens.weight.abs_()
        for layer in model.model.layers:
            layer.mlp.gate.weight.zero_()
            layer.mlp.gate.weight[:2] = 1.0
    model.save_pretrained(tmp_path / "whole")
    batches = [batch(i, tokens=6) for i in range(4)]
    _, gradients = unsharded(model, batches)

    def main(rank):
        model = load(tmp_path / "whole", fsdp_size=4, ep_size=2)
        for _ in range(2):
            model(input_ids=batches[rank], labels=batches[rank]).loss.backward()
        grad = whole(model.model.layers[0].mlp.experts.down_proj.grad) * 2
        assert not grad[2:].any()
        want = gradients["model.layers.0.mlp.experts.down_proj"]
        torch.testing.assert_close(grad, want, rtol=0, atol=1e-4 * want.abs().max().item())

    torch_ranks(main, 4)


@pytest.mark.parametrize("sizes", [dict(tp_size=2, ep_size=2), dict(fsdp_size=2, ep_size=2)], ids=str)
def test_what_transformers_has_spread_generates(sizes, torch_ranks, tmp_path):
    """One token at a time: fewer than ranks that share it."""
    model = saved("qwen3_moe", tmp_path / "whole")
    prompts = [batch(rank, tokens=5) for rank in range(2)]
    options = dict(max_new_tokens=6, do_sample=False, pad_token_id=0)
    wanted = [model.generate(ids, **options) for ids in prompts]

    def main(rank):
        mine = 0 if "tp_size" in sizes else rank
        got = load(tmp_path / "whole", **sizes).generate(prompts[mine], **options)
        assert torch.equal(got, wanted[mine])

    torch_ranks(main, 2)


def test_what_transformers_has_spread_is_not_spread_again(torch_ranks, tmp_path):
    saved("mixtral", tmp_path / "whole")

    def main(rank):
        model = load(tmp_path / "whole", fsdp_size=2, ep_size=2)
        with pytest.raises(ValueError, match=r"has been spread by transformers or FSDP2 already"):
            parallelize(model)

    torch_ranks(main, 2)


@pytest.mark.parametrize("name", NAMES)
def test_a_saved_model_is_that_of_the_hub(name, torch_ranks, tmp_path):
    """Written from three ranks, five experts, it is loaded by transformers without commlib, bit for bit."""
    model = model_of(name)
    model.save_pretrained(tmp_path / "unsharded")

    def main(rank):
        own = parallelize(AutoModelForCausalLM.from_pretrained(tmp_path / "unsharded", dtype=torch.float32))
        own.save_pretrained(tmp_path / "saved")
        state = gather_state_dict(own)
        assert bool(state) == (rank == 0)
        again = parallelize(AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32))
        with torch.no_grad():
            assert torch.equal(again(batch(rank)).logits, own(batch(rank)).logits)
        return dict(state)

    state = torch_ranks(main, 3)[0]
    names = {p.name for p in (tmp_path / "saved").iterdir()}
    assert names == {p.name for p in (tmp_path / "unsharded").iterdir()}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    for key, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key
        assert torch.equal(state[key], value), key


def test_saving_on_one_rank_says_which_ranks_did_not_come(torch_ranks, tmp_path, monkeypatch):
    """And does so before torch's half hour: transformers' Trainer saves on the first rank alone."""
    monkeypatch.setattr("commlib.integrations.transformers.parallel.START_SECONDS", 1.0)

    def main(rank):
        model = parallelize(model_of("mixtral"))
        if rank == 0:
            with pytest.raises(commlib.PeerTimeout, match=r"rank 1 did not come .* group call save_pretr"):
                model.save_pretrained(tmp_path / "saved")
        dist.barrier()

    torch_ranks(main, 2)


@pytest.mark.parametrize("wrapped", ["DDP", "sync_gradients"])
def test_steps_under_ddp_are_those_of_the_unsharded_model(wrapped, torch_ranks):
    ranks, steps, norm = 3, 3, 0.1
    whole_model = model_of("qwen3_moe")
    optimizer = torch.optim.AdamW(whole_model.parameters(), lr=1e-2)
    wanted = []
    for step in range(steps):
        batches = [batch(ranks * step + rank, tokens=8 + rank) for rank in range(ranks)]
        losses = [whole_model(input_ids=ids, labels=ids).loss for ids in batches]
        (sum(losses) / ranks).backward()
        torch.nn.utils.clip_grad_norm_(whole_model.parameters(), norm)
        optimizer.step()
        optimizer.zero_grad()
        wanted.append([loss.item() for loss in losses])

    def main(rank):
        model = parallelize(model_of("qwen3_moe"))
        run = DistributedDataParallel(model) if wrapped == "DDP" else model
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        losses = []
        for step in range(steps):
            ids = batch(ranks * step + rank, tokens=8 + rank)
            loss = run(input_ids=ids, labels=ids).loss
            loss.backward()
            if wrapped != "DDP":
                commlib.nn.sync_gradients(model)
            clip_grad_norm_(model, norm)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses, gather_state_dict(model)

    got = torch_ranks(main, ranks)
    for step in range(steps):
        for rank in range(ranks):
            assert got[rank][0][step] == pytest.approx(wanted[step][rank], rel=1e-4)
    for key, value in whole_model.state_dict().items():
        torch.testing.assert_close(got[0][1][key], value, rtol=1e-3, atol=2e-4, msg=key)


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3"])
def test_ranks_generate_texts_of_different_lengths(name, torch_ranks):
    """A rank that has ended goes on for the others, whose tokens need its experts."""
    model = model_of(name)
    prompts = [batch(rank, tokens=4 + rank) for rank in range(3)]
    limits = [3, 12, 6]
    options = dict(do_sample=False, pad_token_id=0)
    wanted = [
        model.generate(ids, max_new_tokens=n, **options) for ids, n in zip(prompts, limits, strict=True)
    ]

    def main(rank):
        own = parallelize(model)
        return own.generate(prompts[rank], max_new_tokens=limits[rank], **options)

    for got, want in zip(torch_ranks(main, 3), wanted, strict=True):
        assert torch.equal(got, want)


def test_fsdp2_after_parallelize(torch_ranks):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    batches = [batch(rank, tokens=7 + rank) for rank in range(4)]
    _, gradients = unsharded(model_of("mixtral", experts=4), batches)

    def main(rank):
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "ep"))
        model = parallelize(model_of("mixtral", experts=4), mesh["ep"])
        commlib.nn.fully_shard_experts(model, mesh["dp"])
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        model(input_ids=batches[rank], labels=batches[rank]).loss.backward()
        for at, p in model.named_parameters():
            got, want = whole(p.grad) * 4, gradients[at]
            torch.testing.assert_close(got, want, rtol=0, atol=1e-4 * want.abs().max().item(), msg=at)

    torch_ranks(main, 4)


@pytest.mark.parametrize("name", ["gpt_oss"])
def test_the_example_counts_all_tokens_by_expert_and_layer(name, launch, tmp_path):
    """And its loss falls. Each of 2 ranks has 4 texts of 128 tokens, for 2 experts each."""
    arguments = [
        "--model",
        name,
        "--steps",
        "8",
        "--layers",
        "2",
        "--experts",
        "5",
        "--plot",
        str(tmp_path / "map.png"),
    ]
    done = launch(str(ROOT / "examples/hf_moe.py"), 2, "torchrun", 120, arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    losses = [float(loss) for loss in re.findall(r"step \d+: loss ([\d.]+)", done.stdout + done.stderr)]
    assert losses[1] < losses[0]
    rows = [line for line in done.stdout.splitlines() if re.match(r"\s+\d ", line)]
    assert len(rows) == 2
    for row in rows:
        counts = [int(n) for n in re.findall(r"\d+", row)][1:]
        assert len(counts) == 5 and sum(counts) == 2 * 4 * 128 * 2
    assert (tmp_path / "map.png").stat().st_size > 1000


@pytest.mark.parametrize("called", [False, True], ids=["before", "after a call"])
def test_a_copy_of_a_model_has_weights_of_its_own_and_the_same_ranks(called, torch_ranks):
    model = model_of("mixtral", experts=5)
    double = copy.deepcopy(model)
    with torch.no_grad():
        for p in double.parameters():
            p.mul_(2)
    wanted = [[m(batch(rank)).logits for m in (model, double)] for rank in range(2)]

    def main(rank):
        spread = parallelize(copy.deepcopy(model))
        if called:
            spread(batch(rank))
        other = copy.deepcopy(spread)
        with torch.no_grad():
            for p in other.parameters():
                p.mul_(2)
        return [m(batch(rank)).logits.detach() for m in (spread, other)]

    for got, want in zip(torch_ranks(main, 2), wanted, strict=True):
        torch.testing.assert_close(got, want, **CLOSE)


def test_a_state_dict_of_parts_is_not_saved_as_the_model(torch_ranks, tmp_path):
    """accelerator.get_state_dict(model) is one."""
    model = model_of("mixtral", experts=5)

    def main(rank):
        spread = parallelize(copy.deepcopy(model))
        with pytest.raises(ValueError, match=r"is one rank's part: leave state_dict out"):
            spread.save_pretrained(tmp_path / str(rank), state_dict=spread.state_dict())
        whole = gather_state_dict(spread)
        if rank == 0:
            spread.save_pretrained(tmp_path / "whole", state_dict=whole)

    torch_ranks(main, 2)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "whole", dtype=torch.float32)
    torch.testing.assert_close(again.state_dict(), model.state_dict())


def test_a_part_of_the_ranks_generates_by_itself(torch_ranks):
    """The other ranks have no model, and are not asked whether they have ended."""
    model = model_of("mixtral")
    options = dict(max_new_tokens=3, do_sample=False, pad_token_id=0)
    wanted = [model.generate(batch(i, tokens=4), **options) for i in range(2)]

    def main(rank):
        group = dist.new_group([1, 2])
        if rank == 0:
            return
        got = parallelize(model, group).generate(batch(rank - 1, tokens=4), **options)
        assert torch.equal(got, wanted[rank - 1])

    torch_ranks(main, 3)
