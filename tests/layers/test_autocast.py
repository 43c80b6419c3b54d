"""Mixed precision as with torch's own layers: float32 parameters, torch.autocast, weights of any type."""

import threading

import pytest
import torch
from torch import nn

import commlib
from commlib import ExpertParallel
from commlib.nn import MoELayer, grouped_mm

HIDDEN, FFN, EXPERTS, TOPK = 32, 48, 4, 2
HALVES = [torch.bfloat16, torch.float16]


def connect(device, dtype, **options):
    shape = dict(num_experts=EXPERTS, hidden=HIDDEN, topk=TOPK, max_tokens=32)
    return ExpertParallel(dtype=dtype, device=device, timeout=30.0, **shape, **options)


def layer_of(ep, device, dtype=torch.float32, **options):
    torch.manual_seed(3)
    return MoELayer(HIDDEN, FFN, EXPERTS, TOPK, ep, dtype=dtype, device=device, **options)


def rows(rank, device, dtype=torch.float32):
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(12, HIDDEN, generator=generator).to(device, dtype)


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize(("x", "w"), [(torch.float32, torch.float32), (None, torch.float32), (None, None)])
def test_grouped_mm_computes_in_the_dtype_of_linear(device, half, x, w):
    offsets = torch.tensor([0, 3, 8], device=device)
    a = torch.randn(8, 16, device=device, dtype=x or half).requires_grad_()
    b = torch.randn(2, 16, 24, device=device, dtype=w or half).requires_grad_()
    with torch.autocast(device, dtype=half):
        got = grouped_mm(a, b, offsets)
        want = torch.cat([nn.functional.linear(a[:3], b[0].mT), nn.functional.linear(a[3:], b[1].mT)])
    assert got.dtype == want.dtype == half
    torch.testing.assert_close(got, want, rtol=0.02, atol=0.05)
    got.float().sum().backward()
    assert (a.grad.dtype, b.grad.dtype) == (a.dtype, b.dtype)


def test_grouped_mm_leaves_float64_alone_and_refuses_a_mixture(device):
    offsets = torch.tensor([0, 8], device=device)
    wide = torch.randn(8, 16, device=device, dtype=torch.float64)
    w = torch.randn(1, 16, 8, device=device, dtype=torch.float64)
    with torch.autocast(device, dtype=torch.bfloat16):
        assert grouped_mm(wide, w, offsets).dtype == torch.float64
    with pytest.raises(TypeError, match=r"x is torch.float64, w is torch.float32: .*torch\.autocast"):
        grouped_mm(wide, w.float(), offsets)


@pytest.mark.parametrize("travels", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, dict(overlap_chunks=3), dict(shared=True)])
def test_the_layer_under_autocast_is_the_unsharded_one_under_autocast(device, travels, options):
    def make(ep):
        with lock:  # torch.manual_seed is global to the process: ranks are threads here
            torch.manual_seed(1)
            shared = nn.Linear(HIDDEN, HIDDEN, device=device) if options.get("shared") else None
            before = nn.Linear(HIDDEN, HIDDEN, device=device)
            return before, layer_of(ep, device, **(options | ({"shared": shared} if shared else {})))

    def run(before, layer, rank):
        with torch.autocast(device, dtype=torch.bfloat16):
            out, aux = layer(before(rows(rank, device)))
            ((out.float() * rows(rank + 9, device)).sum() + aux.loss).backward()
        assert out.dtype == torch.bfloat16
        return out.detach()

    def rank_main(rank):
        with connect(device, travels) as ep:
            before, layer = make(ep)
            layer.router(rows(rank, device))
            ep.group.barrier()  # see test_moe_layer
            out = run(before, layer, rank)
            assert layer.experts.w1.grad.dtype == torch.float32
            return out, before.weight.grad, layer.experts.w1.grad.as_subclass(torch.Tensor)

    lock = threading.Lock()
    before, layer = make(None)
    outs, grads = [], []
    for rank in range(2):
        before.weight.grad = None
        outs.append(run(before, layer, rank))
        grads.append(before.weight.grad)
    close = dict(rtol=0.05, atol=0.05)
    for rank, (out, grad, expert_grad) in enumerate(commlib.run_ranks(rank_main, 2, device=device)):
        torch.testing.assert_close(out, outs[rank], **close)
        torch.testing.assert_close(grad, grads[rank], rtol=0.05, atol=0.2)
        torch.testing.assert_close(
            expert_grad, layer.experts.w1.grad[rank * 2 : rank * 2 + 2], rtol=0.05, atol=0.2
        )


def test_rows_that_would_be_rounded_on_the_way_are_refused(device):
    with connect(device, torch.bfloat16) as ep:
        layer = layer_of(ep, device)
        with pytest.raises(TypeError, match=r"rows of torch\.float32, .* torch\.bfloat16, cannot hold"):
            layer(rows(0, device))
        with torch.autocast(device, dtype=torch.bfloat16):
            layer(rows(0, device))


def test_rows_of_another_dtype_than_the_experts_are_refused_without_autocast(device):
    for ep in (None, connect(device, torch.float32)):
        with pytest.raises(TypeError, match=r"x is torch\.bfloat16, w is torch\.float32"):
            layer_of(ep, device)(rows(0, device, torch.bfloat16))


@pytest.mark.parametrize("given", [torch.float64, torch.float16, torch.bfloat16])
def test_weights_of_any_floating_type(device, given):
    ids = torch.tensor([[0, 1], [2, 3], [1, -1]], device=device)
    weights = torch.tensor([[0.5, 0.25], [1.0, 2.0], [0.125, 0.0]], device=device, dtype=given)
    with connect(device, torch.float32) as ep:
        for layout in ("rank", "expert"):
            weights.requires_grad_()
            x = rows(0, device)[:3]
            d = ep.dispatch(x, ids, weights, layout=layout)
            assert d.topk_weights.dtype == torch.float32
            if layout == "expert":
                row_weights = d.topk_weights.to(given)
                out = ep.combine(d.x, d.handle, weights=row_weights)
                torch.testing.assert_close(out, x * weights.float().sum(1, keepdim=True))
                out.sum().backward()
                assert weights.grad.dtype == given
                want = torch.where(ids < 0, 0.0, x.sum(1, keepdim=True).expand(3, 2))
                torch.testing.assert_close(weights.grad, want.to(given), rtol=0.02, atol=0.02)
            weights = weights.detach()


def test_autocast_compiles(device):
    with connect(device, torch.bfloat16) as ep:
        layer = layer_of(ep, device)

        def step(x):
            with torch.autocast(device, dtype=torch.bfloat16):
                out, aux = layer(x)
                return out.float().square().sum() + aux.loss

        x = rows(0, device)
        eager = step(x)
        eager.backward()
        grads = [p.grad.clone() for p in layer.parameters()]
        layer.zero_grad()
        torch._dynamo.reset()
        compiled = torch.compile(step, fullgraph=True)(x)
        compiled.backward()
        torch.testing.assert_close(compiled, eager, rtol=0.02, atol=0.02)
        for p, want in zip(layer.parameters(), grads, strict=True):
            torch.testing.assert_close(p.grad, want, rtol=0.05, atol=0.2)
