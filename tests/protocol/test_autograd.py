"""Gradients: exact in fp64 by finite differences, and equal to those of a plain PyTorch layer."""

import gc
import weakref

import pytest
import torch
from exchange import nonlinear_experts
from reference import copies_of_tokens, expert_scale, make_world
from torch.autograd import forward_ad

import commlib
from commlib import ExpertParallel

RANKS = 4


def scales_of(experts, x):
    return torch.tensor([expert_scale(e) for e in experts], dtype=x.dtype, device=x.device)


def layer(ep, world, rank, x, weights, layout):
    d = ep.dispatch(x, world.topk_idx[rank], weights, layout=layout, align=2)
    if layout == "expert":
        y = nonlinear_experts(d.x, d.offsets.tolist(), world.experts_of(rank))
        return ep.combine(y, d.handle, weights=d.topk_weights)
    # Each unique row goes through all of its experts here; the weights come from d.topk_weights.
    scale = scales_of(world.experts_of(rank), x)
    by_expert = torch.where(d.topk_idx >= 0, scale[d.topk_idx], 0.0)  # [N, K]
    y = (torch.tanh(d.x.unsqueeze(1) * by_expert.unsqueeze(-1)) * d.topk_weights.unsqueeze(-1)).sum(1)
    return ep.combine(y, d.handle)


def reference_layer(world, rank, x, weights):
    idx = world.topk_idx[rank]
    scale = scales_of(range(world.num_experts), x)
    by_expert = torch.where(idx >= 0, scale[idx], 0.0)
    rows = torch.tanh(x.unsqueeze(1) * by_expert.unsqueeze(-1))
    return (rows * weights.unsqueeze(-1) * (idx >= 0).unsqueeze(-1)).sum(1)


@pytest.mark.parametrize("layout", ["rank", "expert"])
def test_gradcheck_on_four_ranks(device, layout):
    # Every rank has the same number of elements, so all make the same calls.
    shape = dict(num_experts=6, topk=2, hidden=2, dtype=torch.float64)
    world = make_world([3] * RANKS, **shape, device=device)

    def rank_main(rank):
        with ExpertParallel(**world.config()) as ep:
            x = world.x[rank].clone().requires_grad_()
            weights = world.topk_weights[rank].clone().requires_grad_()
            return torch.autograd.gradcheck(lambda x, w: layer(ep, world, rank, x, w, layout), (x, weights))

    assert commlib.run_ranks(rank_main, RANKS, device=device) == [True] * RANKS


def test_gradcheck_of_bias_and_of_weights_given_to_combine(device):
    shape = dict(num_experts=4, topk=2, hidden=2, dtype=torch.float64, holes=0.0)
    world = make_world([3] * 2, **shape, device=device)

    def rank_main(rank):
        with ExpertParallel(**world.config()) as ep:
            x = world.x[rank].clone().requires_grad_()
            bias = torch.randn(3, 2, dtype=torch.float64, device=device, requires_grad=True)

            def f(x, bias):
                d = ep.dispatch(x, world.topk_idx[rank])
                return ep.combine(d.x.sin(), d.handle, weights=d.x.sum(-1).cos(), bias=bias)

            return torch.autograd.gradcheck(f, (x, bias))

    assert commlib.run_ranks(rank_main, 2, device=device) == [True] * 2


def test_gradgradcheck_on_two_ranks(device):
    shape = dict(num_experts=4, topk=2, hidden=2, dtype=torch.float64, holes=0.0)
    world = make_world([2] * 2, **shape, device=device)

    def rank_main(rank):
        with ExpertParallel(**world.config()) as ep:
            x = world.x[rank].clone().requires_grad_()
            weights = world.topk_weights[rank].clone().requires_grad_()
            return torch.autograd.gradgradcheck(
                lambda x, w: layer(ep, world, rank, x, w, "expert"), (x, weights)
            )

    assert commlib.run_ranks(rank_main, 2, device=device) == [True] * 2


@pytest.mark.parametrize("layout", ["rank", "expert"])
@pytest.mark.parametrize("tokens", [[5, 0, 9, 2], [0, 0, 0, 3], [7]])
def test_gradients_equal_those_of_a_plain_layer(device, layout, tokens):
    shape = dict(num_experts=7, topk=3, hidden=48, dtype=torch.float64, holes=0.2)
    world = make_world(tokens, **shape, device=device)
    upstream = [torch.randn(t, 48, dtype=torch.float64, device=device) for t in tokens]

    def gradients(f, rank):
        x = world.x[rank].clone().requires_grad_()
        weights = world.topk_weights[rank].clone().requires_grad_()
        out = f(x, weights)
        out.backward(upstream[rank])
        return out.detach(), x.grad, weights.grad

    def rank_main(rank):
        with ExpertParallel(**world.config()) as ep:
            return gradients(lambda x, w: layer(ep, world, rank, x, w, layout), rank)

    for rank, got in enumerate(commlib.run_ranks(rank_main, len(tokens), device=device)):
        want = gradients(lambda x, w, r=rank: reference_layer(world, r, x, w), rank)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b)


def test_backward_of_two_uses_of_one_handle_adds_up(device):
    world = make_world([4, 6], hidden=32, dtype=torch.float64, device=device)

    def rank_main(rank):
        with ExpertParallel(**world.config()) as ep:
            x = world.x[rank].clone().requires_grad_()
            first = ep.dispatch(x, world.topk_idx[rank])
            second = ep.dispatch(x * 3, handle=first.handle)
            ep.combine(first.x + second.x, first.handle).sum().backward()
            return x.grad

    for rank, grad in enumerate(commlib.run_ranks(rank_main, 2, device=device)):
        copies = copies_of_tokens(world, rank).double()
        torch.testing.assert_close(grad, 4.0 * copies.expand(-1, 32))


def test_out_refuses_what_needs_a_gradient(device):
    world = make_world([4], device=device)
    out = torch.empty(4, 64, device=device)

    def rank_main(rank):
        with ExpertParallel(**world.config()) as ep:
            x = world.x[0].clone().requires_grad_()
            d = ep.dispatch(x, world.topk_idx[0])
            with pytest.raises(ValueError, match="not differentiable"):
                ep.combine(d.x, d.handle, out=out)
            with torch.no_grad():
                ep.combine(d.x, d.handle, out=out)

    commlib.run_ranks(rank_main, 1, device=device)


def test_out_tells_autograd_that_it_has_changed(device):
    world = make_world([4], device=device)
    with ExpertParallel(**world.config()) as ep:
        d = ep.dispatch(world.x[0], world.topk_idx[0])
        out = torch.zeros(4, 64, device=device)
        a = torch.ones(4, 64, device=device, requires_grad=True)
        product = (a * out).sum()  # autograd keeps out
        ep.combine(d.x, d.handle, out=out)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            product.backward()
        with torch.inference_mode():
            assert torch.equal(ep.combine(d.x, d.handle, out=torch.empty(4, 64, device=device)), out)


@pytest.mark.parametrize("how", ["op", "split"])
def test_a_graph_keeps_its_communicator(device, how):
    world = make_world([5, 3], dtype=torch.float64, holes=0.0, device=device)

    def forward(x, rank):
        ep = ExpertParallel(**world.config())
        closed = weakref.ref(ep._comm)
        d = ep.dispatch(x, world.topk_idx[rank], layout="expert", async_op=how == "split").finish()
        return ep.combine(d.x * 3, d.handle), closed

    def rank_main(rank):
        x = world.x[rank].clone().requires_grad_()
        out, closed = forward(x, rank)
        assert closed() is not None
        out.sum().backward()
        del out
        assert closed() is None, "nobody needs it any more"
        return x.grad

    for rank, grad in enumerate(commlib.run_ranks(rank_main, 2, device=device)):
        assert torch.equal(grad, torch.full_like(world.x[rank], 6.0))


def test_a_communicator_closes_with_its_last_user(device):
    ep = ExpertParallel(**make_world([4], device=device).config())
    comm = weakref.ref(ep._comm)
    gc.disable()
    try:
        del ep
        assert comm() is None, "a cycle would wait for the garbage collector, at another time on each rank"
    finally:
        gc.enable()


def forward_mode(f, x):
    with forward_ad.dual_level():
        return f(forward_ad.make_dual(x, x))


@pytest.mark.parametrize(
    "mode",
    [lambda f, x: torch.func.jvp(f, (x,), (x,)), forward_mode, lambda f, x: torch.func.jacfwd(f)(x)],
    ids=["jvp", "dual level", "jacfwd"],
)
def test_forward_mode_is_refused(device, mode):
    world = make_world([4], device=device)
    x, idx = world.x[0], world.topk_idx[0]
    with ExpertParallel(**world.config()) as ep:
        d = ep.dispatch(x, idx)
        for f in (
            lambda x: ep.dispatch(x, idx).x,
            lambda x: ep.dispatch(x, handle=d.handle).x,
            lambda x: ep.combine(d.x, d.handle, bias=x),
            lambda x: torch.ops.commlib.combine(d.x, None, x, None, *d.handle._plan[:-1], d.handle._grouped)[
                0
            ],
        ):
            with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
                mode(f, x)
        assert ep.stats()["combines"] == 0


def test_vmap_is_refused(device):
    world = make_world([4], device=device)
    with ExpertParallel(**world.config()) as ep:
        d = ep.dispatch(world.x[0], world.topk_idx[0])
        arguments = (*d.handle._plan[:-1], d.handle._grouped)
        for f in (
            lambda x: torch.ops.commlib.redispatch(x, None, *arguments, False, None, None, None, 0)[0],
            lambda x: torch.ops.commlib.combine(d.x, None, x, None, *arguments)[0],
            lambda x: ep.combine(d.x, d.handle, bias=x),
        ):
            with pytest.raises(NotImplementedError, match=r"cannot be batched by torch\.vmap"):
                torch.vmap(f)(torch.stack([world.x[0]] * 3))
