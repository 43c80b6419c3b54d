"""Bad input: a clear error before anything is sent, and a communicator that still works afterwards."""

import copy

import numpy as np
import pytest
import torch
from reference import expected_rank_layout, make_world

import commlib
from commlib import ExpertParallel

CONFIG = {
    "num_experts": 8,
    "hidden": 64,
    "topk": 2,
    "max_tokens": 8,
    "dtype": torch.float32,
    "timeout": 30.0,
}


def rows(n=4, dtype=torch.float32, hidden=64, device="cpu"):
    return torch.ones(n, hidden, dtype=dtype, device=device)


def ids(n=4, value=0, device="cpu"):
    return torch.full((n, 2), value, device=device)


def on(device, arguments):
    """The arguments with the CPU's tensors on ``device``, strides and all."""

    def moved(value):
        if not isinstance(value, torch.Tensor) or value.device.type != "cpu":
            return value
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device).copy_(value)

    return {name: moved(value) for name, value in arguments.items()}


TOO_LARGE = torch.tensor([[0, 1], [2, 8], [0, 1], [0, 1]])

BAD_DISPATCH = {
    "dtype": (dict(x=rows(dtype=torch.float16)), ValueError, "x must be torch.float32, got torch.float16"),
    "hidden": (dict(x=rows(hidden=32)), ValueError, r"x must be \[rows, 64\], got \[4, 32\]"),
    "dims": (dict(x=torch.ones(64)), ValueError, r"x must be \[rows, 64\], got \[64\]"),
    "too many": (dict(x=rows(9), topk_idx=ids(9)), ValueError, "9 rows, but max_tokens is 8"),
    "strides": (dict(x=torch.ones(64, 4).t()), ValueError, "contiguous"),
    "device": (dict(x=torch.ones(4, 64, device="meta")), ValueError, "x must be on (cpu|cuda)"),
    "list": (dict(x=[[1.0] * 64]), TypeError, "x must be a tensor or an array with __dlpack__, got list"),
    "no ids": (dict(topk_idx=None), ValueError, "topk_idx is needed"),
    "float ids": (dict(topk_idx=ids().float()), ValueError, "topk_idx must be int64 or int32"),
    "ids shape": (dict(topk_idx=ids(3)), ValueError, r"topk_idx must be \[4, 2\]"),
    "id too large": (dict(topk_idx=TOO_LARGE), ValueError, r"topk_idx\[1, 1\] is 8"),
    "id too small": (dict(topk_idx=ids(value=-2)), ValueError, r"topk_idx\[0, 0\] is -2"),
    "huge id": (dict(topk_idx=ids(value=2**62)), ValueError, r"is 4611686018427387904"),
    "weights dtype": (dict(topk_weights=ids()), ValueError, "topk_weights must be of a floating type"),
    "weights shape": (dict(topk_weights=torch.ones(4, 3)), ValueError, r"topk_weights must be \[4, 2\]"),
    "layout": (dict(layout="token"), ValueError, 'layout must be "rank", "expert" or "batched"'),
    "align": (dict(layout="expert", align=0), ValueError, "align must be a positive int"),
    "align of True": (dict(layout="expert", align=True), TypeError, "align must be an int, got True"),
    "align of text": (dict(layout="expert", align="8"), TypeError, "align must be an int, got '8'"),
    **{
        f"align of {n:.0e}": (dict(layout="expert", align=n), ValueError, "align must be a positive int")
        for n in (2**17, 2**40, 2**62, 2**70)
    },
    "nothing as layout": (dict(layout=0), ValueError, 'layout must be "rank", "expert" or "batched", got 0'),
    "tensor as layout": (dict(layout=rows()), ValueError, 'layout must be .*"batched", got tensor'),
    "number as layout": (dict(layout=3), ValueError, 'layout must be "rank", "expert" or "batched", got 3'),
    "text as flag": (dict(async_op="yes"), TypeError, "async_op must be True or False, got 'yes'"),
    "number as flag": (dict(zero_copy=2), TypeError, "zero_copy must be True or False, got 2"),
    "event": (dict(previous_event="x"), TypeError, "previous_event must be an event .*, got str"),
    "pair as event": (dict(previous_event=(rows(), None)), TypeError, "previous_event .*, got tuple"),
    "overflow": (dict(overflow="wrap"), ValueError, 'overflow must be "error" or "drop"'),
    "handle": (dict(handle=3), TypeError, "handle must be a Dispatched.handle, got int"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_DISPATCH)
def test_dispatch_refuses(device, name):
    arguments, error, text = BAD_DISPATCH[name]

    def rank_main(rank):
        with ExpertParallel(**CONFIG) as ep:
            good = on(device, {"x": rows(), "topk_idx": ids()})
            with pytest.raises(error, match=text):
                ep.dispatch(**{**good, **on(device, arguments)})
            d = ep.dispatch(**good)  # nothing was sent: the ranks are still in step
            assert torch.equal(ep.combine(d.x, d.handle), good["x"])

    commlib.run_ranks(rank_main, 2, device=device)


BAD_COMBINE = {
    "dtype": (dict(y=rows(dtype=torch.float64)), ValueError, "y must be torch.float32"),
    "no sum": (dict(y=rows(dtype=torch.int32)), ValueError, "y must be of a floating type that"),
    "rows": (dict(y=rows(3)), ValueError, "y must have 4 rows, got 3"),
    "weights": (dict(weights=torch.ones(3)), ValueError, r"weights must be \[4\]"),
    "weights of places": (dict(weights=torch.ones(4, 2)), ValueError, r"got \[4, 2\]: .* layout=\"expert\""),
    "bias": (dict(bias=rows(5)), ValueError, "bias must have 4 rows"),
    "out": (dict(out=rows(5)), ValueError, "out must have 4 rows"),
    "out strides": (dict(out=torch.empty(4, 128)[:, ::2]), ValueError, "out must lie side|side by side"),
    "handle": (dict(handle=None), TypeError, "handle must be a Dispatched.handle"),
    "flag": (dict(async_op="yes"), TypeError, "async_op must be True or False"),
    "event": (dict(previous_event=3), TypeError, "previous_event must be an event"),
    "out wants a gradient": (dict(out=rows().requires_grad_()), ValueError, "out= is not differentiable"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_COMBINE)
def test_combine_refuses(device, name):
    arguments, error, text = BAD_COMBINE[name]

    def rank_main(rank):
        with ExpertParallel(**CONFIG) as ep:
            d = ep.dispatch(rows(device=device), ids(device=device))
            good = {"y": rows(device=device), "handle": d.handle}
            with pytest.raises(error, match=text):
                ep.combine(**{**good, **on(device, arguments)})
            assert torch.equal(ep.combine(d.x, d.handle), good["y"])

    commlib.run_ranks(rank_main, 1, device=device)


def test_out_shares_no_memory_with_what_is_read(device):
    with ExpertParallel(**CONFIG, device=device) as ep:
        idx = torch.tensor([[0, -1]] * 4, device=device)
        d = ep.dispatch(rows(device=device), idx, layout="expert")
        memory = torch.ones(8 * 64, device=device)
        whole = memory.view(8, 64)
        for shift in (0, 1, 4 * 64 - 1):
            out = memory[shift : shift + 4 * 64].view(4, 64)
            for name in ("y", "bias"):
                inputs = {"y": d.x, "handle": d.handle, name: whole[:4]}
                with pytest.raises(ValueError, match=f"out shares memory with {name}"):
                    ep.combine(**inputs, out=out)
        with pytest.raises(ValueError, match="out shares memory with weights"):
            ep.combine(d.x, d.handle, weights=memory[:4], out=whole[:4])
        assert torch.equal(ep.combine(whole[:4], d.handle, out=whole[4:]), rows(device=device))


def test_numbers_of_numpy_are_numbers(device):
    with ExpertParallel(**CONFIG, device=device) as ep:
        x = rows(device=device)
        flags = dict(zero_copy=np.bool_(False), async_op=np.bool_(True))
        d = ep.dispatch(x, ids(device=device), layout="expert", align=np.int64(8), **flags)
        d.wait_expert(np.int32(0))
        assert d.finish().x.shape == (8, 64)
        for bad in ("a", None, 0.0, True):
            with pytest.raises(TypeError, match="expert must be an int"):
                d.wait_expert(bad)


BAD_ROUTING = {
    "ids": (0, lambda t: t[:3]),
    "type of ids": (0, lambda t: t.int()),
    "routes": (1, lambda t: t[:, :0]),
    "gaps": (1, lambda t: t.new_zeros(4, 2)[:, :1]),
    "local": (2, lambda t: t.new_zeros(5, 1)),
    "sources": (3, lambda t: t[:-1]),
    "groups": (4, lambda t: t[:-1]),
}


@pytest.mark.parametrize("name", BAD_ROUTING)
def test_ops_called_by_themselves_refuse_what_does_not_fit(device, name):
    place, change = BAD_ROUTING[name]
    with ExpertParallel(**CONFIG, device=device) as ep:
        x = rows(device=device)
        d = ep.dispatch(x, ids(device=device))
        routing = list(d.handle._plan[:-1])
        routing[place] = change(routing[place])
        for op, rest in (
            (torch.ops.commlib.combine, ()),
            (torch.ops.commlib.redispatch, (False, None, None, None, 0)),
        ):
            inputs = (x, None, None, None) if op == torch.ops.commlib.combine else (x, None)
            with pytest.raises(ValueError, match=r"not the routing of a dispatch|must have 3 rows"):
                op(*inputs, *routing, False, *rest)
        assert torch.equal(ep.combine(d.x, d.handle), x)


@pytest.mark.parametrize("route", [5 << 32, 10**6, -7, 1 << 62])
def test_routes_that_are_no_rows_are_refused_before_memory_of_other_ranks_is_touched(route):
    with ExpertParallel(**CONFIG, device="cpu") as ep:
        x = rows()
        d = ep.dispatch(x, ids())
        routing = d.handle._plan
        routes = routing.routes.clone()
        routes[2, 0] = route
        changed = routing._replace(routes=routes)
        with pytest.raises(ValueError, match=rf"routes\[2, 0\] is {route}, which is no row of any rank"):
            torch.ops.commlib.combine(x, None, None, None, *changed[:-1], False)
        with pytest.raises(ValueError, match="no row of any rank"):
            torch.ops.commlib.redispatch(x, None, *changed[:-1], False, False, None, None, None, 0)
        assert torch.equal(ep.combine(d.x, d.handle), x)


def test_ops_called_by_themselves_check_as_dispatch_does(device):
    with ExpertParallel(**CONFIG, device=device) as ep:
        x, idx, name = rows(device=device), ids(device=device), ep._name
        options = (False, 1, False, False, None, 0, 0, 0, 0, 0, False, 0)
        for change, text in (
            (dict(x=x.double()), "x must be torch.float32"),
            (dict(x=x[:, :32]), r"x must be \[rows, 64\]"),
            (dict(idx=idx.int()), "topk_idx must be torch.int64"),
            (dict(idx=idx.t().contiguous().t()), "topk_idx must be contiguous"),
            (dict(weights=torch.ones(4, device=device)), r"topk_weights must be \[4, 2\]"),
            (dict(sizes=(2, 8)), "width and experts"),
            (dict(options=(True, 2**40, *options[2:])), "align must be"),
        ):
            given = dict(x=x, idx=idx, weights=None, sizes=ep._sizes, options=options) | change
            with pytest.raises(ValueError, match=text):
                torch.ops.commlib.dispatch(
                    *(given["x"], given["idx"], given["weights"], name, *given["sizes"], *given["options"])
                )
        with pytest.raises(commlib.CommError, match="no communicator number 123456789"):
            torch.ops.commlib.dispatch(x, idx, None, torch.tensor(123456789), *ep._sizes, *options)
        d = ep.dispatch(x, idx)
        assert torch.equal(ep.combine(d.x, d.handle), x)


def test_the_routing_is_the_librarys_own(device):
    """Whatever the program does with its tensors later, a handle keeps the first routing."""
    idx, weights = torch.tensor([[0, 7]] * 4, device=device), torch.rand(4, 2, device=device)

    def rank_main(rank):
        with ExpertParallel(**CONFIG) as ep:
            for layout in ("rank", "expert"):
                mine = idx.clone()
                x = rows(device=device).requires_grad_()
                d = ep.dispatch(x, mine, weights, layout=layout, align=8)
                kept = [t.clone() for t in (d.x, d.topk_weights, d.tokens_per_expert)]
                mine.copy_(idx.flip(1))
                d.tokens_per_expert.neg_().sub_(10**7)
                if layout == "expert":
                    d.offsets.add_(10**7)
                again = ep.dispatch(x, None, weights, handle=d.handle)
                for got, want in zip(
                    (again.x, again.topk_weights, again.tokens_per_expert), kept, strict=True
                ):
                    assert torch.equal(got, want)
                again.tokens_per_expert.zero_()
                third = ep.dispatch(x, idx, weights, handle=d.handle)  # compares with the first ids
                assert torch.equal(third.tokens_per_expert, kept[2])
                ep.combine(d.x, d.handle).sum().backward()
                assert torch.equal(x.grad, ep.combine(torch.ones_like(d.x), d.handle))

    commlib.run_ranks(rank_main, 2, device=device)


def test_handles_that_cannot_be_used(device):
    x, idx = rows(device=device), ids(device=device)

    def rank_main(rank):
        with ExpertParallel(**CONFIG) as ep, ExpertParallel(**CONFIG) as other:
            d = ep.dispatch(x, idx)
            with pytest.raises(commlib.HandleError, match="another communicator"):
                other.combine(d.x, d.handle)
            with pytest.raises(ValueError, match="x has 3 rows, but the handle's dispatch had 4"):
                ep.dispatch(x[:3], handle=d.handle)
            with pytest.raises(ValueError, match='layout is "rank"'):
                ep.dispatch(x, handle=d.handle, layout="expert")
            with pytest.raises(TypeError, match="align must be an int"):
                ep.dispatch(x, handle=d.handle, align="no")
            if device == "cpu":  # on a GPU the host would have to wait to compare values
                with pytest.raises(ValueError, match="topk_idx differs"):
                    ep.dispatch(x, idx + 1, handle=d.handle)
            with pytest.raises(ValueError, match="topk_idx differs"):
                ep.dispatch(x, idx[:, :1], handle=d.handle)
            copied = copy.deepcopy(d.handle)
            d.handle.release()
            d.handle.release()
            assert torch.equal(ep.combine(d.x, copied), ep.combine(d.x, copy.copy(copied)))
            for use in (
                lambda: ep.combine(d.x, d.handle),
                lambda: ep.dispatch(x, handle=d.handle),
                lambda: ep.combine_buffer(d.handle),
            ):
                with pytest.raises(commlib.HandleError, match="released"):
                    use()

    commlib.run_ranks(rank_main, 2, device=device)


def test_slots_run_out_with_an_error_and_come_back(device):
    world = make_world([5, 4], device=device)

    def rank_main(rank):
        config = {**world.config(), "slots": 2}
        with ExpertParallel(**config) as ep:
            inputs = (world.x[rank], world.topk_idx[rank])
            held = [ep.dispatch(*inputs, zero_copy=True) for _ in range(2)]
            with pytest.raises(commlib.HandleError, match="all 2 slots are in use"):
                ep.dispatch(*inputs, zero_copy=True)
            del held[0]
            again = ep.dispatch(*inputs, zero_copy=True)
            assert torch.equal(again.x.cpu(), expected_rank_layout(world, rank).x)

    commlib.run_ranks(rank_main, 2, device=device)


def test_a_lent_buffer_serves_one_combine(device):
    x, idx = rows(device=device), torch.tensor([[0, 7]] * 4, device=device)

    def rank_main(rank):
        with ExpertParallel(**CONFIG) as ep:
            d = ep.dispatch(x, idx)
            y = ep.combine_buffer(d.handle).copy_(d.x)
            ep.combine(y, d.handle)
            with pytest.raises(commlib.HandleError, match="ask for a new one"):
                ep.combine(y, d.handle)
            with pytest.raises(ValueError, match="out lies in the communicator's own memory"):
                ep.combine(d.x.clone(), d.handle, out=y[:4])  # other ranks may still read it
            d = ep.dispatch(x, idx, layout="expert")
            y = ep.combine_buffer(d.handle).copy_(d.x)
            ep.combine(y, d.handle)
            with pytest.raises(commlib.HandleError, match="ask for a new one"):
                ep.combine(y, d.handle)

    commlib.run_ranks(rank_main, 2, device=device)


def test_zero_copy_rows_outlive_the_communicator(device):
    x, idx = rows(device=device), ids(device=device)

    def rank_main(rank):
        with ExpertParallel(**CONFIG) as ep:
            d = ep.dispatch(x * (rank + 1), idx, zero_copy=True)
        del ep
        return d.x

    first, _ = commlib.run_ranks(rank_main, 2, device=device)
    assert torch.equal(first, torch.cat([x, 2 * x]))


BAD_CONFIG = {
    "experts": (dict(num_experts=0), ValueError, "num_experts must lie in"),
    "topk": (dict(topk=33, num_experts=64), ValueError, r"topk must lie in \[1, 32\], got 33"),
    "topk over experts": (dict(topk=9), ValueError, r"topk must lie in \[1, 8\], got 9"),
    "float": (dict(hidden=64.0), TypeError, "hidden must be an int, got 64.0"),
    "dtype": (dict(dtype=torch.int8), ValueError, "dtype must be bfloat16"),
    "device": (dict(device="meta"), ValueError, "device must be"),
    "slots": (dict(slots=256), ValueError, "slots must lie in"),
    "num_sms": (dict(num_sms=0), ValueError, "num_sms must lie in"),
    "capacity": (dict(capacity=0), ValueError, "capacity must lie in"),
    "timeout": (dict(timeout=0.0), ValueError, "timeout must be a positive number"),
    "group": (dict(group="world"), TypeError, "group must be a commlib.Group"),
}


@pytest.mark.parametrize("name", BAD_CONFIG)
def test_construction_refuses(name):
    arguments, error, text = BAD_CONFIG[name]
    with pytest.raises(error, match=text):
        ExpertParallel(**{**CONFIG, "device": "cpu", **arguments})


def test_a_rank_that_cannot_start_is_named_to_the_others(device):
    def rank_main(rank):
        topk = 0 if rank == 1 else 2
        with pytest.raises((commlib.CommError, ValueError)) as caught:
            ExpertParallel(**{**CONFIG, "topk": topk})
        return str(caught.value)

    texts = commlib.run_ranks(rank_main, 3, device=device)
    assert "topk must lie in [1, 8], got 0" in texts[1]
    assert texts[0] == texts[2] == f"rank 1 could not start: ValueError: {texts[1]}"


def test_ranks_that_disagree_are_told_which_rank_says_what(device):
    def rank_main(rank):
        config = {**CONFIG, "hidden": 64 + 64 * (rank == 2), "topk": 1 + (rank == 0)}
        with pytest.raises(commlib.ConfigMismatch) as caught:
            ExpertParallel(**config)
        return str(caught.value)

    for text in commlib.run_ranks(rank_main, 3, device=device):
        assert "hidden is 64 on rank 0, 1, 128 on rank 2" in text
        assert "topk is 2 on rank 0, 1 on rank 1, 2" in text


def test_closing(device):
    ep = ExpertParallel(**CONFIG, device=device)
    ep.close()
    ep.close()
    with pytest.raises(commlib.CommError, match="closed"):
        ep.dispatch(rows(device=device), ids(device=device))


def test_timeout_can_be_changed_but_not_to_nonsense(device):
    with ExpertParallel(**CONFIG, device=device) as ep:
        ep.timeout = 1.5
        assert ep.timeout == 1.5
        for bad in (0, -1.0, float("nan"), float("inf"), 10**400):
            with pytest.raises(ValueError, match="positive"):
                ep.timeout = bad
