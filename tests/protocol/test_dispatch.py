"""Dispatch against a plain PyTorch reference."""

import pytest
import torch
from exchange import check, relaxed, worlds
from hypothesis import given
from hypothesis import strategies as st
from reference import World, expected_expert_layout, expected_rank_layout, make_world

import commlib
from commlib import ExpertParallel


def dispatch_everywhere(world: World, num_sms: int = 1, **options):
    """One dispatch on in-process ranks, on the world's device; what each rank got."""

    def rank_main(rank):
        with ExpertParallel(num_sms=num_sms, **world.config()) as ep:
            return ep.dispatch(world.x[rank], world.topk_idx[rank], world.topk_weights[rank], **options)

    return commlib.run_ranks(rank_main, world.size, device=world.device.type)


@relaxed
@given(worlds(), st.booleans(), st.integers(1, 2))
def test_rows_arrive_in_source_then_token_order(device, world, zero_copy, num_sms):
    got = dispatch_everywhere(world.to(device), num_sms, zero_copy=zero_copy)
    for rank in range(world.size):
        check(got[rank], expected_rank_layout(world, rank))


@relaxed
@given(worlds(), st.sampled_from([1, 2, 8]), st.integers(1, 2))
def test_expert_layout_groups_and_pads(device, world, align, num_sms):
    got = dispatch_everywhere(world.to(device), num_sms, layout="expert", align=align)
    for rank in range(world.size):
        check(got[rank], expected_expert_layout(world, rank, align))


def test_results_are_the_same_when_no_slot_can_be_spared(device):
    world = make_world([40, 30], hidden=96, device=device)

    def rank_main(rank):
        with ExpertParallel(slots=2, **world.config()) as ep:
            inputs = (world.x[rank], world.topk_idx[rank], world.topk_weights[rank])
            kept = [ep.dispatch(*inputs) for _ in range(5)]
            assert ep.memory_report().slots_in_use == 0
            return kept

    for rank, results in enumerate(commlib.run_ranks(rank_main, 2, device=device)):
        for got in results:
            check(got, expected_rank_layout(world, rank))


def test_int32_ids_and_rows_that_lie_apart(device):
    world = make_world([9, 4], hidden=32, device=device)

    def rank_main(rank):
        wide = torch.zeros(len(world.x[rank]), 50, device=device)
        wide[:, 8:40] = world.x[rank]
        with ExpertParallel(**world.config()) as ep:
            return ep.dispatch(wide[:, 8:40], world.topk_idx[rank].int(), world.topk_weights[rank])

    for rank, got in enumerate(commlib.run_ranks(rank_main, 2, device=device)):
        check(got, expected_rank_layout(world, rank))


@pytest.mark.parametrize("layout", ["rank", "expert"])
def test_without_weights_none_come(device, layout):
    world = make_world([5, 6], device=device)

    def rank_main(rank):
        with ExpertParallel(**world.config()) as ep:
            d = ep.dispatch(world.x[rank], world.topk_idx[rank], layout=layout)
            assert d.topk_weights is None
            return d.x.clone()

    for rank, rows in enumerate(commlib.run_ranks(rank_main, 2, device=device)):
        want = expected_rank_layout if layout == "rank" else lambda w, r: expected_expert_layout(w, r, 1)
        assert torch.equal(rows.cpu(), want(world, rank).x)


@pytest.mark.parametrize(("layout", "zero_copy"), [("rank", False), ("rank", True), ("expert", False)])
def test_a_handle_routes_other_rows_the_same_way(device, layout, zero_copy):
    world = make_world([11, 0, 7], num_experts=5, topk=3, device=device)
    other = make_world([11, 0, 7], num_experts=5, topk=3, seed=1, device=device)
    other.topk_idx = world.topk_idx

    def rank_main(rank):
        with ExpertParallel(**world.config()) as ep:
            first = ep.dispatch(world.x[rank], world.topk_idx[rank], layout=layout, align=2)
            second = ep.dispatch(
                other.x[rank],
                topk_weights=other.topk_weights[rank],
                handle=first.handle,
                zero_copy=zero_copy,
            )
            assert second.handle is first.handle
            return second

    for rank, got in enumerate(commlib.run_ranks(rank_main, 3, device=device)):
        if layout == "rank":
            check(got, expected_rank_layout(other, rank))
        else:
            check(got, expected_expert_layout(other, rank, 2))


def test_a_thousand_small_dispatches_keep_their_order(device):
    worlds = [make_world([3, 1, 2], hidden=16, seed=s, device=device) for s in range(10)]

    def rank_main(rank):
        with ExpertParallel(**worlds[0].config()) as ep:
            for i in range(300):
                world = worlds[i % 10]
                got = ep.dispatch(world.x[rank], world.topk_idx[rank], world.topk_weights[rank])
                check(got, expected[i % 10][rank])

    expected = [[expected_rank_layout(w, r) for r in range(3)] for w in worlds]
    commlib.run_ranks(rank_main, 3, device=device)


@pytest.mark.parametrize("layout", ["rank", "expert"])
def test_overflow_drops_the_last_rows_and_counts_them(device, layout):
    world = make_world([6, 5], num_experts=4, topk=2, holes=0.0, device=device)
    capacity = 4

    def rank_main(rank):
        config = {**world.config(), "capacity": capacity}
        with ExpertParallel(**config) as ep:
            d = ep.dispatch(
                world.x[rank],
                world.topk_idx[rank],
                world.topk_weights[rank],
                layout=layout,
                overflow="drop",
            )
            y = d.x.clone()
            out = ep.combine(y, d.handle)
            return d, ep.stats()["dropped"], out

    results = commlib.run_ranks(rank_main, 2, device=device)
    unique = [expected_rank_layout(world, r) for r in range(2)]
    kept = {(r, *s) for r in range(2) for s in unique[r].source[:capacity].tolist()}
    assert sum(len(u.x) for u in unique) > len(kept), "nothing overflowed: the test tests nothing"
    for rank, (d, dropped, out) in enumerate(results):
        assert {tuple(s) for s in d.source.tolist()} == {s[1:] for s in kept if s[0] == rank}
        assert d.tokens_per_expert.tolist() == [
            int((unique[rank].topk_idx[:capacity] == e).sum()) for e in range(2)
        ]
        lost = sum(s[0] == rank for r in range(2) for s in unique[r].source[capacity:].tolist())
        assert dropped == lost
        for t in range(len(out)):
            if layout == "rank":
                copies = sum((r, rank, t) in kept for r in range(2))
                torch.testing.assert_close(out[t], copies * world.x[rank][t])


def test_overflow_is_an_error_on_every_rank_and_the_next_call_works(device):
    world = make_world([6, 5], num_experts=4, holes=0.0, device=device)

    def rank_main(rank):
        config = {**world.config(), "capacity": 4}
        with ExpertParallel(**config) as ep:
            with pytest.raises(commlib.CapacityExceeded, match=r"rank \d would receive \d+ rows"):
                ep.dispatch(world.x[rank], world.topk_idx[rank])
            d = ep.dispatch(world.x[rank][:1], world.topk_idx[rank][:1])
            return ep.combine(d.x, d.handle)

    for rank, out in enumerate(commlib.run_ranks(rank_main, 2, device=device)):
        ranks = {e // 2 for e in world.topk_idx[rank][0].tolist()}
        torch.testing.assert_close(out, len(ranks) * world.x[rank][:1])


@pytest.mark.parametrize("layout", ["rank", "expert"])
@pytest.mark.parametrize("async_op", [False, True])
def test_a_handle_knows_its_counts_at_once(device, layout, async_op):
    world = make_world([9, 14], 5, 2, 8, device=device)
    options = {"align": 4} if layout == "expert" else {}

    def rank_main(rank):
        with ExpertParallel(**world.config()) as ep:
            d = ep.dispatch(world.x[rank], world.topk_idx[rank], layout=layout, async_op=async_op, **options)
            counts = d.handle.counts()
            d.finish()
            return counts

    for rank, counts in enumerate(commlib.run_ranks(rank_main, 2, device=device)):
        assert counts == expected_rank_layout(world, rank).tokens_per_expert
