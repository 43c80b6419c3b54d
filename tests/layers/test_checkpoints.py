"""Checkpoints of models with experts: every rank gets its own back, on any number of ranks."""

import copy
import io
import math

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from moe_models import Model, batch, connect, full
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.utils import prune

import commlib
from commlib.nn import (
    clip_grad_norm_,
    full_state_dict,
    fully_shard_experts,
    sync_gradients,
)


def numbered(model, optimizer, first):
    """Give every parameter, and its state, numbers that say which expert and position they belong to."""
    for i, (name, p) in enumerate(sorted(model.named_parameters())):
        for j, tensor in enumerate((p.data, *optimizer.state[p].values())):
            if tensor.dim():
                rows = torch.arange(len(tensor)) + (first if "experts" in name else 0)
                within = torch.arange(math.prod(tensor.shape[1:])).view(tensor.shape[1:]) / 4096
                tensor.copy_(
                    (rows + 100 * i + 10000 * j).view(-1, *[1] * within.dim()).expand_as(tensor) + within
                )


def stepped(model, make):
    """An optimizer that has state."""
    optimizer = make(model.parameters())
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.0)


def momentum(parameters):
    return torch.optim.SGD(parameters, lr=1e-3, momentum=0.9)


def adafactor(parameters):
    return torch.optim.Adafactor(parameters, lr=1e-3)


def tensors_of(model, optimizer):
    return [
        t.clone()
        for _, p in sorted(model.named_parameters())
        for t in (p.data, *optimizer.state[p].values())
        if t.dim()
    ]


def check_numbered(model, optimizer, first):
    got = tensors_of(model, optimizer)
    numbered(model, optimizer, first)
    for a, b in zip(got, tensors_of(model, optimizer), strict=True):
        assert torch.equal(a, b)


def spoil(model, optimizer):
    for t in [p.data for p in model.parameters()]:
        t.fill_(-1)
    for state in optimizer.state.values():
        for t in state.values():
            if t.dim():
                t.fill_(-1)


OPTIMIZERS = {"adamw": adamw, "momentum": momentum, "adafactor": adafactor}


@pytest.mark.parametrize(
    ("experts", "optimizers"),
    # torch's Adafactor divides by zero where a rank has no expert.
    [(8, OPTIMIZERS), (10, OPTIMIZERS), (3, {"adamw": adamw, "momentum": momentum})],
)
def test_saved_on_four_ranks_and_loaded_on_others(torch_ranks, tmp_path, experts, optimizers):
    def save(rank):
        ep = connect(experts)
        for name, make in optimizers.items():
            model = Model(experts, ep)
            optimizer = stepped(model, make)
            numbered(model, optimizer, model.moe.experts.first)
            model_state, optimizer_state = get_state_dict(model, optimizer)
            state = {"model": model_state, "optimizer": optimizer_state}
            dcp.save(state, checkpoint_id=str(tmp_path / name))

    def load(rank):
        ep = connect(experts)
        for name, make in optimizers.items():
            model = Model(experts, ep)
            optimizer = stepped(model, make)
            spoil(model, optimizer)
            model_state, optimizer_state = get_state_dict(model, optimizer)
            state = {"model": model_state, "optimizer": optimizer_state}
            dcp.load(state, checkpoint_id=str(tmp_path / name))
            set_state_dict(
                model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
            )
            check_numbered(model, optimizer, model.moe.experts.first)

    torch_ranks(save, 4)
    for ranks in (1, 2, 3, 8):
        torch_ranks(load, ranks)


@pytest.mark.parametrize("given", ["a mesh", "a group"])
@pytest.mark.parametrize("experts", [8, 6, 5, 2])
def test_saved_from_fsdp2_and_loaded_unsharded_and_by_fsdp2(torch_ranks, tmp_path, experts, given):
    """With 6, 5 and 2 experts FSDP2's parts are uneven, or empty."""
    place = str(tmp_path / "checkpoint")

    def sharded(weights=None):
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "ep"))
        model = Model(experts, connect(experts, mesh["ep"] if given == "a mesh" else mesh["ep"].get_group()))
        if weights is not None:
            model.load_state_dict(weights)
        return fully_shard(fully_shard_experts(model, mesh["dp"]), mesh=mesh)

    def exchange(model, optimizer, function):
        model_state, optimizer_state = get_state_dict(model, optimizer)
        state = {"model": model_state, "optimizer": optimizer_state}
        function(state, checkpoint_id=place)
        return state

    def load(model, optimizer):
        state = exchange(model, optimizer, dcp.load)
        set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])

    def main(rank):
        whole = Model(experts, None)
        optimizer = stepped(whole, adamw)
        numbered(whole, optimizer, 0)
        model = sharded(whole.state_dict())
        other = stepped(model, adamw)
        for p, q in zip(model.parameters(), whole.parameters(), strict=True):
            for name in ("exp_avg", "exp_avg_sq"):  # a function of the parameter, wherever that is
                optimizer.state[q][name] = q.detach() + len(name)
                other.state[p][name] = p.detach() + len(name)
        exchange(model, other, dcp.save)
        again = Model(experts, None, seed=9)
        loads = stepped(again, adamw)
        load(again, loads)
        for a, b in zip(tensors_of(again, loads), tensors_of(whole, optimizer), strict=True):
            assert torch.equal(a, b)
        back = sharded()
        loads = stepped(back, adamw)
        load(back, loads)
        for a, b in zip(tensors_of(back, loads), tensors_of(model, other), strict=True):
            assert torch.equal(a.to_local(), b.to_local())
        gathered = full_state_dict(back)
        for name, value in gathered.items():
            assert torch.equal(value, whole.state_dict()[name])

    torch_ranks(main, 4)


def one_step(model, optimizer, rank, step):
    optimizer.zero_grad()
    model(batch(rank, step)).backward()
    sync_gradients(model)
    optimizer.step()


def test_plain_state_dicts_are_loaded_by_the_same_rank(torch_ranks):
    def main(rank):
        ep = connect(10)
        model = Model(10, ep)
        optimizer = adamw(model.parameters())
        one_step(model, optimizer, rank, 0)
        for i, has_state in enumerate((True, False), 1):
            saved = io.BytesIO()
            torch.save([model.state_dict(), optimizer.state_dict()], saved)
            saved.seek(0)
            other = Model(10, ep)
            loads = stepped(other, adamw) if has_state else adamw(other.parameters())
            model_state, optimizer_state = torch.load(saved, weights_only=False)
            other.load_state_dict(model_state)
            loads.load_state_dict(optimizer_state)
            one_step(model, optimizer, rank, i)
            one_step(other, loads, rank, i)
            for a, b in zip(tensors_of(model, optimizer), tensors_of(other, loads), strict=True):
                assert torch.equal(a, b)
            assert not any(isinstance(v, DTensor) for s in loads.state.values() for v in s.values())

    torch_ranks(main, 4)


def test_an_asynchronous_checkpoint(torch_ranks, tmp_path):
    def main(rank):
        for experts in (8, 10):
            place = str(tmp_path / f"{experts}")
            model = Model(experts, connect(experts))
            optimizer = stepped(model, adamw)
            numbered(model, optimizer, model.moe.experts.first)
            state = {"model": model.state_dict(), "optimizer": get_optimizer_state_dict(model, optimizer)}
            dcp.async_save(state, checkpoint_id=place).result()
            spoil(model, optimizer)
            state = {"model": model.state_dict(), "optimizer": get_optimizer_state_dict(model, optimizer)}
            dcp.load(state, checkpoint_id=place)
            model.load_state_dict(state["model"])
            set_optimizer_state_dict(model, optimizer, state["optimizer"])
            check_numbered(model, optimizer, model.moe.experts.first)

    torch_ranks(main, 4)


def test_whole_state_dicts_by_torchs_functions(torch_ranks):
    """Where all ranks hold equally many experts; elsewhere DTensor cannot, and says so."""
    whole = full(Model(8, None))

    def main(rank):
        model = Model(8, connect(8))
        mine = [p.detach().clone() for p in model.parameters()]
        everything = StateDictOptions(full_state_dict=True)
        for name, value in get_model_state_dict(model, options=everything).items():
            assert torch.equal(value, whole[name]), name
        for options, given in (
            (everything, whole),
            (StateDictOptions(full_state_dict=True, broadcast_from_rank0=True), whole if rank == 0 else {}),
        ):
            spoil(model, adamw(model.parameters()))
            set_model_state_dict(model, dict(given), options=options)
            assert all(torch.equal(a, b) for a, b in zip(mine, model.parameters(), strict=True))
        with pytest.raises(NotImplementedError, match="full_state_dict"):
            get_model_state_dict(Model(10, connect(10)), options=everything)

    torch_ranks(main, 4)


def test_a_checkpoint_of_another_model_is_refused(torch_ranks, tmp_path):
    place = str(tmp_path / "checkpoint")

    def main(rank):
        dcp.save(Model(8, connect(8)).state_dict(), checkpoint_id=place)
        model = Model(10, connect(10))
        with pytest.raises(
            dcp.api.CheckpointException, match=r"Size mismatch .*\[8, 32, 16\].*\[10, 32, 16\]"
        ):
            dcp.load(model.state_dict(), checkpoint_id=place)
        with pytest.raises(RuntimeError, match=r"what is loaded has 8 experts, the model has 10, of which"):
            model.load_state_dict(Model(8, None).state_dict())
        with pytest.raises(ValueError, match=r"holds no commlib\.nn\.Experts"):
            full_state_dict(model.before)

    torch_ranks(main, 4)


@pytest.mark.parametrize("experts", [8, 10])
def test_another_ranks_file_is_refused_and_its_own_is_loaded(torch_ranks, tmp_path, experts):
    """Also where the first rank's is loaded by all, as is usual where ranks are the same."""

    def main(rank):
        model = Model(experts, connect(experts))
        optimizer = stepped(model, adamw)
        for i, state in enumerate((model.state_dict(), optimizer.state_dict())):
            torch.save(state, tmp_path / f"{i}.{rank}.pt")
        dist.barrier()
        for other in (0, (rank + 2) % 4, rank):
            loads = [lambda s: model.load_state_dict(s), lambda s: optimizer.load_state_dict(s)]
            for i, load in enumerate(loads):
                state = torch.load(tmp_path / f"{i}.{other}.pt")
                if other == rank:
                    load(state)
                else:
                    with pytest.raises(ValueError, match="as a rank has saved them for itself"):
                        load(state)

    torch_ranks(main, 4)


@pytest.mark.parametrize("given", ["a mesh", "a group"])
def test_a_process_group_that_is_destroyed_while_the_user_keeps_it(torch_ranks, given):
    """commlib does not keep it, and does not take what is left of it for a usable one."""

    def main(rank):
        mesh = init_device_mesh("cpu", (2,))
        model = Model(8, connect(8, mesh if given == "a mesh" else None))
        kept = dist.group.WORLD
        model(batch(rank, 0)).backward()
        norm = clip_grad_norm_(model, 1e9)
        dist.barrier()
        dist.destroy_process_group()
        assert torch.equal(clip_grad_norm_(model, 1e9), norm)  # by the communicator's own way
        state = model.state_dict()
        assert type(state["moe.experts.w1"]) is torch.Tensor
        assert state["moe.experts.w1"].shape[0] == 4
        with pytest.raises(RuntimeError, match=r"torch\.distributed does not know the ranks"):
            full_state_dict(model)
        del kept

    torch_ranks(main, 2)


def test_a_rank_part_is_not_loaded_into_the_unsharded_model(torch_ranks):
    def main(rank):
        for experts in (8, 10):
            state = Model(experts, connect(experts)).state_dict()
            with pytest.raises(ValueError, match="one rank's part of all experts"):
                Model(experts, None).load_state_dict(state)

    torch_ranks(main, 2)


def test_what_has_no_row_for_each_expert_is_not_saved(torch_ranks):
    def main(rank):
        ep = connect(8)
        for change in (
            lambda experts: torch.nn.utils.parametrizations.weight_norm(experts, "w1"),
            lambda experts: setattr(experts, "scale", torch.nn.Parameter(torch.ones(32))),
            lambda experts: setattr(experts, "scale", torch.nn.Parameter(torch.ones(()))),
            lambda experts: experts.register_buffer("load", torch.ones(8)),
        ):
            model = Model(8, ep)
            change(model.moe.experts)
            with pytest.raises(NotImplementedError, match="a row for each expert"):
                model.state_dict()
        model = Model(8, ep)
        prune.l1_unstructured(model.moe.experts, "w1", 0.5)
        state = model.state_dict()
        assert state["moe.experts.w1_mask"].shape == (8, 32, 16)
        model.load_state_dict(state)

    torch_ranks(main, 2)


def test_what_is_assigned_keeps_no_other_ranks_memory(torch_ranks):
    whole = full(Model(8, None))

    def main(rank):
        model = Model(8, connect(8))
        mine = model.moe.experts.w1.detach().clone()
        model.load_state_dict(whole, assign=True)
        w1 = model.moe.experts.w1
        assert torch.equal(w1, mine)
        assert w1.untyped_storage().nbytes() == w1.numel() * 4
        with torch.no_grad():
            model(batch(rank, 0))
        torch.__future__.set_swap_module_params_on_conversion(True)
        model.double().float().load_state_dict(whole)
        assert torch.equal(model.moe.experts.w1, mine)

    torch_ranks(main, 2)


def test_without_torch_distributed_state_dicts_are_of_the_rank():
    def rank_main(rank):
        model = Model(8, connect(8))
        state = model.state_dict()
        assert type(state["moe.experts.w1"]) is torch.Tensor
        assert state["moe.experts.w1"].shape[0] == 4
        with pytest.raises(RuntimeError, match="init_process_group"):
            full_state_dict(model)

    commlib.run_ranks(rank_main, 2)


def test_copies_share_the_communicator_and_learn_by_themselves(torch_ranks):
    def main(rank):
        model = Model(8, connect(8))
        copied = copy.deepcopy(model)
        average = torch.optim.swa_utils.AveragedModel(model)
        assert copied.moe.ep is model.moe.ep
        assert copied.moe.experts.w1 is not model.moe.experts.w1
        want = model(batch(rank, 0))
        assert torch.equal(copied(batch(rank, 0)), want)
        assert torch.equal(average(batch(rank, 0)), want)
        for m in (model, copied):  # the copy's gradients are known to be shards, too
            m(batch(rank, 0)).backward()
            sync_gradients(m)
        norms = [torch.nn.utils.clip_grad_norm_(m.parameters(), 0.1) for m in (model, copied)]
        everywhere = [None] * 4
        dist.all_gather_object(everywhere, [float(n) for n in norms])
        assert len({n for pair in everywhere for n in pair}) == 1
        with pytest.raises(TypeError, match=r"ExpertParallel .* cannot be pickled.*state_dict"):
            torch.save(model, io.BytesIO())

    torch_ranks(main, 4)
