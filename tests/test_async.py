"""Asynchronous operations on the communication threads."""

import threading

import pytest
import torch
from reference import expected_rank_layout, make_world
from test_dispatch import check

import commlib
from commlib import ExpertParallel


@pytest.mark.parametrize("num_sms", [1, 3])
@pytest.mark.parametrize("layout", ["rank", "expert"])
def test_an_event_says_when_rows_are_there(num_sms, layout):
    worlds = [make_world([30, 17, 4], hidden=256, seed=s) for s in range(4)]

    def rank_main(rank):
        with ExpertParallel(num_sms=num_sms, **worlds[0].config()) as ep:
            events = []
            for _ in range(10):
                for w in worlds:
                    d = ep.dispatch(
                        w.x[rank],
                        w.topk_idx[rank],
                        w.topk_weights[rank],
                        layout=layout,
                        async_op=True,
                    )
                    out, event = ep.combine(d.x, d.handle, previous_event=d.event, async_op=True)
                    events.append((d, out, event))
                for d, _, event in events:
                    event.wait()
                    event.synchronize()
                    assert event.query() and d.event.query()
                if layout == "rank":
                    for w, (d, _, _) in zip(worlds, events[-4:], strict=True):
                        check(d, expected_rank_layout(w, rank))
                events.clear()

    commlib.run_ranks(rank_main, 3)


def test_operations_return_before_the_rows_have_moved():
    """Rank 1 comes late to the rows: rank 0's call has returned long before."""
    world = make_world([8, 8])
    may_go_on = threading.Event()

    def rank_main(rank):
        with ExpertParallel(**world.config()) as ep:
            d = ep.dispatch(world.x[rank], world.topk_idx[rank])
            if rank == 1:
                assert may_go_on.wait(20)
                return ep.combine(d.x, d.handle)
            out, event = ep.combine(d.x, d.handle, async_op=True)
            assert not event.query()
            may_go_on.set()
            event.wait()
            return out

    commlib.run_ranks(rank_main, 2)


def test_inputs_live_until_the_operation_is_done():
    world = make_world([64, 64], hidden=1024)

    def rank_main(rank):
        with ExpertParallel(**world.config()) as ep:
            for _ in range(20):
                d = ep.dispatch(world.x[rank].clone(), world.topk_idx[rank].clone(), async_op=True)
                noise = [torch.full((64, 1024), float("nan")) for _ in range(4)]
                d.event.wait()
                assert torch.equal(d.x, expected_rank_layout(world, rank).x)
                del noise

    commlib.run_ranks(rank_main, 2)


def test_synchronous_and_asynchronous_operations_keep_their_order():
    world = make_world([10, 12])

    def rank_main(rank):
        with ExpertParallel(num_sms=2, **world.config()) as ep:
            for _ in range(30):
                first = ep.dispatch(world.x[rank], world.topk_idx[rank], async_op=True)
                second = ep.dispatch(world.x[rank] * 2, handle=first.handle)
                assert first.event.query(), "a later synchronous operation overtook it"
                assert torch.equal(second.x, 2 * first.x)

    commlib.run_ranks(rank_main, 2)


def test_closing_with_operations_under_way():
    world = make_world([50, 50], hidden=512)

    def rank_main(rank):
        ep = ExpertParallel(**world.config())
        d = ep.dispatch(world.x[rank], world.topk_idx[rank], async_op=True)
        ep.close()
        d.event.wait()
        assert torch.equal(d.x, expected_rank_layout(world, rank).x)

    commlib.run_ranks(rank_main, 2)
