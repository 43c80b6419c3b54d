"""The gradient of a combine with weights: rows weighed, and multiplied by y, as they arrive."""

import pytest
import torch
from reference import make_world
from torch.utils.checkpoint import checkpoint

import commlib
from commlib import ExpertParallel

RANKS = 3
TOKENS = [9, 0, 5]
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


def values(shape, dtype, seed, device):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=g, dtype=torch.float64).to(dtype).to(device)


def strided(y):
    """The same rows, with others between them."""
    wide = y.new_empty(len(y), 2 * y.shape[1] + 3)
    wide[:, : y.shape[1]] = y.detach()
    return wide[:, : y.shape[1]]


def combine_in(how, ep, handle, y, weights):
    """A combine that is waited for in some way."""
    if how == "sync":
        return ep.combine(y, handle, weights=weights)
    out, event = ep.combine(y, handle, weights=weights, async_op=True)
    if how == "finish":
        return event.finish(out)[0]
    event.wait()
    return out


def backward(ep, handle, y, weights, upstream, how="sync"):
    """Its gradients."""
    y, weights = y.detach().requires_grad_(), weights.detach().requires_grad_()
    return torch.autograd.grad(combine_in(how, ep, handle, y, weights), (y, weights), upstream)


def check_gradients(ep, handle, y, weights, upstream, got):
    """Of y bit by bit, and of the weights as near as roundings allow."""
    rows = ep.dispatch(upstream, handle=handle).x
    wide = weights.dtype
    gy, gw = got
    assert gw.dtype == wide
    assert torch.equal(gy, (rows.to(wide) * weights.unsqueeze(-1)).to(rows.dtype))
    products = rows.double() * y.double()
    # At least 32 parts, of which each sums its products in order, and a tree over the parts and, on a GPU,
    # over the elements of 16 bytes: so many roundings touch a product. Of fp64, the reference makes more.
    roundings = y.shape[1] / 32 + 10 if wide == torch.float32 else y.shape[1] + 10
    bound = roundings * torch.finfo(wide).eps / 2 * products.abs().sum(-1)
    assert bool(((gw - products.sum(-1)).abs() <= bound).all())
    padding = handle._plan.source[:, 0] < 0
    assert not gy[padding].any()
    assert not gw[padding].any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", [1, 33, 64, 96, 520])
def test_gradients_are_those_of_rows_weighed_one_by_one(device, dtype, hidden):
    world = make_world(TOKENS, num_experts=7, topk=3, hidden=hidden, dtype=dtype, device=device)

    def rank_main(rank):
        with ExpertParallel(num_sms=2, **world.config()) as ep:
            upstream = values((TOKENS[rank], hidden), dtype, rank, device)
            for layout, align in (("expert", 1), ("expert", 4), ("rank", 1)):
                d = ep.dispatch(world.x[rank], world.topk_idx[rank], layout=layout, align=align)
                y = values(d.x.shape, dtype, 10 + rank, device)
                weights = values(len(y), world.weight_dtype, 20 + rank, device)
                first = backward(ep, d.handle, y, weights, upstream)
                check_gradients(ep, d.handle, y, weights, upstream, first)
                for how, given in (("finish", y), ("wait", y), ("sync", strided(y)), ("finish", strided(y))):
                    again = backward(ep, d.handle, given, weights, upstream, how)
                    assert all(map(torch.equal, again, first)), (how, given.stride())

    commlib.run_ranks(rank_main, RANKS, device=device)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("width", [5, 64])
def test_rows_of_another_type_and_width_are_weighed_as_what_they_are(device, dtype, width):
    world = make_world(TOKENS, hidden=64, dtype=torch.float32, device=device)

    def rank_main(rank):
        with ExpertParallel(**world.config()) as ep:
            d = ep.dispatch(world.x[rank], world.topk_idx[rank], layout="expert", align=2)
            y = values((len(d.x), width), dtype, rank, device)
            weights = values(len(y), torch.float32, 20 + rank, device)
            upstream = values((TOKENS[rank], width), dtype, 30 + rank, device)
            for how in ("sync", "finish"):
                got = backward(ep, d.handle, y, weights, upstream, how)
                check_gradients(ep, d.handle, y, weights, upstream, got)

    commlib.run_ranks(rank_main, RANKS, device=device)


@pytest.mark.parametrize("routing", ["hierarchical", "direct"])
def test_gradients_between_nodes_are_those_of_one(routing):
    world = make_world([9, 0, 5, 7], num_experts=8, topk=3, hidden=96, dtype=torch.bfloat16)

    def rank_main(rank, **options):
        with ExpertParallel(**options, **world.config()) as ep:
            d = ep.dispatch(world.x[rank], world.topk_idx[rank], layout="expert", align=4)
            weights = values(len(d.x), torch.float32, 20 + rank, "cpu")
            upstream = values(world.x[rank].shape, torch.bfloat16, rank, "cpu")
            return backward(ep, d.handle, d.x, weights, upstream, "finish")

    one = commlib.run_ranks(rank_main, 4)
    several = commlib.run_ranks(lambda rank: rank_main(rank, ranks_per_node=2, routing=routing), 4)
    for a, b in zip(one, several, strict=True):
        assert all(map(torch.equal, a, b))


@pytest.mark.parametrize("how", ["sync", "finish", "wait"])
def test_a_graph_that_is_kept_gives_its_gradients_again(device, how):
    world = make_world(TOKENS, dtype=torch.bfloat16, device=device)

    def rank_main(rank):
        with ExpertParallel(**world.config()) as ep:
            d = ep.dispatch(world.x[rank], world.topk_idx[rank], layout="expert")
            y = d.x.clone().requires_grad_()
            weights = values(len(y), torch.float32, rank, device).requires_grad_()
            out = combine_in(how, ep, d.handle, y, weights)
            upstream = torch.ones_like(out)
            first = torch.autograd.grad(out, (y, weights), upstream, retain_graph=True)
            second = torch.autograd.grad(out, (y, weights), upstream)
            assert all(map(torch.equal, first, second))
            with pytest.raises(RuntimeError, match="second time"):
                torch.autograd.grad(out, (y, weights), upstream)
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                change_in_place(ep, d, y, weights)

    def change_in_place(ep, d, y, weights):
        changed = y * 1
        out = combine_in(how, ep, d.handle, changed, weights)
        changed.add_(1)
        out.sum().backward()

    commlib.run_ranks(rank_main, RANKS, device=device)


def test_what_a_combine_has_saved_goes_with_its_backward(device):
    world = make_world([6], dtype=torch.bfloat16, device=device)
    with ExpertParallel(**world.config()) as ep:
        d = ep.dispatch(world.x[0], world.topk_idx[0], layout="expert")
        weights = torch.ones(len(d.x), device=device)
        y = d.x.clone().requires_grad_()
        out, event = ep.combine(y * 2, d.handle, weights=weights, async_op=True)
        (out,) = event.finish(out)
        del event
        start = out.grad_fn.next_functions[0][0]
        out.sum().backward()
        for node in (out.grad_fn, start):
            with pytest.raises(RuntimeError, match="already been freed"):
                _ = node.saved_tensors
        assert not any(isinstance(v, torch.Tensor) for v in vars(start.started).values())


@pytest.mark.parametrize("how", ["sync", "finish"])
def test_checkpointing_computes_again_what_is_weighed(device, how):
    world = make_world(TOKENS, dtype=torch.float32, device=device)

    def rank_main(rank):
        with ExpertParallel(**world.config()) as ep:
            weights = world.topk_weights[rank].clone().requires_grad_()
            x = world.x[rank].clone().requires_grad_()

            def layer(x, weights):
                d = ep.dispatch(x, world.topk_idx[rank], weights, layout="expert", align=2)
                return combine_in(how, ep, d.handle, d.x.sin(), d.topk_weights)

            plain = torch.autograd.grad(layer(x, weights).sin().sum(), (x, weights))
            out = checkpoint(layer, x, weights, use_reentrant=False)
            return plain, torch.autograd.grad(out.sin().sum(), (x, weights))

    for plain, saved in commlib.run_ranks(rank_main, RANKS, device=device):
        assert all(map(torch.equal, plain, saved))


def test_compiled_code_weighs_as_eager_code_does(device):
    world = make_world(TOKENS, dtype=torch.bfloat16, device=device)

    def combine(ep, handle, y, weights):
        return ep.combine(y.sin(), handle, weights=weights)

    def rank_main(rank):
        with ExpertParallel(**world.config()) as ep:
            d = ep.dispatch(world.x[rank], world.topk_idx[rank], layout="expert", align=2)
            compiled = torch.compile(combine, fullgraph=True, backend="aot_eager")
            got = []
            for f in (combine, compiled):
                y = d.x.clone().requires_grad_()
                weights = values(len(y), torch.float32, rank, device).requires_grad_()
                got.append(torch.autograd.grad(f(ep, d.handle, y, weights).sum(), (y, weights)))
            return got

    torch._dynamo.reset()
    for eager, compiled in commlib.run_ranks(rank_main, 1, device=device):
        assert all(map(torch.equal, eager, compiled))


def test_the_op_passes_torchs_own_checks(device):
    world = make_world([6], num_experts=4, topk=2, device=device)
    with ExpertParallel(**world.config()) as ep:
        d = ep.dispatch(world.x[0], world.topk_idx[0], layout="expert", align=2)
        x, y = world.x[0].clone().requires_grad_(), d.x.clone().requires_grad_()
        weights = torch.ones(len(y), device=device, requires_grad=True)
        torch.library.opcheck(
            torch.ops.commlib.redispatch.default,
            (x, None, *d.handle._plan[:-1], True, False, None, y, weights, 0),
            test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
        )


def test_the_gradient_of_the_gradient_is_exact(device):
    """In fp64, by finite differences: of x, of values that ride with the rows, of y and of weights."""
    world = make_world([4], num_experts=4, topk=2, hidden=2, dtype=torch.float64, device=device)
    with ExpertParallel(**world.config()) as ep:
        d = ep.dispatch(world.x[0], world.topk_idx[0], layout="expert", align=2)
        routing = d.handle._plan[:-1]

        def weigh(x, given, y, weights):
            options = (True, False, None, y, weights, 0)
            rows, values, _, dots = torch.ops.commlib.redispatch(x, given, *routing, *options)
            return rows, values, dots

        shapes = ((4, 2), (4, 2), d.x.shape, (len(d.x),))
        inputs = [values(s, torch.float64, i, device).requires_grad_() for i, s in enumerate(shapes)]
        assert torch.autograd.gradcheck(weigh, inputs)
        assert torch.autograd.gradgradcheck(weigh, inputs)


BAD = {
    "no weights": (lambda y, w: (y, None), "go together"),
    "no y": (lambda y, w: (None, w), "go together"),
    "too few rows": (lambda y, w: (y[1:], w), "y must have"),
    "another width": (lambda y, w: (y[:, 1:].contiguous(), w), "x must be as y is"),
    "no sums": (lambda y, w: (y.to(torch.int8), w), "can be summed"),
    "another weight dtype": (lambda y, w: (y, w.double()), "y_weights must be"),
    "weights of another shape": (lambda y, w: (y, w.unsqueeze(1)), "y_weights must be"),
    "weights apart": (lambda y, w: (y, w.repeat_interleave(2)[::2]), "contiguous"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_weighed_is_refused(device, name):
    change, message = BAD[name]
    world = make_world([6], device=device)
    with ExpertParallel(**world.config()) as ep:
        d = ep.dispatch(world.x[0], world.topk_idx[0], layout="expert")
        y, weights = change(d.x, torch.ones(len(d.x), device=device))
        with pytest.raises(ValueError, match=message):
            torch.ops.commlib.redispatch(
                world.x[0], None, *d.handle._plan[:-1], True, False, None, y, weights, 0
            )
