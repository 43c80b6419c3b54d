"""Wrappers, gradients and clipping around experts that differ by rank."""

import copy
import gc
import threading
import weakref

import pytest
import torch
import torch.distributed as dist
from moe_models import EXPERT_NAMES, Model, batch, connect
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import distribute_module
from torch.nn.parallel import DistributedDataParallel

import commlib
from commlib.nn import (
    clip_grad_norm_,
    expert_parameters,
    fully_shard_experts,
    shared_parameters,
    sync_gradients,
)


def unsharded_gradients(experts, ranks, **options):
    """Of the mean of the ranks' losses, by name."""
    model = Model(experts, None, **options)
    for rank in range(ranks):
        (model(batch(rank, 0)) / ranks).backward()
    return {name: p.grad for name, p in model.named_parameters()}


def check_gradients(model, wanted, rows=slice(None)):
    """Gradients of the same names, with these rows of experts'."""
    for name, p in model.named_parameters():
        want = wanted[name.removeprefix("module.")]
        grad = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
        whole = grad.shape == want.shape
        torch.testing.assert_close(
            grad.as_subclass(torch.Tensor), want if whole else want[rows], rtol=1e-4, atol=1e-6
        )


def rows_of(model):
    experts = model.moe.experts
    return slice(experts.first, experts.first + experts.w1.shape[0])


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
            model.before.weight += rank  # DDP's to mend
        ddp = DistributedDataParallel(Deep(model), **options)
        assert all(torch.equal(a, b) for a, b in zip(mine, expert_parameters(model), strict=True))
        ddp(batch(rank, 0)).backward()
        check_gradients(model, wanted, rows_of(model))

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
            with pytest.raises(ValueError, match=r"of the mesh hold different experts: \[0, 4\]"):
                fully_shard_experts(model(), part)
        with pytest.raises(ValueError, match="a DeviceMesh must have one dimension, got 2"):
            connect(8, mesh)

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


@pytest.mark.parametrize("ep_ranks", [4, 2, 1])
def test_sync_gradients_makes_them_those_of_the_mean_loss(torch_ranks, ep_ranks):
    wanted = unsharded_gradients(8, 4)

    def main(rank):
        groups = [dist.new_group(range(i, i + ep_ranks)) for i in range(0, 4, ep_ranks)]
        model = Model(8, connect(8, groups[rank // ep_ranks]))
        model.after.extra = nn.Parameter(torch.ones(3))  # never used
        model(batch(rank, 0)).backward()
        if rank:
            model.after.bias.grad = None  # as a parameter that only rank 0 has used
        sync_gradients(model)
        assert model.after.extra.grad is None
        del model.after.extra
        want = dict(wanted)
        everywhere = [None] * 4
        dist.all_gather_object(everywhere, model.after.bias.grad)
        assert all(torch.equal(g, everywhere[0]) for g in everywhere)
        want["after.bias"] = everywhere[0]
        check_gradients(model, want, rows_of(model))

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


def test_sync_gradients_says_what_is_missing(torch_ranks):
    def main(rank):
        pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
        with pytest.raises(ValueError, match=r"Linear holds no commlib\.nn\.Experts"):
            sync_gradients(nn.Linear(2, 2))
        with pytest.raises(ValueError, match="dp_group has 2 ranks, which hold the parts 0 to 3"):
            sync_gradients(Model(8, connect(8)), pairs[rank // 2])

    torch_ranks(main, 4)
    with pytest.raises(RuntimeError, match="init_process_group"):
        sync_gradients(Model(8, None))


@pytest.mark.parametrize("order", [2.0, 1.0, float("inf")])
@pytest.mark.parametrize("how", ["torch", "torch, one by one", "commlib", "FSDP2"])
def test_clipping_sees_all_ranks_gradients(torch_ranks, how, order):
    reference = Model(8, None)
    for rank in range(4):
        (reference(batch(rank, 0)) / 4).backward()
    wanted = torch.nn.utils.clip_grad_norm_(reference.parameters(), 0.01, order)
    clipped = {name: p.grad for name, p in reference.named_parameters()}

    def main(rank):
        if how == "FSDP2":
            mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "ep"))
            model = fully_shard_experts(Model(8, connect(8, mesh["ep"])), mesh["dp"])
            fully_shard(model, mesh=mesh)
            loss = model(batch(rank, 0))
        else:
            model = Model(8, connect(8))
            ddp = DistributedDataParallel(model)
            loss = ddp(batch(rank, 0))
        loss.backward()
        if how.startswith("torch"):
            foreach = False if "one" in how else None
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01, order, foreach=foreach)
        else:
            norm = clip_grad_norm_(model, 0.01, order)
        torch.testing.assert_close(norm.as_subclass(torch.Tensor), wanted, rtol=1e-5, atol=0.0)
        rows = slice(None) if how == "FSDP2" else rows_of(model)
        check_gradients(model, clipped, rows)
        everywhere = [None] * 4
        dist.all_gather_object(everywhere, norm.item())
        assert len(set(everywhere)) == 1

    torch_ranks(main, 4)


def test_in_process_ranks_clip_and_scale_and_step(device):
    """Without torch.distributed; on a GPU the optimizer's and the scaler's own kernels take the gradients."""

    def model_of(ep):
        with lock:  # torch.manual_seed is the process's, and ranks are threads
            return Model(8, ep, device=device).to(device)

    def rank_main(rank):
        ep = connect(8, device=device)
        model = model_of(ep)
        experts = list(expert_parameters(model))
        scaler = torch.amp.GradScaler(device, init_scale=4.0)
        optimizers = [
            torch.optim.AdamW(experts, lr=0.1, **how) for how in (dict(foreach=True), dict(fused=True))
        ]
        x = batch(rank, 0).to(device)
        model.moe.router(x)
        ep.group.barrier()  # see test_moe_layer
        norms = []
        for optimizer, infinite in zip(optimizers, (False, True), strict=True):
            model.zero_grad()
            scaler.scale(model(x)).backward()
            if infinite and rank == 0:
                experts[0].grad[0, 0, 0] = float("inf")
            before = [p.detach().clone() for p in experts]
            scaler.unscale_(optimizer)
            for p in shared_parameters(model):
                p.grad = None
            if not infinite:
                norms = [
                    clip_grad_norm_(model, 1e9),
                    torch.nn.utils.clip_grad_norm_(experts, 1e9),
                    torch.nn.utils.clip_grad_norm_(experts, 1e9, foreach=True),
                ]
            scaler.step(optimizer)
            moved = [not torch.equal(a, b) for a, b in zip(before, experts, strict=True)]
            assert all(moved) if not infinite else not any(moved)
        return norms

    lock = threading.Lock()
    model = model_of(None)
    for rank in range(2):
        model(batch(rank, 0).to(device)).backward()
    wanted = torch.nn.utils.get_total_norm([p.grad for p in expert_parameters(model)])
    for norms in commlib.run_ranks(rank_main, 2, device=device):
        for norm in norms:
            torch.testing.assert_close(norm.as_subclass(torch.Tensor), wanted)


def test_clipping_says_what_is_wrong():
    with pytest.raises(ValueError, match=r"Linear holds no commlib\.nn\.Experts"):
        clip_grad_norm_(nn.Linear(2, 2), 1.0)
    model = Model(8, None)
    model(batch(0, 0)).backward()
    with pytest.raises(RuntimeError, match=r"norm of order 2\.0 .* nan"):
        model.after.bias.grad.fill_(float("nan"))
        clip_grad_norm_(model, 1.0, error_if_nonfinite=True)


def unmark(p):
    p.grad = p.grad.as_subclass(torch.Tensor)


def frozen_copy(model):
    model.requires_grad_(False)
    return copy.deepcopy(model).requires_grad_(True)


def with_a_hook_of_its_own(model):
    copied = copy.deepcopy(model)
    for p in copied.parameters():
        p._post_accumulate_grad_hooks = None
        p.register_post_accumulate_grad_hook(lambda p: None)
    return copied


LOSES = {  # ways in which a gradient might forget what it is a part of: (before backward, after it)
    "scaled by hand": (None, lambda p: setattr(p, "grad", p.grad / 1.0)),
    "copied while frozen": (frozen_copy, None),
    "another hook": (with_a_hook_of_its_own, None),
    "assigned, and synchronised": (None, unmark),
}


@pytest.mark.parametrize("how", LOSES)
def test_a_gradient_does_not_forget_that_it_is_a_shard(torch_ranks, how):
    def main(rank):
        model = Model(8, connect(8))
        before, after = LOSES[how]
        model = before(model) if before else model
        model(batch(rank, 0)).backward()
        if after:
            for p in expert_parameters(model):
                after(p)
        sync_gradients(model)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9)
        torch.testing.assert_close(norm.as_subclass(torch.Tensor), wanted, rtol=1e-5, atol=0.0)

    wanted = torch.nn.utils.get_total_norm(unsharded_gradients(8, 4).values())
    torch_ranks(main, 4)


def test_gradients_that_one_replica_lacks(torch_ranks):
    """Rank 3 had no backward, nor has rank 2, which holds the other half of its communicator's experts."""

    def main(rank):
        groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
        model = Model(8, connect(8, groups[rank // 2]))
        if rank < 2:
            model(batch(rank, 0)).backward()
        sync_gradients(model)
        everywhere = [None] * 4
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9)
        dist.all_gather_object(everywhere, norm.item())
        assert len(set(everywhere)) == 1

    torch_ranks(main, 4)


@pytest.mark.parametrize("order", [2.0, float("inf")])
def test_clipping_where_a_rank_has_no_experts(torch_ranks, order):
    wanted = torch.nn.utils.get_total_norm(unsharded_gradients(3, 4).values(), order)

    def main(rank):
        model = Model(3, connect(3))
        model(batch(rank, 0)).backward()
        sync_gradients(model)
        for norm in (
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9, order),
            torch.nn.utils.get_total_norm([p.grad for p in model.parameters()], order),
            clip_grad_norm_(model, 1e9, order),
        ):
            torch.testing.assert_close(norm.as_subclass(torch.Tensor), wanted, rtol=1e-5, atol=0.0)

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


def test_sync_gradients_adds_up_without_overflow_and_is_not_for_fsdp2(torch_ranks):
    def main(rank):
        model = Model(8, connect(8, dtype=torch.float16)).half()
        for p in model.parameters():
            p.grad = torch.full_like(p, 40000.0)
        sync_gradients(model)
        assert all(p.grad.isfinite().all() for p in model.parameters())
        mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "ep"))
        model = fully_shard_experts(Model(8, connect(8, mesh["ep"])), mesh["dp"])
        with pytest.raises(ValueError, match="FSDP2"):
            sync_gradients(model)

    torch_ranks(main, 2)


def test_a_grad_scaler_skips_a_step_on_all_ranks_or_on_none(torch_ranks):
    def main(rank):
        model = Model(8, connect(8))
        ddp = DistributedDataParallel(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        for infinite, moves in ((True, False), (False, True)):
            before = [p.detach().clone() for p in model.parameters()]
            optimizer.zero_grad()
            scaler.scale(ddp(batch(rank, 0))).backward()
            if infinite and rank == 2:
                model.moe.experts.w3.grad[0, 0, 0] = float("inf")
            scaler.step(optimizer)
            scaler.update()
            moved = [not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)]
            assert all(moved) if moves else not any(moved)
        assert scaler.get_scale() == 2.0

    torch_ranks(main, 4)


def test_a_gradient_is_an_ordinary_tensor_otherwise(torch_ranks):
    """Nothing but what decides for all parameters speaks with other ranks."""

    def main(rank):
        model = Model(8, connect(8))
        model(batch(rank, 0)).backward()
        if rank == 0:  # alone
            grad = model.moe.experts.w1.grad
            plain = grad.as_subclass(torch.Tensor)
            assert torch.equal(copy.deepcopy(grad), plain)
            assert grad.norm() == plain.norm()
            assert (grad * 2).sum() == (plain * 2).sum()
            assert type(grad + 2) is torch.Tensor
            assert grad.max() == plain.max()
            for make in (torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad, torch.optim.RMSprop):
                for foreach in (False, True):
                    make(model.parameters(), lr=0.1, foreach=foreach).step()

    torch_ranks(main, 2)
