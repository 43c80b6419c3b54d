"""Training as users do it, DDP and FSDP2 around experts, has the losses of the unsharded model."""

import runpy
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from moe_models import Model, connect, train, train_unsharded
from safetensors.torch import load_file
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from commlib.nn import clip_grad_norm_, fully_shard_experts

ROOT = Path(__file__).parents[2]
EXPERTS, RANKS, MAX_NORM = 10, 4, 0.5  # 10 on 4 ranks: 2, 3, 2, 3
BEFORE, AFTER = range(3), range(3, 6)  # steps until the checkpoint, and from it on
# In float32 only the order of sums differs. Under autocast that order decides how numbers round to bfloat16.
TOLERANCE = {None: 1e-6, torch.bfloat16: 2**-8}


def torch_clip(model):
    torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)


def our_clip(model):
    clip_grad_norm_(model, MAX_NORM)


def optimizer_of(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


def under_ddp(dtype, **options):
    return DistributedDataParallel(Model(EXPERTS, connect(EXPERTS, dtype=dtype), **options)), torch_clip


def under_fsdp2(ranks):
    def wrap(dtype, **options):
        mesh = init_device_mesh("cpu", (ranks // 2, 2), mesh_dim_names=("dp", "ep"))
        model = Model(EXPERTS, connect(EXPERTS, mesh["ep"], dtype), **options)
        fully_shard_experts(model, mesh["dp"])
        return fully_shard(model, mesh=mesh), our_clip

    return wrap


def alone(dtype, **options):
    return Model(EXPERTS, None, **options), torch_clip


def save(model, optimizer, place):
    model_state, optimizer_state = get_state_dict(model, optimizer)
    dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=place)


def load(model, optimizer, place):
    model_state, optimizer_state = get_state_dict(model, optimizer)
    state = {"model": model_state, "optimizer": optimizer_state}
    dcp.load(state, checkpoint_id=place)
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])


def check(losses_by_rank, unsharded, tolerance):
    for step, wanted in enumerate(unsharded):
        got = [losses[step] for losses in losses_by_rank]
        torch.testing.assert_close(torch.tensor(got), torch.tensor(wanted), rtol=tolerance, atol=0.0)


@pytest.mark.parametrize("recompute", [None, "reentrant", "not reentrant"])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
@pytest.mark.parametrize("how", ["DDP", "FSDP2"])
def test_training_saved_and_gone_on_with_elsewhere(torch_ranks, tmp_path, how, autocast, recompute):
    """Four ranks train and save; two ranks load and go on, under the other wrapper."""
    wrappers = {"DDP": under_ddp, "FSDP2": under_fsdp2(RANKS)}, {"DDP": under_fsdp2(2), "FSDP2": under_ddp}
    options = dict(overlap_chunks=3, recompute=recompute)
    place = str(tmp_path / "checkpoint")

    def first(rank):
        model, clip = wrappers[0][how](autocast or torch.float32, **options)
        optimizer = optimizer_of(model)
        losses = train(model, optimizer, rank, BEFORE, clip, autocast)
        save(model, optimizer, place)
        return losses

    def second(rank):
        model, clip = wrappers[1][how](autocast or torch.float32, seed=99, **options)
        optimizer = optimizer_of(model)
        load(model, optimizer, place)
        return train(model, optimizer, rank, AFTER, clip, autocast)

    reference = Model(EXPERTS, None)
    optimizer = optimizer_of(reference)
    check(
        torch_ranks(first, RANKS),
        train_unsharded(reference, optimizer, RANKS, BEFORE, MAX_NORM, autocast),
        TOLERANCE[autocast],
    )
    check(
        torch_ranks(second, 2),
        train_unsharded(reference, optimizer, 2, AFTER, MAX_NORM, autocast),
        TOLERANCE[autocast],
    )
    restored = Model(EXPERTS, None, seed=99)
    load(restored, optimizer_of(restored), place)
    again = Model(EXPERTS, None)
    train_unsharded(again, optimizer_of(again), RANKS, BEFORE, MAX_NORM, autocast)
    if autocast is None:
        for got, want in zip(restored.parameters(), again.parameters(), strict=True):
            assert (got - want).norm() < 1e-5 * want.norm()  # AdamW amplifies small ones' last bits


def test_a_transformers_trainer_trains_the_unsharded_model(launch, tmp_path):
    """With its defaults: DDP by accelerate, clipping, AdamW, a schedule."""
    program = ROOT / "tests/programs/hf_trainer.py"
    done = launch(str(program), 3, "torchrun", 240, [str(tmp_path)], HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stdout + done.stderr
    result = torch.load(tmp_path / "result.pt")

    trainer = runpy.run_path(str(program))
    ranks, steps, size = 3, trainer["STEPS"], trainer["BATCH"]
    model = trainer["Model"](None)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    given = trainer["examples"](steps * size * ranks)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 1e-2 * (steps - step) / steps
        optimizer.zero_grad()
        for rank in range(ranks):
            begin = (step * ranks + rank) * size
            x, labels = (
                torch.stack([example[name] for example in given[begin : begin + size]])
                for name in ("x", "labels")
            )
            (model(x, labels)["loss"] / ranks).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        assert norm > 0.05  # it clips
        optimizer.step()
        assert result["logs"][step]["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
    saved = load_file(tmp_path / f"trainer/checkpoint-{steps}/model.safetensors")
    assert set(saved) == set(model.state_dict())
    for name, want in model.state_dict().items():
        assert torch.equal(saved[name], result["weights"][name])
        assert (result["weights"][name] - want).norm() < 1e-4 * want.norm(), name


def test_a_spread_transformers_model_is_trained_saved_and_resumed_by_our_trainer(launch, tmp_path):
    """Three ranks train as one would, and two ranks go on alike from their checkpoint in the middle."""
    program = str(ROOT / "tests/programs/hf_moe_trainer.py")

    def run(name, ranks, *checkpoint):
        arguments = [str(tmp_path / name), str(6 // ranks), *checkpoint]
        done = launch(program, ranks, "torchrun", 240, arguments, HF_HUB_OFFLINE="1")
        assert done.returncode == 0, done.stdout + done.stderr
        return load_file(tmp_path / name / "model.safetensors"), torch.load(tmp_path / name / "logs.pt")

    wanted, wanted_logs = run("one", 1)
    for name, ranks, *checkpoint in (("three", 3), ("two", 2, str(tmp_path / "three" / "checkpoint-2"))):
        weights, logs = run(name, ranks, *checkpoint)
        for got, want in zip(logs, wanted_logs, strict=True):
            for key in ("loss", "grad_norm"):
                assert got[key] == pytest.approx(want[key], rel=1e-3)
        assert weights.keys() == wanted.keys() and any("experts.4." in key for key in weights)
        for key, want in wanted.items():
            assert (weights[key] - want).norm() < 1e-3 * want.norm(), key
