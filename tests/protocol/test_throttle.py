"""A throttled rank: rows take their time, and arrive unchanged."""

import time

import pytest
import torch
from exchange import check
from reference import expected_rank_layout, make_world

import commlib
from commlib import ExpertParallel

BURST_S = 0.0005  # idle time that the throttle may make up for, and ends too near to wait for


def two_way_world(device):
    """Every token goes to both ranks."""
    world = make_world([48, 48], num_experts=2, topk=2, hidden=1024, holes=0.0, device=device)
    for idx in world.topk_idx:
        idx[:] = torch.tensor([0, 1])
    return world


@pytest.mark.parametrize("place", ["owned", "slot"])
def test_rows_take_their_time_and_arrive_the_same(device, place):
    world = two_way_world(device)
    gbps = 0.01
    seconds = 48 * 1024 * 4 / (gbps * 1e9)  # of one way: the rows for the other rank

    def rank_main(rank):
        with ExpertParallel(link_gbps=gbps, **world.config()) as ep:
            ep.group.barrier()
            begin = time.monotonic()
            d = ep.dispatch(world.x[rank], world.topk_idx[rank], world.topk_weights[rank])
            ep.synchronize()
            dispatched = time.monotonic()
            out = ep.combine(d.x if place == "slot" else d.x.clone(), d.handle)
            ep.synchronize()
            return d, out, dispatched - begin, time.monotonic() - dispatched

    for rank, (d, out, *spent) in enumerate(commlib.run_ranks(rank_main, 2, device=device)):
        check(d, expected_rank_layout(world, rank))
        torch.testing.assert_close(out, 2 * world.x[rank])
        assert min(spent) >= seconds - BURST_S


def test_workers_share_one_link(device):
    world = two_way_world(device)
    seconds = 48 * 1024 * 4 / 0.01e9

    def rank_main(rank):
        with ExpertParallel(link_gbps=0.01, num_sms=3, **world.config()) as ep:
            ep.group.barrier()
            begin = time.monotonic()
            ep.dispatch(world.x[rank], world.topk_idx[rank])
            ep.synchronize()
            return time.monotonic() - begin

    assert min(commlib.run_ranks(rank_main, 2, device=device)) >= seconds - BURST_S


def test_rows_for_the_rank_itself_do_not_cross_the_link(device):
    world = make_world([200], hidden=1024, device=device)

    def rank_main(rank):
        with ExpertParallel(link_gbps=1e-6, **world.config()) as ep:  # a kilobyte a second
            d = ep.dispatch(world.x[0], world.topk_idx[0])
            return ep.combine(d.x, d.handle)

    assert commlib.run_ranks(rank_main, 1, device=device)[0].shape == (200, 1024)


@pytest.mark.parametrize("gbps", [0, -1.0, float("nan"), float("inf")])
def test_a_rate_that_is_none_is_refused(gbps):
    with pytest.raises(ValueError, match="link_gbps must be a positive number of GB/s"):
        ExpertParallel(num_experts=2, hidden=8, topk=1, max_tokens=4, device="cpu", link_gbps=gbps)
