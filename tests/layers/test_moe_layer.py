"""MoELayer over ranks is the unsharded layer: the same values, the same gradients."""

import threading

import numpy as np
import pytest
import torch

import commlib
from commlib import ExpertParallel
from commlib.nn import MoELayer, TopKRouter, expert_parameters, grouped_mm, shared_parameters

HIDDEN, FFN, TOPK = 32, 48, 2
TOLERANCE = {
    torch.float64: dict(rtol=1e-10, atol=1e-12),
    torch.float32: dict(rtol=1e-4, atol=1e-5),
    torch.bfloat16: dict(rtol=0.05, atol=0.02),
}


def make_layer(ep, experts, dtype, device="cpu"):
    torch.manual_seed(7)
    return MoELayer(HIDDEN, FFN, experts, TOPK, ep, dtype=dtype, device=device)


def inputs(rank, tokens, dtype, device="cpu"):
    g = torch.Generator().manual_seed(100 + rank)
    x = torch.randn(tokens, HIDDEN, generator=g, dtype=torch.float64).to(dtype)
    upstream = torch.randn(tokens, HIDDEN, generator=g, dtype=torch.float64).to(dtype)
    return x.to(device).requires_grad_(), upstream.to(device)


def run(layer, x, upstream):
    out, aux = layer(x)
    ((out * upstream).sum() + aux.loss).backward()
    return out.detach(), x.grad


def run_unsharded(experts, tokens, dtype, device):
    """Each rank's output, gradient of x and gradient of the router; then all ranks' of the experts."""
    layer = make_layer(None, experts, dtype, device)
    by_rank = []
    for rank, count in enumerate(tokens):
        layer.router.weight.grad = None
        by_rank.append((*run(layer, *inputs(rank, count, dtype, device)), layer.router.weight.grad))
    return by_rank, [p.grad for p in expert_parameters(layer)]


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(("experts", "tokens"), [(8, [6, 6]), (6, [5, 0, 9, 2]), (5, [7, 3, 8]), (4, [9])])
def test_values_and_gradients_are_those_of_the_unsharded_layer(device, dtype, experts, tokens):
    ranks = len(tokens)

    def rank_main(rank):
        config = dict(num_experts=experts, hidden=HIDDEN, topk=TOPK, max_tokens=16, dtype=dtype)
        with ExpertParallel(timeout=30.0, **config) as ep:
            with lock:  # torch.manual_seed is global to the process: ranks are threads here
                layer = make_layer(ep, experts, dtype, device)
            x, upstream = inputs(rank, tokens[rank], dtype, device)
            layer.router(x)
            ep.group.barrier()  # on a GPU no rank may wait for one that still starts its matmuls
            out, x_grad = run(layer, x, upstream)
            return (out, x_grad, layer.router.weight.grad), [p.grad for p in expert_parameters(layer)]

    lock = threading.Lock()
    # Before the ranks: on a GPU it loads the kernels that they share.
    by_rank, expert_grads = run_unsharded(experts, tokens, dtype, device)
    for rank, (got, got_expert_grads) in enumerate(commlib.run_ranks(rank_main, ranks, device=device)):
        begin, end = rank * experts // ranks, (rank + 1) * experts // ranks
        wanted = [*by_rank[rank], *(grad[begin:end] for grad in expert_grads)]
        for a, b in zip([*got, *got_expert_grads], wanted, strict=True):
            torch.testing.assert_close(a, b, **TOLERANCE[dtype])


def one_rank(device, max_tokens=16):
    """A communicator of float32 rows and 4 experts, outside of run_ranks."""
    shape = dict(num_experts=4, hidden=HIDDEN, topk=TOPK, dtype=torch.float32)
    return ExpertParallel(max_tokens=max_tokens, device=device, **shape)


def test_leading_dimensions_are_kept_and_aux_counts_tokens(device):
    with one_rank(device, max_tokens=30) as ep:
        layer = make_layer(ep, 4, torch.float32, device)
        out, aux = layer(torch.randn(2, 3, 5, HIDDEN, device=device))
        assert out.shape == (2, 3, 5, HIDDEN)
        assert aux.tokens_per_expert.sum() == 30 * TOPK
        assert aux.loss.ndim == 0
        with pytest.raises(ValueError, match=r"x must be \[\.\.\., 32\]"):
            layer(torch.randn(3, 8, device=device))


def test_a_router_of_the_user_is_used(device):
    def first_experts(x):
        idx = torch.tensor([[0, 1]], device=device).expand(len(x), 2)
        return idx, torch.full(idx.shape, 0.5, device=device), x.new_zeros(())

    with one_rank(device) as ep:
        layer = MoELayer(HIDDEN, FFN, 4, TOPK, ep, router=first_experts, device=device)
        x = torch.randn(5, HIDDEN, device=device)
        out, aux = layer(x)
        assert aux.tokens_per_expert.tolist() == [5, 5, 0, 0]
        e = layer.experts

        def expert(i):
            return (torch.nn.functional.silu(x @ e.w1[i]) * (x @ e.w3[i])) @ e.w2[i]

        torch.testing.assert_close(out, (expert(0) + expert(1)) / 2, rtol=1e-4, atol=1e-5)


def test_it_compiles_without_a_graph_break(device):
    with one_rank(device) as ep:
        layer = make_layer(ep, 4, torch.float32, device)
        x, upstream = inputs(0, 6, torch.float32, device)
        eager = run(layer, x, upstream)
        eager_grads = [p.grad.clone() for p in layer.parameters()]
        layer.zero_grad()
        x.grad = None
        torch._dynamo.reset()
        compiled = torch.compile(layer, fullgraph=True)
        for got, want in zip(run(compiled, x, upstream), eager, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
        for p, want in zip(layer.parameters(), eager_grads, strict=True):
            torch.testing.assert_close(p.grad, want, rtol=1e-4, atol=1e-5)


def test_parameters_are_told_apart():
    layer = make_layer(None, 4, torch.float32)
    assert len(list(expert_parameters(layer))) == 3
    assert [p is layer.router.weight for p in shared_parameters(layer)] == [True]


def test_a_layer_that_does_not_fit_its_communicator_says_so():
    with (
        one_rank("cpu") as ep,
        pytest.raises(ValueError, match="num_experts=8, its communicator 4"),
    ):
        MoELayer(HIDDEN, FFN, 8, TOPK, ep)


@pytest.mark.parametrize(
    ("given", "error", "text"),
    [
        (dict(ep="x"), TypeError, "ep must be a commlib.ExpertParallel or None, got str"),
        (dict(hidden=8.0), TypeError, "hidden must be an int, got 8.0"),
        (dict(ffn_hidden=0), ValueError, "ffn_hidden must be at least 1, got 0"),
        (dict(align=0), ValueError, "align must be at least 1, got 0"),
        (dict(overlap_chunks="a"), TypeError, "overlap_chunks must be an int, got 'a'"),
        (dict(dtype="bf16"), TypeError, "dtype must be a floating torch.dtype, got 'bf16'"),
        (dict(dtype=torch.int32), TypeError, "dtype must be a floating torch.dtype, got torch.int32"),
        (dict(dtype=0), TypeError, "dtype must be a floating torch.dtype, got 0"),
        (dict(experts=None), TypeError, "experts must be a class or function that makes them, got None"),
        (dict(router=TopKRouter), TypeError, "router must be a module or None, got <class"),
        (dict(router=TopKRouter(HIDDEN, 8, 1)), ValueError, "num_experts=4 and topk=2, its router 8 and 1"),
        (dict(router=3), TypeError, "router must be a module or None, got 3"),
        (dict(shared=3), TypeError, "shared must be a module or None, got 3"),
    ],
    ids=str,
)
def test_what_a_layer_cannot_be_made_of_is_named(given, error, text):
    arguments = dict(hidden=HIDDEN, ffn_hidden=FFN, num_experts=4, topk=TOPK, ep=None) | given
    with pytest.raises(error, match=text):
        MoELayer(**arguments)


@pytest.mark.parametrize(
    ("x", "error", "text"),
    [
        ([[1.0]], TypeError, "x must be a torch.Tensor, got list"),
        (np.zeros((2, HIDDEN)), TypeError, "x must be a torch.Tensor, got ndarray"),
        (torch.tensor(1.0), ValueError, rf"x must be \[\.\.\., {HIDDEN}\], got \[\]"),
        (torch.zeros(2, 3), ValueError, rf"x must be \[\.\.\., {HIDDEN}\], got \[2, 3\]"),
    ],
    ids=str,
)
def test_what_a_layer_cannot_compute_on_is_named(x, error, text):
    with pytest.raises(error, match=text):
        make_layer(None, 4, torch.float32)(x)


def test_what_modules_of_the_user_return_is_checked():
    arguments = dict(hidden=HIDDEN, ffn_hidden=FFN, num_experts=4, topk=TOPK, ep=None)
    x = torch.zeros(3, HIDDEN)
    with pytest.raises(TypeError, match=r"router must return \(topk_idx, topk_weights, loss\), .* got None"):
        MoELayer(**arguments, router=lambda rows: None)(x)
    with pytest.raises(ValueError, match=rf"shared must return \[3, {HIDDEN}\], .* got \[3, 1\]"):
        MoELayer(**arguments, shared=torch.nn.Linear(HIDDEN, 1))(x)
    with pytest.raises(TypeError, match=r"shared must return a torch\.Tensor, got None"):
        MoELayer(**arguments, shared=lambda rows: None)(x)
    with one_rank("cpu") as ep, pytest.raises(TypeError, match=r"rows of torch\.float64, .* convert x"):
        MoELayer(HIDDEN, FFN, 4, TOPK, ep)(x.double())


def test_router_weights_sum_to_one_and_ids_differ():
    routing = TopKRouter(HIDDEN, 8, 3)(torch.randn(20, HIDDEN))
    torch.testing.assert_close(routing.topk_weights.sum(-1), torch.ones(20))
    assert all(len(set(ids)) == 3 for ids in routing.topk_idx.tolist())
    assert routing.loss >= 1.0 - 1e-5  # its least value, at perfect balance


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(("hidden", "out"), [(16, 32), (7, 5)])
@pytest.mark.parametrize("sizes", [[3, 0, 5], [0, 0, 0], [8, 8, 8]])
def test_grouped_mm_is_a_matmul_for_each_group(device, dtype, hidden, out, sizes):
    offsets = torch.tensor([0, *sizes], device=device).cumsum(0)
    x = torch.randn(sum(sizes), hidden, device=device).to(dtype).requires_grad_()
    w = torch.randn(3, hidden, out, device=device).to(dtype).requires_grad_()
    got = grouped_mm(x, w, offsets)
    got.sum().backward()
    grads = x.grad.clone(), w.grad.clone()
    x.grad = w.grad = None
    want = torch.cat([part @ w[i] for i, part in enumerate(x.split(sizes))])
    want.sum().backward()
    tolerance = TOLERANCE[dtype] if dtype != torch.bfloat16 else dict(rtol=0.02, atol=0.1)
    torch.testing.assert_close(got, want, **tolerance)
    for a, b in zip(grads, (x.grad, w.grad), strict=True):
        torch.testing.assert_close(a, b, **tolerance)
