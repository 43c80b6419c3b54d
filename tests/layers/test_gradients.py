"""Gradients of experts that differ by rank: averages, clipping, scaling."""

import copy
import threading
from itertools import chain

import pytest
import torch
import torch.distributed as dist
from moe_models import Model, batch, check_gradients, connect, rows_of, unsharded_gradients
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import commlib
from commlib.nn import (
    clip_grad_norm_,
    expert_parameters,
    fully_shard_experts,
    shared_parameters,
    sync_gradients,
)


@pytest.mark.parametrize("ep_ranks", [4, 2, 1])
def test_sync_gradients_makes_them_those_of_the_mean_loss(torch_ranks, ep_ranks):
    wanted = unsharded_gradients(8, 4)

    def main(rank):
        groups = [dist.new_group(range(i, i + ep_ranks)) for i in range(0, 4, ep_ranks)]
        model = Model(8, connect(8, groups[rank // ep_ranks]))
        model.after.extra = nn.Parameter(torch.ones(3))  # unused
        model(batch(rank, 0)).backward()
        if rank:
            model.after.bias.grad = None  # like a parameter that only rank 0 has used
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


def test_sync_gradients_says_what_is_missing(torch_ranks):
    def main(rank):
        pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
        with pytest.raises(ValueError, match=r"Linear holds no commlib\.nn\.Experts"):
            sync_gradients(nn.Linear(2, 2))
        model = Model(8, connect(8))
        whole = Model(8, None)
        for p in chain(model.parameters(), whole.parameters()):
            p.grad = torch.full_like(p, rank + 1.0)
        with pytest.raises(ValueError, match="dp_group has 2 ranks, which hold the parts 0 to 3"):
            sync_gradients(model, pairs[rank // 2])
        for wrong, error, text in (
            (pairs[1 - rank // 2], ValueError, "this process is not a member of dp_group"),
            (model, TypeError, r"dp_group must be .* ProcessGroup \(of a DeviceMesh, .*got Model"),
        ):
            for m in (model, whole):
                with pytest.raises(error, match=text):
                    sync_gradients(m, wrong)
        with pytest.raises(TypeError, match=r"give the model itself, not its parameters .*got generator"):
            clip_grad_norm_(model.parameters(), 1.0)
        with pytest.raises(TypeError, match=r"mesh must be a .* DeviceMesh, got NoneType"):
            fully_shard_experts(model, None)
        for p in chain(model.parameters(), whole.parameters()):
            assert torch.equal(p.grad, torch.full_like(p, rank + 1.0))

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
        with lock:  # torch.manual_seed is global to the process: ranks are threads here
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


@pytest.mark.parametrize("how", ["a dtype", "one more layer"])
def test_ranks_that_clip_different_models(torch_ranks, how):
    """gloo ends the process where messages have different sizes."""

    def main(rank):
        model = Model(8, connect(8))
        more = Model(8, connect(8))
        for p in (*model.parameters(), *more.parameters()):
            p.grad = torch.ones_like(p)
        if rank == 1 and how == "a dtype":
            model.double()
            for p in model.parameters():
                p.grad = torch.ones_like(p)
        both = nn.ModuleList([model, more] if rank == 1 and how == "one more layer" else [model])
        said = "float64 over 2 ranks" if rank == 1 and how == "a dtype" else "float32 over 2 ranks"
        with pytest.raises(ValueError, match=f"different models, and nothing .* gradients in {said}"):
            clip_grad_norm_(both, 1.0)
        assert all((p.grad == 1).all() for p in both.parameters())
        with pytest.raises(ValueError, match=f"norms of order {1.0 + rank}"):
            clip_grad_norm_(more, 1.0, 1.0 + rank)
        more.before.to([torch.float32, torch.float64][rank])  # of the rank alone
        more.before.weight.grad = None
        torch.testing.assert_close(
            clip_grad_norm_(more, 1e9, "inf"), torch.nn.utils.clip_grad_norm_(more.parameters(), 1e9, "inf")
        )

    torch_ranks(main, 2)


def test_what_is_not_trained_needs_no_other_rank_and_sparse_gradients_are_refused(torch_ranks):
    def main(rank):
        model = nn.ModuleDict({"trained": Model(8, connect(8))})
        frozen = Model(8, connect(8)).requires_grad_(False)
        if rank == 0:
            model["frozen"] = frozen
        model["trained"](batch(rank, 0)).backward()
        sync_gradients(model)
        model["words"] = nn.Embedding(4, 2, sparse=True)
        if rank == 0:
            model["words"](torch.tensor([1])).sum().backward()
        with pytest.raises(ValueError, match="sync_gradients takes no sparse gradients"):
            sync_gradients(model)

    torch_ranks(main, 2)


def test_gradients_in_a_dtype_of_their_own(torch_ranks):
    """One that a rank lacks is zero in that dtype; ranks whose dtypes differ get an error."""

    def main(rank):
        model = Model(8, connect(8))
        weight = model.before.weight
        weight.grad_dtype = torch.bfloat16
        weight.grad = None if rank else torch.ones_like(weight, dtype=torch.bfloat16)
        sync_gradients(model)
        assert torch.equal(weight.grad, torch.full_like(weight, 0.5, dtype=torch.bfloat16))
        weight.grad = None
        weight.grad_dtype = torch.float64 if rank else torch.bfloat16
        with pytest.raises(ValueError, match=r"before\.weight .*with gradients in torch\.float64"):
            sync_gradients(model)

    torch_ranks(main, 2)


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


LOSES = {  # ways in which a gradient might forget that it is a shard: (before backward, after it)
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
    """Rank 3 had no backward, nor had rank 2, which holds the other half of its communicator's experts."""

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


def shorter(model):
    model.after.weight = nn.Parameter(torch.zeros(1))


def other_shape(model):
    model.after.weight = nn.Parameter(torch.zeros(16, 64))  # as many numbers


def other_order(model):
    model.before = model._modules.pop("before")


UNLIKE = {  # how one rank's model differs, and the error's text
    "shorter": (
        shorter,
        r"rank 0 has after.weight \[32, 32\] float32, rank 2 has after.weight \[1\] float32",
    ),
    "other shape": (other_shape, r"rank 2 has after.weight \[16, 64\] float32"),
    "other order": (
        other_order,
        "in another order, before.weight .* on rank 0 is moe.router.weight .* rank 2",
    ),
    "one more": (lambda m: setattr(m, "more", nn.Parameter(torch.ones(7))), r"rank 2 has more \[7\] float32"),
    "frozen": (lambda m: m.before.weight.requires_grad_(False), "before.weight .*rank 2 has no such one"),
    "all frozen": (lambda m: m.requires_grad_(False), "rank 2 has no such one"),
    "dtype": (lambda m: m.after.double(), r"rank 2 has after.weight \[32, 32\] float64"),
    "experts' dtype": (lambda m: m.moe.experts.double(), r"w1 \[8 on 2 ranks, 32, 16\] float64"),
}


@pytest.mark.parametrize("how", UNLIKE)
def test_models_that_differ_by_rank_are_not_averaged(torch_ranks, how):
    """gloo ends the process where messages have different sizes, and adds up those of the same size."""

    def main(rank):
        pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
        model = Model(8, connect(8, pairs[rank // 2]))
        change, text = UNLIKE[how]
        if rank == 2:
            change(model)
        for p in model.parameters():
            p.grad = torch.full_like(p, rank + 1.0)
        with pytest.raises(ValueError, match=f"the model differs by rank: .*{text}"):
            sync_gradients(model)
        assert all(torch.equal(p.grad, torch.full_like(p, rank + 1.0)) for p in model.parameters())
        alike = Model(8, model.moe.ep)
        alike(batch(rank, 0)).backward()
        sync_gradients(alike)

    torch_ranks(main, 4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_clipping_where_ranks_have_no_gradients_in_other_dtypes_than_float32(torch_ranks, dtype):
    """A rank without experts, and one whose experts have no gradients, send numbers of the others' size."""

    def main(rank):
        model = Model(3, connect(3, dtype=dtype)).to(dtype)
        model(batch(rank, 0).to(dtype)).backward()
        sync_gradients(model)
        wanted = torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9).as_subclass(torch.Tensor)
        norm = clip_grad_norm_(model, 1e9)
        assert norm.dtype == dtype
        torch.testing.assert_close(norm, wanted)
        if rank == 1:
            for p in expert_parameters(model):
                p.grad = None
        everywhere = [None] * 4
        dist.all_gather_object(everywhere, clip_grad_norm_(model, 1e9))
        assert all(torch.equal(other, everywhere[0]) and other.dtype == dtype for other in everywhere)

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
    """Only operations that decide for all parameters speak with other ranks."""

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
