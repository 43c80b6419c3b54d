"""Asynchronous operations under autograd: the same gradients, whether their halves are split or not."""

import contextlib

import pytest
import torch
from reference import make_world

import commlib
from commlib import ExpertParallel

TOKENS = [7, 0, 12]


def layer(ep, x, idx, topk_weights, mode, layout, bias):
    """Dispatch, a nonlinear stand-in for experts, weighted combine."""
    if mode == "sync":
        d = ep.dispatch(x, idx, topk_weights, layout=layout)
    else:
        d = ep.dispatch(x, idx, topk_weights, layout=layout, async_op=True)
        if mode == "finish":
            d = d.finish()
        else:
            d.event.wait()
    y = torch.tanh(d.x) * 1.5
    weights = d.topk_weights if layout == "expert" else d.topk_weights.sum(1)
    if mode == "sync":
        return ep.combine(y, d.handle, weights=weights, bias=bias)
    out, event = ep.combine(y, d.handle, weights=weights, bias=bias, async_op=True)
    if mode == "finish":
        return event.finish(out)[0]
    event.wait()
    return out


@pytest.mark.parametrize("layout", ["rank", "expert"])
@pytest.mark.parametrize("mode", ["wait", "finish"])
def test_values_and_gradients_are_those_of_synchronous_calls(device, layout, mode):
    world = make_world(TOKENS, dtype=torch.float64, device=device)

    def gradients(ep, rank, mode):
        x = world.x[rank].clone().requires_grad_()
        w = world.topk_weights[rank].clone().requires_grad_()
        bias = torch.ones_like(world.x[rank]).requires_grad_()
        out = layer(ep, x, world.topk_idx[rank], w, mode, layout, bias)
        (out.sin().sum()).backward()
        return out.detach(), x.grad, w.grad, bias.grad

    def rank_main(rank):
        with ExpertParallel(**world.config()) as ep:
            return gradients(ep, rank, "sync"), gradients(ep, rank, mode)

    for sync, split in commlib.run_ranks(rank_main, len(TOKENS), device=device):
        for a, b in zip(sync, split, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("with_weights", [False, True])
def test_a_handle_can_be_split_as_well(device, with_weights):
    world = make_world(TOKENS, dtype=torch.float64, device=device)

    def rank_main(rank):
        with ExpertParallel(**world.config()) as ep:
            first = ep.dispatch(world.x[rank], world.topk_idx[rank])
            x = world.x[rank].clone().requires_grad_()
            w = world.topk_weights[rank].clone().requires_grad_() if with_weights else None
            d = ep.dispatch(x, topk_weights=w, handle=first.handle, async_op=True).finish()
            assert d.event is None
            loss = d.x.square().sum() + (d.topk_weights.square().sum() if with_weights else 0)
            loss.backward()
            copies = sum((world.topk_idx[rank] // 3 == r).any(1, keepdim=True) for r in range(3))
            return x.grad, 2 * x.detach() * copies, None if w is None else (w.grad, w.detach())

    world.num_experts = 9  # three for each rank, so that owners are easy to tell
    for got, want, weights in commlib.run_ranks(rank_main, len(TOKENS), device=device):
        torch.testing.assert_close(got, want)
        if weights is not None:
            used = weights[0] != 0
            torch.testing.assert_close(weights[0][used], 2 * weights[1][used])


def test_backward_starts_at_finish_and_ends_at_the_start_of_the_operation(device):
    """Work between the halves runs between them, in backward too."""
    world = make_world([6, 6], device=device)
    order: list[list[str]] = [[], []]

    def rank_main(rank):
        with ExpertParallel(**world.config()) as ep:
            begun = ep.stats()["combines"]
            x = world.x[rank].clone().requires_grad_()
            d = ep.dispatch(x, world.topk_idx[rank], async_op=True)
            other = torch.ones(3, device=device, requires_grad=True) * 2
            other.register_hook(lambda _: order[rank].append(f"other {ep.stats()['combines'] - begun}"))
            x.register_hook(lambda _: order[rank].append("x"))
            d = d.finish()
            (d.x.sum() + other.sum()).backward()

    commlib.run_ranks(rank_main, 2, device=device)
    # The combine that carries the gradient back was issued before the gradient of the work in between.
    assert order == [["other 1", "x"]] * 2


def test_a_second_backward_gives_the_same_again(device):
    world = make_world([5, 3], dtype=torch.float64, device=device)

    def rank_main(rank):
        with ExpertParallel(**world.config()) as ep:
            x = world.x[rank].clone().requires_grad_()
            loss = ep.dispatch(x, world.topk_idx[rank], async_op=True).finish().x.square().sum()
            first = torch.autograd.grad(loss, x, retain_graph=True)[0]
            return first, torch.autograd.grad(loss, x)[0]

    for first, second in commlib.run_ranks(rank_main, 2, device=device):
        assert torch.equal(first, second)


@pytest.mark.parametrize("ends", ["before the start", "by an error"])
def test_a_backward_that_ended_early_leaves_nothing_to_the_next(device, ends):
    """What finish issued in the first pass is not what start takes in the second, with other gradients."""
    world = make_world([5, 3], dtype=torch.float64, device=device)

    def rank_main(rank):
        with ExpertParallel(**world.config()) as ep:
            x = world.x[rank].clone().requires_grad_()
            scale = torch.ones((), dtype=x.dtype, device=device, requires_grad=True)
            d = ep.dispatch(x, world.topk_idx[rank], async_op=True)
            if ends == "by an error":
                fails = [True]
                d.x.register_hook(lambda _: 1 / 0 if fails and fails.pop() else None)
            finished = d.finish()
            loss = (finished.x * scale).square().sum()
            if ends == "by an error":
                with pytest.raises(ZeroDivisionError):
                    (3 * loss).backward(retain_graph=True)
            else:
                (early,) = torch.autograd.grad(3 * loss, d.x, retain_graph=True)
                assert torch.equal(early, 6 * finished.x.detach())
            (got,) = torch.autograd.grad(loss, x)
            y = x.detach().requires_grad_()
            (want,) = torch.autograd.grad(ep.dispatch(y, world.topk_idx[rank]).x.square().sum(), y)
            return got, want

    for got, want in commlib.run_ranks(rank_main, 2, device=device):
        assert torch.equal(got, want)


def test_without_gradients_finish_is_wait(device):
    world = make_world([5, 3], device=device)

    def rank_main(rank):
        with ExpertParallel(**world.config()) as ep:
            d = ep.dispatch(world.x[rank], world.topk_idx[rank], async_op=True).finish()
            assert d.event is None and d.finish() is d
            out, event = ep.combine(d.x, d.handle, async_op=True)
            (out,) = event.finish(out)
            assert not out.requires_grad
            return out, ep.combine(d.x, d.handle)

    for got, want in commlib.run_ranks(rank_main, 2, device=device):
        assert torch.equal(got, want)


def hooked(d):
    d.x.register_hook(lambda grad: grad * 10)
    return [d.finish()]


def changed_in_place(d):
    d.x.register_hook(lambda grad: (grad.mul_(10), None)[1])
    return [d.finish()]


BESIDE = {
    "finished twice": lambda d: [d.finish(), d.finish()],
    "finished, and used itself": lambda d: [d.finish(), d],
    "used itself, and finished": lambda d: [d, d.finish()],
    "with a hook": hooked,
    "with a hook that writes": changed_in_place,
}


@pytest.mark.parametrize("way", BESIDE)
def test_what_comes_beside_finish_is_an_error_and_not_lost(device, way):
    world = make_world([5], dtype=torch.float64, device=device)
    with ExpertParallel(**world.config()) as ep:
        x = world.x[0].clone().requires_grad_()
        rows = [d.x for d in BESIDE[way](ep.dispatch(x, world.topk_idx[0], async_op=True))]
        with pytest.raises(RuntimeError, match="used beside what finish"):
            sum((k + 1) * r.square().sum() for k, r in enumerate(rows)).backward()
        assert x.grad is None
        (again,) = torch.autograd.grad(ep.dispatch(x, world.topk_idx[0], async_op=True).finish().x.sum(), x)
        (want,) = torch.autograd.grad(ep.dispatch(x, world.topk_idx[0]).x.sum(), x)
        assert torch.equal(again, want)


def test_weights_used_past_finish_are_an_error(device):
    world = make_world([5], dtype=torch.float64, device=device)
    with ExpertParallel(**world.config()) as ep:
        w = world.topk_weights[0].clone().requires_grad_()
        d = ep.dispatch(world.x[0], world.topk_idx[0], w, layout="expert", async_op=True)
        f = d.finish()
        loss = ep.combine(f.x * 2, f.handle, weights=d.topk_weights).square().sum()
        with pytest.raises(RuntimeError, match="used beside what finish"):
            loss.backward()


def test_sums_used_past_finish_are_an_error(device):
    world = make_world([4], device=device)
    with ExpertParallel(**world.config()) as ep:
        d = ep.dispatch(world.x[0], world.topk_idx[0])
        out, event = ep.combine(d.x.clone().requires_grad_(), d.handle, async_op=True)
        (finished,) = event.finish(out)
        with pytest.raises(RuntimeError, match="used beside what finish"):
            (finished.sum() + 2 * out.sum()).backward()


@pytest.mark.parametrize("how", ["twice differentiable", "of inference", "in inference mode"])
def test_gradients_come_in_any_form_and_communicate_once(device, how):
    """Autograd hands on copies of tensors where it may differentiate again; some have no version."""
    world = make_world([5, 3], dtype=torch.float64, device=device)

    def rank_main(rank):
        with ExpertParallel(**world.config()) as ep:
            x = world.x[rank].clone().requires_grad_()
            rows = ep.dispatch(x, world.topk_idx[rank], async_op=True).finish().x
            if how == "twice differentiable" and rank == 0:  # with a gradient that needs none itself
                (got,) = torch.autograd.grad(2 * rows.sum(), x, create_graph=True)
            elif how == "twice differentiable":
                (got,) = torch.autograd.grad(rows.square().sum(), x, create_graph=True)
            else:
                with torch.inference_mode():
                    grad = 2 * torch.ones_like(rows)
                mode = torch.inference_mode if how == "in inference mode" else contextlib.nullcontext
                with mode():
                    (got,) = torch.autograd.grad(rows, x, grad)
            y = x.detach().requires_grad_()
            again = ep.dispatch(y, world.topk_idx[rank]).x
            square = how == "twice differentiable" and rank == 1
            (want,) = torch.autograd.grad(again.square().sum() if square else 2 * again.sum(), y)
            return got.detach(), want, ep.stats()["combines"]

    for got, want, combines in commlib.run_ranks(rank_main, 2, device=device):
        assert torch.equal(got, want)
        assert combines == 2


def test_a_backward_in_two_nodes_communicates_once(device):
    world = make_world([4], device=device)
    with ExpertParallel(**world.config()) as ep:
        x = world.x[0].clone().requires_grad_()
        d = ep.dispatch(x, world.topk_idx[0], world.topk_weights[0], async_op=True).finish()
        out, event = ep.combine(d.x * 2, d.handle, async_op=True)
        event.finish(out)[0].sum().backward()
        assert (ep.stats()["redispatches"], ep.stats()["combines"]) == (1, 2)


def test_finish_takes_the_results_and_nothing_else(device):
    world = make_world([5], dtype=torch.float64, device=device)
    with ExpertParallel(**world.config()) as ep:
        x = world.x[0].clone().requires_grad_()
        d = ep.dispatch(x, world.topk_idx[0], world.topk_weights[0], async_op=True)
        weights = d.topk_weights
        for wrong in ((d.x,), (weights, d.x), (d.x, None), (x, weights), (d.x * 1, weights)):
            with pytest.raises(ValueError, match=r"finish takes .* d\.x and d\.topk_weights, in this order"):
                d.event.finish(*wrong)
        rows, weights = d.event.finish(d.x, weights)
        with pytest.raises(ValueError, match="finish takes"):
            d.event.finish(rows, weights)
        rows.sum().backward()
        assert x.grad is not None
