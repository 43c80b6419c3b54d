"""Bounded dispatches: results of one size, no host that waits for counts, and the rows and bits of others."""

import time

import pytest
import torch
from exchange import check, relaxed, unbounded, worlds
from hypothesis import given
from hypothesis import strategies as st
from reference import expected_expert_layout, expected_rank_layout, make_world

import commlib
from commlib import CapacityExceeded, ExpertParallel

LAYOUTS = ("rank", "expert", "batched")
WAYS = ("direct", "once")


def check_rest(d):
    """What says that rows are none."""
    torch.testing.assert_close(d.source[..., 0] < 0, d.source[..., 1] < 0)
    padding = d.source[..., 0] < 0
    assert (d.topk_weights[padding] == 0).all()
    if d.topk_idx is not None:
        assert (d.topk_idx[padding] == -1).all()


@relaxed
@given(worlds(), st.sampled_from(LAYOUTS), st.sampled_from(WAYS), st.integers(1, 2), st.sampled_from([1, 4]))
def test_rows_are_those_of_a_dispatch_that_is_not_bounded(device, world, layout, way, num_sms, align):
    world = world.to(device)

    def rank_main(rank):
        given = world.x[rank], world.topk_idx[rank], world.topk_weights[rank]
        with ExpertParallel(grouping=way, num_sms=num_sms, **world.config()) as ep:
            d = ep.dispatch(*given, layout=layout, align=align, bounded=True)
            ep.synchronize()
            check_rest(d)
            assert int(d.dropped) == 0
            sizes = d.tokens_per_expert.tolist() if layout == "batched" else None
            want = (
                expected_rank_layout(world, rank)
                if layout == "rank"
                else expected_expert_layout(world, rank, 1 if layout == "batched" else align)
            )
            check(unbounded(d, sizes), want)
            assert d.x.shape[: d.x.dim() - 1] == d.source.shape[:-1]

    commlib.run_ranks(rank_main, world.size, device=device)


def layer(ep, world, rank, layout, bounded, values="slot"):
    """Dispatch, experts, combine, and all gradients; "batched" has "expert" to compare with."""
    x = world.x[rank].clone().requires_grad_()
    weights = world.topk_weights[rank].clone().requires_grad_()
    exact = "expert" if layout == "batched" else layout
    d = ep.dispatch(
        x, world.topk_idx[rank], weights, layout=layout if bounded else exact, align=4, bounded=bounded
    )
    y = torch.tanh(d.x * (1 + rank))
    if layout == "rank":
        y = y * d.topk_weights.sum(-1, keepdim=True).to(y.dtype)
        out = ep.combine(y, d.handle)
    else:
        out = ep.combine(y, d.handle, weights=d.topk_weights)
    out.pow(2).sum().backward()
    with torch.no_grad():
        lent = (
            ep.combine_buffer(d.handle)
            if layout == "rank" or ep._comm.can_group_in_slot(d.handle.num_rows)
            else y
        )
        lent.copy_(y)
        again = ep.combine(lent, d.handle, weights=None if layout == "rank" else d.topk_weights)
        rows = ep.dispatch(x, None, weights, handle=d.handle, zero_copy=False)
        back = ep.combine(rows.x, rows.handle)
    return [t.detach().clone() for t in (out, x.grad, weights.grad, again, back)]


@relaxed
@given(worlds(), st.sampled_from(LAYOUTS), st.sampled_from(WAYS), st.integers(1, 2))
def test_sums_and_gradients_have_the_same_bits(device, world, layout, way, num_sms):
    world = world.to(device)

    def rank_main(rank):
        with ExpertParallel(grouping=way, num_sms=num_sms, **world.config()) as ep:
            return [layer(ep, world, rank, layout, bounded) for bounded in (False, True)]

    for exact, bounded in commlib.run_ranks(rank_main, world.size, device=device):
        for got, want in zip(bounded, exact, strict=True):
            assert torch.equal(got, want)


def crowded(device="cpu"):
    """Three ranks, six experts; all tokens go to rank 1's, more to the first of them."""
    world = make_world([8, 8, 8], num_experts=6, topk=2, hidden=32, seed=3, device=device)
    for idx in world.topk_idx:
        idx[:6] = torch.tensor([2, -1], device=device)
        idx[6:] = torch.tensor([3, 2], device=device)
    return world


def test_unique_rows_past_capacity_are_left_out(device):
    world = crowded(device)

    def rank_main(rank):
        with ExpertParallel(capacity=15, **world.config()) as ep:
            given = world.x[rank], world.topk_idx[rank], world.topk_weights[rank]
            exact = ep.dispatch(*given, overflow="drop")
            d = ep.dispatch(*given, overflow="drop", bounded=True)
            ep.synchronize()
            assert d.x.shape == (15, 32)
            assert int(d.dropped) == (9 if rank == 1 else 0)
            rows = unbounded(d)
            for name in ("x", "topk_idx", "topk_weights", "source", "tokens_per_expert"):
                assert torch.equal(getattr(rows, name), getattr(exact, name)), name
            assert torch.equal(ep.combine(d.x, d.handle), ep.combine(exact.x, exact.handle))

    commlib.run_ranks(rank_main, 3, device=device)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("layout", ["expert", "batched"])
def test_rows_of_experts_are_left_out_evenly(device, way, layout):
    world = crowded(device)  # rank 1: 24 rows of its first expert, 6 of its second one
    bound = {"expert": {"max_grouped_rows": 16}, "batched": {"rows_per_expert": 9}}[layout]
    kept = {"expert": [10, 6], "batched": [9, 6]}[layout]

    def rank_main(rank):
        with ExpertParallel(grouping=way, **bound, **world.config()) as ep:
            given = world.x[rank], world.topk_idx[rank], world.topk_weights[rank]
            d = ep.dispatch(*given, layout=layout, overflow="drop", bounded=True)
            ep.synchronize()
            counts = d.tokens_per_expert.tolist()
            assert counts == (kept if rank == 1 else [0, 0])
            assert int(d.dropped) == (30 - sum(kept) if rank == 1 else 0)
            full = expected_expert_layout(world, rank, 1)
            rows = unbounded(d, counts if layout == "batched" else None)
            begins = full.offsets[:-1]
            of_full = torch.cat([torch.arange(b, b + n) for b, n in zip(begins, counts, strict=True)])
            assert torch.equal(rows.x.cpu(), full.x[of_full])
            assert torch.equal(rows.source.cpu(), full.source[of_full])
            out = ep.combine(d.x, d.handle, weights=d.topk_weights)
            return out.cpu(), rows.source.cpu(), rows.topk_weights.cpu(), rows.x.cpu()

    results = commlib.run_ranks(rank_main, 3, device=device)
    sums = [torch.zeros_like(out) for out, *_ in results]
    for _, source, weights, x in results:
        for (rank, token), weight, row in zip(source.tolist(), weights, x, strict=True):
            sums[rank][token] += weight * row
    for (out, *_), want in zip(results, sums, strict=True):
        torch.testing.assert_close(out, want)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_had_no_room_is_told_by_a_later_call(device, layout):
    world = crowded(device)
    bounds = {"rank": {"capacity": 15}, "expert": {"max_grouped_rows": 16}, "batched": {"rows_per_expert": 9}}

    def rank_main(rank):
        with ExpertParallel(**bounds[layout], **world.config()) as ep:
            given = world.x[rank], world.topk_idx[rank]
            if rank != 1:
                ep.dispatch(*given, layout=layout, bounded=True)
                ep.synchronize()
            else:
                with pytest.raises(CapacityExceeded, match=r"no room for (9|14|15) of the (24|30) rows"):
                    ep.dispatch(*given, layout=layout, bounded=True)
                    ep.synchronize()
            d = ep.dispatch(*given, layout=layout, bounded=True, overflow="drop")  # told once; all goes on
            ep.synchronize()
            return int(d.dropped)

    assert commlib.run_ranks(rank_main, 3, device=device)[1] in (9, 14, 15)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("bad", [-2, 6, 2**40])
def test_an_id_out_of_range_is_left_out_and_told(device, layout, bad):
    world = make_world([4, 4], num_experts=6, topk=2, device=device)
    world.topk_idx[0][2, 1] = bad
    clean = make_world([4, 4], num_experts=6, topk=2, device=device)
    clean.topk_idx[0][2, 1] = -1

    def rank_main(rank):
        with ExpertParallel(**world.config()) as ep:

            def given(w):
                return w.x[rank], w.topk_idx[rank], w.topk_weights[rank]

            if rank == 0:
                with pytest.raises(
                    ValueError, match=rf"topk_idx\[2, 1\] is {bad}; expert ids lie in \[0, 6\)"
                ):
                    ep.dispatch(*given(world), layout=layout, bounded=True)
                    ep.synchronize()
            else:
                d = ep.dispatch(*given(world), layout=layout, bounded=True)
                want = ep_rows(ep, d)
            again = ep.dispatch(*given(clean), layout=layout, bounded=True)
            if rank == 1:
                for got, wanted in zip(ep_rows(ep, again), want, strict=True):
                    assert torch.equal(got, wanted)
            ep.synchronize()

    commlib.run_ranks(rank_main, 2, device=device)


def ep_rows(ep, d):
    ep.synchronize()
    sizes = d.tokens_per_expert.tolist() if d.handle.layout == "batched" else None
    rows = unbounded(d, sizes)
    return rows.x.clone(), rows.source, rows.tokens_per_expert.clone()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("layout", ["expert", "batched"])
@pytest.mark.parametrize("align", [1, 8])
def test_tokens_that_name_an_expert_twice_stay_in_their_room(device, layout, way, align):
    world = make_world([16, 16], num_experts=2, topk=2, hidden=32, device=device)
    for idx in world.topk_idx:
        idx[:] = 0

    def rank_main(rank):
        with ExpertParallel(grouping=way, **world.config()) as ep:
            given = world.x[rank], world.topk_idx[rank], world.topk_weights[rank]
            d = ep.dispatch(*given, layout=layout, bounded=True, overflow="drop", align=align)
            out = ep.combine(d.x, d.handle, weights=d.topk_weights)
            ep.synchronize()
            counts, dropped = d.tokens_per_expert.tolist(), int(d.dropped)
            assert sum(counts) + dropped == (64 if rank == 0 else 0)
            assert sum(counts) == (32 if rank == 0 else 0)
            return out.isfinite().all()

    assert all(commlib.run_ranks(rank_main, 2, device=device))


@pytest.mark.parametrize("asynchronous", [False, True])
def test_results_may_be_written(device, asynchronous):
    world = make_world([6, 5], num_experts=4, topk=2, device=device)

    def rank_main(rank):
        with ExpertParallel(**world.config()) as ep:
            given = world.x[rank], world.topk_idx[rank], world.topk_weights[rank]
            d = ep.dispatch(*given, layout="expert", bounded=True, async_op=asynchronous).finish()
            again = ep.dispatch(world.x[rank], None, world.topk_weights[rank], handle=d.handle)
            want = ep.combine(d.x, d.handle)
            for counts in (d.num_rows, d.dropped, d.offsets, d.tokens_per_expert, again.offsets):
                counts.fill_(10**9)
            assert torch.equal(ep.combine(d.x, d.handle), want)
            once_more = ep.dispatch(world.x[rank], None, world.topk_weights[rank], handle=d.handle)
            assert torch.equal(once_more.topk_weights, again.topk_weights)

    commlib.run_ranks(rank_main, 2, device=device)


def test_rows_in_a_slot_that_are_too_many_for_groups_are_copied(device):
    """Rows of layout "rank" may lie in a slot that has no room for as many grouped ones."""
    world = make_world([8, 8], num_experts=4, topk=2, device=device)

    def rank_main(rank):
        options = dict(grouping="direct", max_grouped_rows=8, rows_per_expert=8)
        with ExpertParallel(**options, **world.config()) as ep:
            given = world.x[rank], world.topk_idx[rank], world.topk_weights[rank]
            d = ep.dispatch(*given, layout="batched", bounded=True, overflow="drop")
            other = ep.dispatch(*given, layout="rank", bounded=True, zero_copy=True)
            y = torch.randn(16, 64, generator=torch.Generator().manual_seed(rank)).to(device)
            want = ep.combine(y, d.handle, weights=d.topk_weights)
            return torch.equal(ep.combine(other.x.copy_(y), d.handle, weights=d.topk_weights), want)

    assert all(commlib.run_ranks(rank_main, 2, device=device))


def test_an_exception_of_the_users_is_not_hidden_by_an_earlier_bad_id(device):
    world = make_world([4], num_experts=4, topk=2, device=device)
    world.topk_idx[0][0, 0] = 9
    with pytest.raises(KeyError, match="mine"), ExpertParallel(**world.config()) as ep:
        ep.dispatch(world.x[0], world.topk_idx[0], bounded=True)
        raise KeyError("mine")
    with pytest.raises(ValueError, match="is 9; expert ids"), ExpertParallel(**world.config()) as ep:
        ep.dispatch(world.x[0], world.topk_idx[0], bounded=True)


def test_a_call_that_tells_of_trouble_may_be_made_again(device):
    world = make_world([4, 4], num_experts=4, topk=2, device=device)
    world.topk_idx[0][0, 0] = 9

    def rank_main(rank):
        with ExpertParallel(**world.config()) as ep:
            d = ep.dispatch(world.x[rank], world.topk_idx[rank], bounded=True)
            if rank == 0:
                with pytest.raises(ValueError, match="is 9; expert ids"):
                    ep.combine(d.x, d.handle)
            return ep.combine(d.x, d.handle)

    commlib.run_ranks(rank_main, 2, device=device)


def test_no_host_waits_for_a_late_rank(device):
    world = make_world([4, 4], device=device)
    late = 0.5

    def rank_main(rank):
        with ExpertParallel(**world.config()) as ep:
            ep.dispatch(world.x[rank], world.topk_idx[rank], bounded=True)  # kernels are loaded, threads run
            ep.synchronize()
            if rank == 1:
                time.sleep(late)
            begun = time.monotonic()
            d = ep.dispatch(world.x[rank], world.topk_idx[rank], bounded=True, async_op=True)
            y, event = ep.combine(d.x, d.handle, async_op=True)
            took = time.monotonic() - begun
            event.synchronize()
            ep.synchronize()
            return took, time.monotonic() - begun, y

    (took, all_of_it, y), _ = commlib.run_ranks(rank_main, 2, device=device)
    assert took < late / 2 < all_of_it
    assert y.shape == world.x[0].shape


def test_asynchronous_dispatches_are_differentiable(device):
    world = make_world([5, 3], num_experts=6, topk=3, device=device)

    def rank_main(rank):
        results = []
        with ExpertParallel(**world.config()) as ep:
            for asynchronous in (False, True):
                x = world.x[rank].clone().requires_grad_()
                w = world.topk_weights[rank].clone().requires_grad_()
                d = ep.dispatch(
                    x, world.topk_idx[rank], w, layout="batched", bounded=True, async_op=asynchronous
                ).finish()
                out = ep.combine(d.x.sin(), d.handle, weights=d.topk_weights)
                out.sum().backward()
                results.append((out.detach(), x.grad, w.grad))
        return results

    for first, second in commlib.run_ranks(rank_main, 2, device=device):
        for a, b in zip(first, second, strict=True):
            assert torch.equal(a, b)


def test_rows_with_scales_come_in_every_layout(device):
    world = make_world([5, 3, 4], num_experts=6, topk=3, hidden=64, dtype=torch.bfloat16, device=device)

    def rank_main(rank):
        with ExpertParallel(**world.config()) as ep:
            rows = (world.x[rank] * 8).to(torch.int8)
            scales = world.x[rank][:, :2].float().contiguous()
            for layout in LAYOUTS:
                d = ep.dispatch((rows, scales), world.topk_idx[rank], layout=layout, bounded=True)
                ep.synchronize()
                for source in d.source.flatten(0, -2).unique(dim=0).tolist():
                    if source[0] < 0:
                        continue
                    there = (d.source == torch.tensor(source, device=device)).all(-1)
                    sent = world.x[source[0]][source[1]]
                    assert (d.x[there] == (sent * 8).to(torch.int8)).all()
                    assert (d.scales[there] == sent[:2].float()).all()

    commlib.run_ranks(rank_main, 3, device=device)


def test_bounded_and_other_operations_take_turns(device):
    """One order for all, with more operations than a ring of calls has room for."""
    world = make_world([6, 5, 0, 7], num_experts=10, topk=3, device=device)

    def rank_main(rank):
        given = world.x[rank], world.topk_idx[rank], world.topk_weights[rank]
        with ExpertParallel(num_sms=1 + rank % 2, **world.config()) as ep:
            wanted = None
            for i in range(90):
                layout = ("rank", "expert")[i % 2]
                d = ep.dispatch(*given, layout=layout, bounded=i % 3 != 0, async_op=i % 5 == 0)
                d = d.finish()
                if layout == "expert":
                    out = ep.combine(d.x, d.handle, weights=d.topk_weights)
                    wanted = out if wanted is None else wanted
                    assert torch.equal(out, wanted)
                else:
                    ep.combine(d.x, d.handle)

    commlib.run_ranks(rank_main, 4, device=device)


def test_an_exact_dispatch_comes_after_bounded_ones_under_way(device):
    """Its counts would take the place of theirs, which a late rank has not read."""
    world = make_world([6, 5, 7], num_experts=10, topk=3, device=device)

    def rank_main(rank):
        given = world.x[rank], world.topk_idx[rank], world.topk_weights[rank]
        with ExpertParallel(**world.config()) as ep:
            ep.dispatch(*given)
            if rank == 1:
                time.sleep(0.3)
            under_way = [ep.dispatch(*given, bounded=True, async_op=True) for _ in range(2)]
            want = ep.dispatch(*given)
            for d in under_way:
                assert torch.equal(unbounded(d.finish()).x, want.x)

    commlib.run_ranks(rank_main, 3, device=device)


def test_gradients_of_rows_that_are_none_are_zero(device):
    world = make_world([5, 3], num_experts=6, topk=3, device=device)

    def rank_main(rank):
        with ExpertParallel(**world.config()) as ep:
            for layout in LAYOUTS:
                x = world.x[rank].clone().requires_grad_()
                d = ep.dispatch(x, world.topk_idx[rank], layout=layout, bounded=True)
                padding = d.source[..., 0] < 0
                assert padding.any()
                assert (d.x[padding] == 0).all()
                y = d.x.detach().clone().requires_grad_()
                ep.combine(y, d.handle).sum().backward()
                assert (y.grad[padding] == 0).all()
                assert (y.grad[~padding] == 1).all()

    commlib.run_ranks(rank_main, 2, device=device)


def test_ops_refuse_bounds_that_are_not_the_communicators(device):
    world = make_world([6], num_experts=4, topk=2, device=device)
    with ExpertParallel(**world.config()) as ep:
        given = world.x[0], world.topk_idx[0], None, ep._name, *ep._sizes, False, 1, False, False, None
        torch.ops.commlib.dispatch(*given, 6, 6, 0, 0, 0, False, 0)
        with pytest.raises(ValueError, match=r"capacity=600.*but the communicator has.*capacity=6"):
            torch.ops.commlib.dispatch(*given, 600, 600, 0, 0, 0, False, 0)


@pytest.mark.parametrize(
    ("settings", "options", "message"),
    [
        ({}, {"layout": "batched"}, 'layout "batched" has room for .* needs bounded=True'),
        ({"max_tokens": None}, {"bounded": True}, "bounded=True gives results of one size"),
        (
            {"capacity": 3},
            {"bounded": True, "layout": "expert"},
            "all rows that can come, 6, but capacity is 3: .* bound that by max_grouped_rows",
        ),
        (
            {"capacity": 3},
            {"bounded": True, "layout": "batched"},
            "capacity is 3: .* bound that by rows_per_expert",
        ),
        (
            {},
            {"bounded": True, "layout": "expert", "in_waves": True, "async_op": True},
            "in_waves .* goes with neither a handle nor bounded",
        ),
    ],
)
def test_wrong_requests_are_refused(device, settings, options, message):
    world = make_world([6], num_experts=4, topk=2, device=device)
    with (
        ExpertParallel(**(world.config() | settings)) as ep,
        pytest.raises(ValueError, match=message),
    ):
        ep.dispatch(world.x[0], world.topk_idx[0], **options)


def test_wrong_shapes_of_batched_rows_are_refused(device):
    world = make_world([6], num_experts=4, topk=2, device=device)
    with ExpertParallel(rows_per_expert=8, **world.config()) as ep:
        d = ep.dispatch(world.x[0], world.topk_idx[0], layout="batched", bounded=True)
        assert d.x.shape == (4, 8, 64)
        for wrong in (d.x[:3], d.x[:, :7], d.x.flatten(), d.x.flatten(0, 1)[1:]):
            with pytest.raises(ValueError, match="must"):
                ep.combine(wrong, d.handle)
        with pytest.raises(ValueError, match="tells the host no counts"):
            d.handle.counts()
        with pytest.raises(ValueError, match="wait_expert needs layout"):
            d.wait_expert(0)


def test_ranks_that_do_not_agree_say_so(device):
    world = make_world([6, 6], num_experts=4, topk=2, device=device)

    def rank_main(rank):
        with ExpertParallel(**world.config()) as ep, pytest.raises(commlib.CommError, match="bounded"):
            if rank == 0:
                ep.dispatch(world.x[rank], world.topk_idx[rank], bounded=True)
                ep.synchronize()
            else:
                ep.dispatch(world.x[rank], world.topk_idx[rank])

    commlib.run_ranks(rank_main, 2, device=device)
