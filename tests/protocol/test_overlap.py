"""Overlap changes when things run, and neither values nor gradients."""

import threading

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import commlib
from commlib import ExpertParallel
from commlib.nn import MoELayer
from commlib.overlap import TwoBatch, run_experts, take_turns

HIDDEN, FFN, EXPERTS, TOPK = 32, 24, 6, 2
TOKENS = [9, 0, 4]  # fewer than chunks on some ranks
SEED_LOCK = threading.Lock()  # ranks are threads here, and torch's seed is global to the process


def make_layer(ep, device, **options):
    with SEED_LOCK:
        torch.manual_seed(3)
        shared = nn.Linear(HIDDEN, HIDDEN, dtype=torch.float64, device=device)
        options = {k: shared if k == "shared" else v for k, v in options.items()}
        return MoELayer(HIDDEN, FFN, EXPERTS, TOPK, ep, dtype=torch.float64, device=device, **options)


def batch(rank, device, number=0):
    g = torch.Generator().manual_seed(10 * rank + number)
    x = torch.randn(TOKENS[rank], HIDDEN, generator=g, dtype=torch.float64)
    return x.to(device).requires_grad_()


def gradients(layer, outputs, inputs):
    sum(out.sin().sum() for out in outputs).backward()
    return [*(x.grad for x in inputs), *(p.grad for p in layer.parameters())]


def on_ranks(device, fn):
    config = dict(num_experts=EXPERTS, hidden=HIDDEN, topk=TOPK, max_tokens=16, dtype=torch.float64)

    def rank_main(rank):
        with ExpertParallel(timeout=30.0, **config) as ep:
            return fn(rank, ep)

    return commlib.run_ranks(rank_main, len(TOKENS), device=device)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("chunks", [1, 2, 3, 12])
def test_a_layer_in_chunks_is_the_whole_layer(device, chunks, shared):
    def run(rank, ep, **options):
        layer = make_layer(ep, device, **options, **({"shared": True} if shared else {}))
        x = batch(rank, device)
        out, aux = layer(x)
        return [out, aux.loss, *gradients(layer, [out], [x])]

    for whole, split in on_ranks(device, lambda r, ep: (run(r, ep), run(r, ep, overlap_chunks=chunks))):
        for a, b in zip(whole, split, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_any_experts_may_run_in_chunks(device):
    """Factors of local experts; padding and all, and something beside the first dispatch."""

    def run(rank, ep):
        def experts(rows, offsets):
            factors = torch.arange(1.0, len(offsets), dtype=rows.dtype, device=device)
            return rows * factors.repeat_interleave(offsets.diff()).unsqueeze(1)

        layer, x = make_layer(ep, device), batch(rank, device)
        topk_idx, topk_weights, _ = layer.router(x)
        routed = x, topk_idx, topk_weights.detach()
        out, beside = run_experts(ep, experts, *routed, chunks=3, align=4, beside=lambda: rank)
        factors = topk_idx % ep.num_local_experts + 1.0
        wanted = x * (factors * routed[2]).sum(1, keepdim=True)
        grads = [torch.autograd.grad(each.sin().sum(), x) for each in (out, wanted)]
        assert beside == rank
        return (out, *grads[0]), (wanted, *grads[1])

    for got, wanted in on_ranks(device, run):
        for a, b in zip(got, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("shared", [False, True])
def test_two_batches_in_turns_are_two_batches(device, shared):
    options = {"shared": True} if shared else {}

    def run(rank, ep, both):
        layer = make_layer(ep, device, **options)
        a, b = (batch(rank, device, n) for n in range(2))
        outs = [out for out, _ in both(layer, a, b)]
        return [*outs, *gradients(layer, outs, [a, b])]

    def in_turns(layer, a, b):
        return TwoBatch(layer.steps)(a, b)

    def one_by_one(layer, a, b):
        return layer(a), layer(b)

    for want, got in on_ranks(device, lambda r, ep: (run(r, ep, one_by_one), run(r, ep, in_turns))):
        for a, b in zip(want, got, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_steps_without_ranks_give_the_layer():
    layer = make_layer(None, "cpu")
    x = torch.randn(5, HIDDEN, dtype=torch.float64)
    assert torch.equal(take_turns([layer.steps(x)])[0][0], layer(x)[0])


def test_generators_take_turns_and_keep_their_order():
    said = []

    def steps(name, count):
        for i in range(count):
            said.append(f"{name}{i}")
            yield
        return name

    assert take_turns([steps("a", 2), steps("b", 3), steps("c", 0)]) == ["a", "b", "c"]
    assert said == ["a0", "b0", "a1", "b1", "b2"]


def test_chunks_overlap_in_forward_and_backward(device):
    """While a chunk is computed, all dispatches are issued, and in backward all adjoints of combines."""
    seen: list[list[str]] = [[] for _ in TOKENS]

    def watch(rank, ep):
        layer = make_layer(ep, device, overlap_chunks=3)
        forward = layer.experts.forward

        def note(*args):
            stats = ep.stats()
            seen[rank].append(f"d{stats['dispatches']} r{stats['redispatches']} c{stats['combines']}")

        def experts(rows, offsets, products):
            note()
            out = forward(rows, offsets, products)
            out.register_hook(note)
            return out

        layer.experts.forward = experts
        out, _ = layer(batch(rank, device))
        out.sum().backward()

    on_ranks(device, watch)
    # d: dispatches, c: combines, r: dispatches along known routes, issued when a chunk's experts begin. In
    # backward all three chunks' gradients are under way at first, then one more combine for each chunk done.
    assert seen == [["d3 r0 c0", "d3 r0 c1", "d3 r0 c2", "d3 r3 c3", "d3 r3 c4", "d3 r3 c5"]] * len(TOKENS)


def test_a_number_of_chunks_below_one_is_refused():
    with pytest.raises(ValueError, match="overlap_chunks must be at least 1, got 0"):
        MoELayer(8, 8, 2, 1, None, overlap_chunks=0)


@pytest.mark.parametrize("how", ["chunks", "shared", "two batches"])
def test_checkpointing_ends_the_second_forward_in_the_middle(device, how):
    """By an exception, with operations under way that are never waited for."""
    options = {"chunks": {"overlap_chunks": 3}, "shared": {"shared": True}, "two batches": {}}[how]

    def run(rank, ep, save):
        layer = make_layer(ep, device, **options)
        a, b = (batch(rank, device, n) for n in range(2))

        def forward(a, b):
            if how == "two batches":
                return sum(out.sum() for out, _ in TwoBatch(layer.steps)(a, b))
            return layer(a)[0].sin().sum() + layer(b)[0].cos().sum()

        for _ in range(3):
            a.grad = b.grad = None
            (checkpoint(forward, a, b, use_reentrant=False) if save else forward(a, b)).backward()
        return a.grad, b.grad

    for plain, saved in on_ranks(device, lambda r, ep: (run(r, ep, False), run(r, ep, True))):
        for a, b in zip(plain, saved, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
