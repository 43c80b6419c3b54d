"""torch.compile, fake kernels, activation checkpointing."""

import pytest
import torch
from reference import make_world
from torch.utils.checkpoint import checkpoint

import commlib
from commlib import ExpertParallel, ops


def layer(ep, x, idx, weights, layout):
    d = ep.dispatch(x * 2, idx, weights, layout=layout, align=4)
    if layout == "expert":
        return ep.combine(d.x.sin(), d.handle, weights=d.topk_weights)
    return ep.combine(d.x.sin() * d.topk_weights.sum(-1, keepdim=True), d.handle)


def run(f, world, rank):
    x = world.x[rank].clone().requires_grad_()
    w = world.topk_weights[rank].clone().requires_grad_()
    out = f(x, world.topk_idx[rank], w)
    out.square().sum().backward()
    return out.detach(), x.grad, w.grad


@pytest.mark.parametrize("layout", ["rank", "expert"])
def test_a_compiled_layer_gives_the_same_values_and_gradients(device, layout):
    world = make_world([6], num_experts=4, topk=2, device=device)
    with ExpertParallel(**world.config()) as ep:
        eager = run(lambda *a: layer(ep, *a, layout), world, 0)
        torch._dynamo.reset()
        compiled = torch.compile(lambda *a: layer(ep, *a, layout), fullgraph=True)
        for a, b in zip(run(compiled, world, 0), eager, strict=True):
            torch.testing.assert_close(a, b)


def test_ops_pass_torchs_own_checks(device):
    world = make_world([6], num_experts=4, topk=2, device=device)
    with ExpertParallel(**world.config()) as ep:
        x = world.x[0].clone().requires_grad_()
        w = world.topk_weights[0].clone().requires_grad_()
        d = ep.dispatch(x.detach(), world.topk_idx[0], w.detach())
        tests = ("test_schema", "test_autograd_registration", "test_faketensor")
        torch.library.opcheck(
            torch.ops.commlib.dispatch.default,
            (x, world.topk_idx[0], w, ep._name, *ep._sizes, False, 1, False, False, False, False),
            test_utils=tests,
        )
        torch.library.opcheck(
            ops.combine,
            (d.x.clone().requires_grad_(), None, None, None, *d.handle._arguments(), False),
            test_utils=tests,
        )
        torch.library.opcheck(ops.redispatch, (x, w, *d.handle._arguments(), False, False), test_utils=tests)


def test_async_is_refused_inside_a_graph(device):
    world = make_world([6], device=device)
    with ExpertParallel(**world.config()) as ep:
        torch._dynamo.reset()
        f = torch.compile(lambda x: ep.dispatch(x, world.topk_idx[0], async_op=True).x, fullgraph=True)
        with pytest.raises(Exception, match="async_op cannot be traced"):
            f(world.x[0])


def test_activation_checkpointing_dispatches_again_in_backward(device):
    world = make_world([6, 9], device=device)

    def rank_main(rank):
        with ExpertParallel(**world.config()) as ep:
            plain = run(lambda *a: layer(ep, *a, "expert"), world, rank)
            before = ep.stats()["dispatches"]
            saved = run(
                lambda *a: checkpoint(lambda *b: layer(ep, *b, "expert"), *a, use_reentrant=False),
                world,
                rank,
            )
            assert ep.stats()["dispatches"] - before == 2
            return plain, saved

    for plain, saved in commlib.run_ranks(rank_main, 2, device=device):
        for a, b in zip(plain, saved, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.skipif(not hasattr(torch.Tag, "cudagraph_unsafe"), reason="this PyTorch has no such tag")
@pytest.mark.parametrize("name", ["dispatch", "redispatch", "combine"])
def test_cuda_graphs_of_the_compiler_leave_the_ops_out(name):
    assert torch.Tag.cudagraph_unsafe in getattr(torch.ops.commlib, name).default.tags
