"""Operations go past PyTorch's dispatcher where nothing has to see them: then nothing must miss it."""

import pytest
import torch
import torch.autograd.forward_ad as fwAD
from torch.overrides import TorchFunctionMode
from torch.profiler import profile
from torch.utils._python_dispatch import TorchDispatchMode

from commlib import ExpertParallel

CONFIG = dict(num_experts=4, hidden=16, topk=2, max_tokens=32, dtype=torch.float32, device="cpu")
LAYOUTS = pytest.mark.parametrize("layout", ["rank", "expert"])
ASYNC = pytest.mark.parametrize("asynchronous", [False, True])


@pytest.fixture
def ep():
    with ExpertParallel(**CONFIG) as made:
        yield made


@pytest.fixture
def batch():
    torch.manual_seed(0)
    weights, idx = torch.rand(6, 4).topk(2)
    return torch.randn(6, 16), idx, weights


def layer(ep, x, idx, weights, layout="expert", asynchronous=False):
    d = ep.dispatch(x, idx, weights, layout=layout, async_op=asynchronous).finish()
    scale = d.topk_weights if layout == "expert" else d.topk_weights.sum(-1)
    y = d.x * scale.unsqueeze(-1)
    if not asynchronous:
        return ep.combine(y, d.handle)
    out, event = ep.combine(y, d.handle, async_op=True)
    return event.finish(out)[0]


@LAYOUTS
@ASYNC
def test_a_default_device_is_not_the_communicators(ep, batch, layout, asynchronous):
    want = layer(ep, *batch, layout, asynchronous)
    with torch.device("meta"):
        assert torch.equal(layer(ep, *batch, layout, asynchronous), want)
    torch.set_default_device("meta")
    try:
        assert torch.equal(layer(ep, *batch, layout, asynchronous), want)
    finally:
        torch.set_default_device(None)


class Negated(torch.autograd.Function):
    """Its gradient is a negated view, as that of an imaginary part may be."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return torch._neg_view(gradient.contiguous())


@ASYNC
def test_gradients_that_are_negated_views_keep_their_sign(ep, batch, asynchronous):
    def gradients(change):
        x, weights = (t.clone().requires_grad_() for t in (batch[0], batch[2]))
        d = ep.dispatch(x, batch[1], weights, layout="expert", async_op=asynchronous).finish()
        rows, scale = change(d.x), change(d.topk_weights)
        y = rows * scale.unsqueeze(-1)
        if asynchronous:
            out, event = ep.combine(y, d.handle, async_op=True)
            (out,) = event.finish(out)
        else:
            out = ep.combine(y, d.handle)
        change(out).square().sum().backward()
        return x.grad, weights.grad

    # Twice negated on the way of each gradient: at out, and at rows or scale.
    for got, want in zip(gradients(Negated.apply), gradients(lambda t: t), strict=True):
        assert torch.equal(got, want)


def test_tangents_of_gradients_are_refused_and_not_lost(ep, batch):
    x = batch[0].clone().requires_grad_()
    d = ep.dispatch(x, batch[1], batch[2], layout="expert", async_op=True).finish()
    with fwAD.dual_level():
        gradient = fwAD.make_dual(torch.ones_like(d.x), torch.ones_like(d.x))
        with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
            torch.autograd.grad(d.x, x, grad_outputs=gradient)


@LAYOUTS
def test_a_handle_does_not_hear_of_what_becomes_of_results(ep, batch, layout):
    x, idx, weights = batch
    d = ep.dispatch(x, idx, weights, layout=layout)
    rows, want = d.handle.num_rows, ep.combine(d.x, d.handle)
    d.source.resize_(1, 2)
    assert d.handle.num_rows == rows
    with pytest.raises(ValueError, match=f"y must have {rows} rows, got 1"):
        ep.combine(torch.ones(1, 16), d.handle)
    assert torch.equal(ep.combine(d.x, d.handle), want)
    assert torch.equal(ep.dispatch(x, handle=d.handle).x, d.x)
    if layout == "rank":
        assert ep.combine_buffer(d.handle).shape == (rows, 16)


def test_a_trace_has_the_operations(ep, batch):
    traced = torch.jit.trace(lambda *b: layer(ep, *b), batch)
    assert torch.equal(traced(*batch), layer(ep, *batch))
    assert {"commlib::dispatch", "commlib::combine"} <= {node.kind() for node in traced.graph.nodes()}


@ASYNC
def test_a_transformation_of_something_else_does_not_matter(ep, batch, asynchronous):
    def loss(scale):
        return (layer(ep, *batch, asynchronous=asynchronous) * scale).sum()

    got = torch.func.grad(loss)(torch.ones(6, 16))
    assert torch.equal(got, layer(ep, *batch))


@ASYNC
def test_a_gradient_by_torch_func_is_refused(ep, batch, asynchronous):
    x, idx, weights = batch
    d = ep.dispatch(x, idx, weights)
    calls = {
        "dispatch": (lambda x: ep.dispatch(x, idx, async_op=asynchronous).x, x),
        "redispatch": (lambda x: ep.dispatch(x, handle=d.handle, async_op=asynchronous).x, x),
        "combine": (lambda y: [ep.combine(y, d.handle, async_op=asynchronous)], d.x),
    }
    for function, argument in calls.values():
        with pytest.raises(NotImplementedError, match=r"no gradient under torch\.func"):
            torch.func.vjp(function, argument)
    assert torch.equal(ep.dispatch(x, idx).x, x)


@ASYNC
def test_a_batch_of_calls_is_refused(ep, batch, asynchronous):
    x, idx, _ = batch
    with pytest.raises(NotImplementedError, match=r"cannot be batched by torch\.vmap"):
        torch.vmap(lambda x: ep.dispatch(x, idx, async_op=asynchronous).x)(torch.stack([x] * 3))
    assert torch.equal(ep.dispatch(x, idx).x, x)


@pytest.mark.parametrize(
    ("mode", "asynchronous"),
    [(TorchFunctionMode, False), (TorchDispatchMode, False), (TorchDispatchMode, True)],
)
def test_a_mode_sees_the_operations(ep, batch, mode, asynchronous):
    seen = []

    class Noting(mode):
        def note(self, function, types, arguments=(), options=None):
            seen.append(str(function))
            return function(*arguments, **(options or {}))

        __torch_function__ = __torch_dispatch__ = note

    want = layer(ep, *batch)
    with Noting():
        assert torch.equal(layer(ep, *batch, asynchronous=asynchronous), want)
    assert {"commlib.dispatch.default", "commlib.combine.default"} <= set(seen)


@ASYNC
def test_a_profile_has_the_operations(ep, batch, asynchronous):
    with profile() as taken:
        layer(ep, *batch, asynchronous=asynchronous)
    assert {"commlib::dispatch", "commlib::combine"} <= {event.name for event in taken.events()}


def test_no_wave_has_an_expert_that_there_is_not(ep, batch):
    d = ep.dispatch(*batch, layout="expert", async_op=True, in_waves=True)
    for expert in (-1, 4, 99):
        with pytest.raises(ValueError, match=f"expert is {expert}, but this rank has local experts 0 to 3"):
            d.event.wait_expert(expert)
    d.event.wait_expert(3)


def test_tensors_without_memory_are_refused_wherever_they_are_given(ep, batch):
    x, idx, weights = batch
    d = ep.dispatch(x, idx, layout="expert")
    calls = {
        "x": (x, lambda t: ep.dispatch(t, idx)),
        "topk_idx": (idx, lambda t: ep.dispatch(x, t)),
        "topk_weights": (weights, lambda t: ep.dispatch(x, idx, t)),
        "y": (d.x, lambda t: ep.combine(t, d.handle)),
        "weights": (torch.ones(12), lambda t: ep.combine(d.x, d.handle, weights=t)),
        "bias": (x, lambda t: ep.combine(d.x, d.handle, bias=t)),
        "out": (x, lambda t: ep.combine(d.x, d.handle, out=t)),
    }
    for name, (good, call) in calls.items():
        freed = good.clone()
        freed.untyped_storage().resize_(0)
        with pytest.raises(ValueError, match=f"{name} has no memory of its own"):
            call(freed)
        nested = torch.nested.nested_tensor([good[:1], good[1:]])
        with pytest.raises(ValueError, match=f"{name} must be a dense tensor, got a nested tensor"):
            call(nested)
    assert ep.dispatch(x, idx).x.shape == x.shape
