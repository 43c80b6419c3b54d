"""Wrappers and optimizers around experts that differ by rank."""

import gc
import weakref

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from moe_models import (
    EXPERT_NAMES,
    FFN,
    HIDDEN,
    Model,
    batch,
    check_gradients,
    connect,
    gradients_of,
    rows_of,
    unsharded_gradients,
)
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import Shard, distribute_module
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import weight_norm

from commlib.nn import (
    Experts,
    MoELayer,
    clip_grad_norm_,
    expert_parameters,
    full_state_dict,
    fully_shard_experts,
    grouped_mm,
    shared_parameters,
    sync_gradients,
)


class Deep(nn.Module):
    """The model, deep in another one."""

    def __init__(self, model):
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleDict({"block": model})])

    def forward(self, x):
        return self.layers[0]["block"](x)


@pytest.mark.parametrize("options", [{}, dict(static_graph=True), dict(gradient_as_bucket_view=True)])
def test_ddp_leaves_experts_alone_and_divides_their_gradients(torch_ranks, options):
    wanted = unsharded_gradients(10, 4)

    def main(rank):
        model = Model(10, connect(10))
        mine = [p.detach().clone() for p in expert_parameters(model)]
        with torch.no_grad():
            model.before.weight += rank  # DDP must mend it
        ddp = DistributedDataParallel(Deep(model), **options)
        assert all(torch.equal(a, b) for a, b in zip(mine, expert_parameters(model), strict=True))
        ddp(batch(rank, 0)).backward()
        check_gradients(model, wanted, rows_of(model))

    torch_ranks(main, 4)


@pytest.mark.parametrize("inside", [Model, MoELayer, Experts])
def test_ddp_leaves_experts_alone_in_modules_that_rename_their_parameters(torch_ranks, inside):
    """torch's checkpoint_wrapper leaves its own name out of its parameters' names, but not in all ways."""
    wanted = unsharded_gradients(8, 2)

    def main(rank):
        model = Model(8, connect(8))
        rows = rows_of(model)
        mine = [p.detach().clone() for p in expert_parameters(model)]
        if inside is Model:
            model = checkpoint_wrapper(model)
        else:
            apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, inside))
        ddp = DistributedDataParallel(model)
        assert all(torch.equal(a, b) for a, b in zip(mine, expert_parameters(model), strict=True))
        ddp(batch(rank, 0)).backward()
        for p, want in zip(model.parameters(), wanted.values(), strict=True):
            want = want if p.grad.shape == want.shape else want[rows]
            torch.testing.assert_close(p.grad.as_subclass(torch.Tensor), want, rtol=1e-4, atol=1e-6)

    torch_ranks(main, 2)


def test_ddp_leaves_alone_what_experts_have_beside_their_weights(torch_ranks):
    """A mask, parameters of a parametrization: clipping sees their gradients on all ranks too."""

    def changed(model, first, count):
        weight_norm(model.moe.experts, "w1", dim=0)
        mask = torch.rand(8, HIDDEN, FFN, generator=torch.Generator().manual_seed(1)) < 0.5
        prune.custom_from_mask(model.moe.experts, "w3", mask[first : first + count])
        return model

    wanted = gradients_of(changed(Model(8, None), 0, 8), 2)
    wanted = torch.nn.utils.get_total_norm(wanted.values())

    def main(rank):
        model = Model(8, connect(8))
        experts = changed(model, model.moe.experts.first, 4).moe.experts
        mine = [t.detach().clone() for t in (*experts.parameters(), *experts.buffers())]
        ddp = DistributedDataParallel(model)
        ddp(batch(rank, 0)).backward()
        now = (*experts.parameters(), *experts.buffers())
        assert all(torch.equal(a, b) for a, b in zip(mine, now, strict=True))
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9)
        torch.testing.assert_close(norm.as_subclass(torch.Tensor), wanted, rtol=1e-5, atol=0.0)

    torch_ranks(main, 2)


class WithBias(Experts):
    """Experts with more parameters, and a forward of their own."""

    def forward(self, x, offsets):
        w1, w2, w3, bias = map(self.local, (self.w1, self.w2, self.w3, self.bias))
        gate = F.silu(grouped_mm(x, w1, offsets)) * grouped_mm(x, w3, offsets)
        return grouped_mm(gate, w2, offsets) + bias.repeat_interleave(
            offsets.diff(), dim=0, output_size=len(x)
        )


class Sure(WithBias):
    reads_local = True


def with_bias(experts, ep, kind=Sure):
    model = Model(experts, ep)
    model.moe.experts.__class__ = kind
    model.moe.experts.bias = nn.Parameter(torch.full((model.moe.experts.w1.shape[0], HIDDEN), 0.1))
    return model


def test_experts_that_nothing_would_divide_are_refused(torch_ranks):
    class Forward(Experts):
        def forward(self, x, offsets):
            return super().forward(x, offsets)

    def main(rank):
        mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "ep"))
        ep = connect(8)
        own = Model(8, ep)
        own.moe.experts.__class__ = Forward
        more = with_bias(8, ep, WithBias)
        for model, text in ((more, r"parameters of their own \(bias\)"), (own, "a forward")):
            for wrap in (DistributedDataParallel, lambda m: fully_shard_experts(m, mesh["dp"])):
                with pytest.raises(ValueError, match=rf"has {text}.*self\.local\(p\).*sync_gradients"):
                    wrap(model)
                assert model.moe.experts.gradient_divisor == 1

    torch_ranks(main, 2)


@pytest.mark.parametrize("how", ["DDP", "FSDP2", "FSDP2 with a mesh", "neither", "frozen when wrapped"])
def test_all_parameters_of_experts_are_divided(torch_ranks, how):
    wanted = gradients_of(with_bias(8, None), 4)

    def main(rank):
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "ep"))
        given = {"FSDP2": mesh["ep"].get_group(), "FSDP2 with a mesh": mesh["ep"]}
        model = with_bias(8, connect(8, given.get(how)))
        first, count = model.moe.experts.first, model.moe.experts.shard.count
        if how in given:
            fully_shard_experts(model, mesh["dp"])
            fully_shard(model, mesh=mesh)
        elif how != "neither":
            model.moe.experts.requires_grad_(how == "DDP")
            DistributedDataParallel(model)
            model.moe.experts.requires_grad_(True)
        model(batch(rank, 0)).backward()
        if how not in given:
            sync_gradients(model)
        check_gradients(model, wanted, slice(first, first + count))

    torch_ranks(main, 4)


@pytest.mark.parametrize("given", ["a mesh", "a group"])
def test_fsdp2_with_parametrized_experts(torch_ranks, given):
    def changed(model):
        weight_norm(model.moe.experts, "w1", dim=0)
        return model

    wanted = gradients_of(changed(Model(8, None)), 4)

    def main(rank):
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "ep"))
        model = changed(Model(8, connect(8, mesh["ep"] if given == "a mesh" else mesh["ep"].get_group())))
        first = model.moe.experts.first
        fully_shard_experts(model, mesh["dp"])
        fully_shard(model, mesh=mesh)
        model(batch(rank, 0)).backward()
        check_gradients(model, wanted, slice(first, first + 4))

    torch_ranks(main, 4)


@pytest.mark.parametrize("experts", [8, 5])
def test_fsdp2_keeps_tied_weights_of_experts_tied(torch_ranks, experts):
    def tied(ep):
        model = Model(experts, ep)
        model.moe.experts.w3 = model.moe.experts.w1
        return model

    wanted = gradients_of(tied(None), 4)

    def main(rank):
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "ep"))
        model = tied(connect(experts, mesh["ep"]))
        first, count = model.moe.experts.shard.first, model.moe.experts.shard.count
        fully_shard_experts(model, mesh["dp"])
        fully_shard(model, mesh=mesh)
        assert model.moe.experts.w3 is model.moe.experts.w1
        model(batch(rank, 0)).backward()
        check_gradients(model, wanted, slice(first, first + count))

    torch_ranks(main, 4)


def test_what_one_rank_cannot_do_no_rank_does(torch_ranks):
    """The others hear why, and do not wait."""

    def main(rank):
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "ep"))
        model = Model(8, connect(8, mesh["ep"]))
        mine = model.before if rank == 3 else model
        for action in (sync_gradients, full_state_dict, lambda m: fully_shard_experts(m, mesh["dp"])):
            told = rank != 3 and (rank == 1 or action in (sync_gradients, full_state_dict))
            text = r"rank 3 cannot take part.*Linear holds no" if told else r"^Linear holds no"
            if rank == 3 or told:
                with pytest.raises(ValueError, match=text):
                    action(mine)
        if rank == 1:
            model.moe.experts.scale = nn.Parameter(torch.ones(HIDDEN))
        error, text = (NotImplementedError, "^scale") if rank == 1 else (ValueError, "rank 1 cannot .* scale")
        with pytest.raises(error, match=text):
            full_state_dict(model)

    torch_ranks(main, 4)


def test_ddp_around_the_layer_itself_and_with_accumulation(torch_ranks):
    def main(rank):
        ep = connect(8)
        layer = DistributedDataParallel(Model(8, ep).moe)
        plain = Model(8, ep).moe
        x = [batch(rank, step) for step in range(2)]
        with layer.no_sync():
            layer(x[0])[0].square().mean().backward()
        layer(x[1])[0].square().mean().backward()
        for part in x:
            (plain(part)[0].square().mean()).backward()
        sync_gradients(plain)
        for a, b in zip(layer.module.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad)
        with pytest.raises(ValueError, match="no parameter is trained but those of experts"):
            DistributedDataParallel(Model(8, ep).moe.experts)

    torch_ranks(main, 4)


def test_a_compiled_layer_over_ranks_has_no_graph_break_and_the_same_gradients(torch_ranks):
    wanted = unsharded_gradients(8, 2)

    def main(rank):
        model = Model(8, connect(8))
        ddp = DistributedDataParallel(model)
        model.moe.compile(backend="aot_eager", fullgraph=True)
        ddp(batch(rank, 0)).backward()
        check_gradients(model, wanted, rows_of(model))
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9).as_subclass(torch.Tensor)
        torch.testing.assert_close(norm, torch.nn.utils.get_total_norm(wanted.values()))

    torch_ranks(main, 2)


def test_ddp_over_other_ranks_than_the_experts_is_refused(torch_ranks):
    def main(rank):
        pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
        model = Model(8, connect(8, pairs[rank // 2]))
        mine = [p.detach().clone() for p in model.parameters()]
        with pytest.raises(ValueError, match=r"ranks \[0, 1, 2, 3\], its experts .*sync_gradients"):
            DistributedDataParallel(model)
        assert all(torch.equal(a, b) for a, b in zip(mine, model.parameters(), strict=True))
        DistributedDataParallel(Model(8, None))(batch(rank, 0)).backward()  # whole on every rank: DDP's

    torch_ranks(main, 4)


def test_ddp_of_a_layer_whose_ranks_were_not_given_as_torchs(torch_ranks, tmp_path):
    """The communicator was made by another group; torch.distributed has the same ranks."""

    def main(rank):
        from processes import FileGroup

        (tmp_path / "other").mkdir(exist_ok=True)
        model = Model(8, connect(8, FileGroup(tmp_path / "other", rank, 4)))
        ddp = DistributedDataParallel(model)
        ddp(batch(rank, 0)).backward()
        check_gradients(model, wanted, rows_of(model))

    wanted = unsharded_gradients(8, 4)
    torch_ranks(main, 4)


@pytest.mark.parametrize("experts", [8, 5])
@pytest.mark.parametrize("flat", [False, True])
def test_fsdp2_gives_the_gradients_of_the_mean_loss(torch_ranks, experts, flat):
    wanted = unsharded_gradients(experts, 4)

    def main(rank):
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "ep"))
        model = Model(experts, connect(experts, mesh["ep"]))
        fully_shard_experts(model, mesh["dp"])
        fully_shard(model, mesh=mesh["dp", "ep"]._flatten("all") if flat else mesh)
        first, count = model.moe.experts.shard.first, model.moe.experts.shard.count
        for _ in range(2):  # the second time over the first one's state
            model.zero_grad()
            model(batch(rank, 0)).backward()
            check_gradients(model, wanted, slice(first, first + count))

    torch_ranks(main, 4)


def test_what_would_mix_experts_is_refused(torch_ranks):
    def main(rank):
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "ep"))
        ep = connect(8, mesh["ep"])

        def model():
            return Model(8, ep)

        for wrong in (
            lambda m: fully_shard(m, mesh=mesh),
            lambda m: fully_shard(m.moe.experts, mesh=mesh["dp"]),
            lambda m: distribute_module(m, mesh["dp"]),
        ):
            m = model()
            mine = [p.detach().clone() for p in expert_parameters(m)]
            with pytest.raises(ValueError, match=r"commlib\.nn\.fully_shard_experts"):
                wrong(m)
            assert all(torch.equal(a, b) for a, b in zip(mine, expert_parameters(m), strict=True))
        for original in (False, True):
            with pytest.raises(ValueError, match="FullyShardedDataParallel would put experts"):
                FullyShardedDataParallel(model(), device_id=torch.device("cpu"), use_orig_params=original)
        for part in (mesh, mesh["ep"]):
            with pytest.raises(
                ValueError, match=r"of the mesh hold different experts: .* 0 to 3 of 8 .* 4 to 7"
            ):
                fully_shard_experts(model(), part)
        with pytest.raises(ValueError, match="a DeviceMesh must have one dimension, got 2"):
            connect(8, mesh)

    torch_ranks(main, 4)


def test_experts_that_fsdp2_is_told_to_ignore_are_not_trained(torch_ranks):
    def main(rank):
        ep = connect(8)
        model = Model(8, ep)
        fully_shard(model, mesh=init_device_mesh("cpu", (2,)), ignored_params=set(expert_parameters(model)))
        with pytest.raises(ValueError, match=r"ignored_params.*commlib\.nn\.fully_shard_experts"):
            model(batch(rank, 0))
        with torch.no_grad():
            evaluated = model(batch(rank, 0))
        torch.testing.assert_close(evaluated, Model(8, ep)(batch(rank, 0)).detach())

    torch_ranks(main, 2)


def test_a_placement_that_checkpoints_cannot_say_is_refused(torch_ranks):
    def main(rank):
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "ep"))
        by_column = {"shard_placement_fn": lambda p: Shard(1)}
        uneven = Model(5, connect(5, mesh["ep"]))
        with pytest.raises(ValueError, match=r"shard_placement_fn gives S.*\(.*1\) for w1 of experts"):
            fully_shard_experts(uneven, mesh["dp"], **by_column)
        fully_shard_experts(uneven, mesh["dp"], shard_placement_fn=lambda p: Shard(0))
        even = fully_shard_experts(Model(8, connect(8, mesh["ep"])), mesh["dp"], **by_column)
        assert even.moe.experts.w1.placements == (Shard(1), Shard(0))

    torch_ranks(main, 4)


def test_fsdp1_with_experts_left_out(torch_ranks):
    wanted = unsharded_gradients(8, 4)

    def main(rank):
        model = Model(8, connect(8))
        ignored = list(expert_parameters(model))
        fsdp = FullyShardedDataParallel(
            model, ignored_states=ignored, use_orig_params=True, device_id=torch.device("cpu")
        )
        fsdp(batch(rank, 0)).backward()
        rows = rows_of(model)
        for name, p in zip(EXPERT_NAMES, ignored, strict=True):
            torch.testing.assert_close(
                p.grad.as_subclass(torch.Tensor), wanted[f"moe.experts.{name}"][rows], rtol=1e-4, atol=1e-6
            )

    torch_ranks(main, 4)


def test_nothing_keeps_a_process_group_that_is_destroyed(torch_ranks):
    """Its threads would outlive it, and Python aborts when it exits under them."""

    def main(rank):
        pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
        model = Model(8, connect(8, pairs[rank // 2]))
        pairs.clear()
        model(batch(rank, 0)).backward()
        sync_gradients(model)
        clip_grad_norm_(model, 1.0)
        one = [model.state_dict(), Model(8, connect(8)).state_dict()]
        alive = [weakref.ref(group) for group in dist.distributed_c10d._world.pg_map]
        assert len(alive) == 3  # the default one, a pair, those that hold the same experts
        del one
        dist.destroy_process_group()
        gc.collect()
        assert not [group() for group in alive if group() is not None]
        assert model.moe.ep.size == 2  # it is still there

    torch_ranks(main, 4)


def test_modules_that_share_experts_parameters(torch_ranks):
    reference = Model(8, None)
    other = Model(8, None, seed=5)
    other.moe.experts = reference.moe.experts
    for rank in range(4):
        ((reference(batch(rank, 0)) + other(batch(rank, 1))) / 4).backward()
    wanted = [p.grad for p in reference.moe.experts.parameters()]

    def main(rank):
        for wrapped in (False, True):
            ep = connect(8)
            pair = nn.ModuleList([Model(8, ep), Model(8, ep, seed=5)])
            for name in EXPERT_NAMES:
                setattr(pair[1].moe.experts, name, getattr(pair[0].moe.experts, name))
            both = Both(pair)
            ddp = DistributedDataParallel(both) if wrapped else both
            ddp(batch(rank, 0), batch(rank, 1)).backward()
            if not wrapped:
                sync_gradients(both)
            for p, want in zip(pair[0].moe.experts.parameters(), wanted, strict=True):
                torch.testing.assert_close(
                    p.grad.as_subclass(torch.Tensor), want[rows_of(pair[0])], rtol=1e-4, atol=1e-6
                )

    torch_ranks(main, 4)


class Both(nn.Module):
    def __init__(self, pair):
        super().__init__()
        self.pair = pair

    def forward(self, x, y):
        return self.pair[0](x) + self.pair[1](y)


def test_optimizers_that_take_ranks_for_equal_are_refused(torch_ranks):
    def main(rank):
        model = Model(8, connect(8))
        ddp = DistributedDataParallel(model)
        ddp(batch(rank, 0)).backward()
        zero = ZeroRedundancyOptimizer(model.parameters(), torch.optim.SGD, lr=0.1)
        for optimizer in (zero, torch.optim.LBFGS(model.parameters())):
            mine = [p.detach().clone() for p in model.parameters()]
            with pytest.raises(ValueError, match=r"experts, which differ by rank.*shared_parameters"):
                optimizer.step(lambda: ddp(batch(rank, 0)))
            assert all(torch.equal(a, b) for a, b in zip(mine, model.parameters(), strict=True))
        ZeroRedundancyOptimizer(shared_parameters(model), torch.optim.SGD, lr=0.1).step()

    torch_ranks(main, 2)
