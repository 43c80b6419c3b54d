"""Asynchronous operations on the communication threads, or on the communication stream."""

import threading
import weakref
from functools import partial
from time import sleep

import pytest
import torch
from exchange import check
from reference import expected_expert_layout, expected_rank_layout, make_world

import commlib
from commlib import ExpertParallel


@pytest.mark.parametrize("num_sms", [1, 3])
@pytest.mark.parametrize("layout", ["rank", "expert"])
def test_an_event_says_when_rows_are_there(device, num_sms, layout):
    worlds = [make_world([30, 17, 4], hidden=256, seed=s, device=device) for s in range(4)]

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

    commlib.run_ranks(rank_main, 3, device=device)


def test_operations_return_before_the_rows_have_moved(device):
    """Rank 1 comes late to the rows: rank 0's call has returned long before."""
    world = make_world([8, 8], device=device)
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

    commlib.run_ranks(rank_main, 2, device=device)


def test_inputs_live_until_the_operation_is_done(device):
    world = make_world([64, 64], hidden=1024, device=device)

    def rank_main(rank):
        with ExpertParallel(**world.config()) as ep:
            for _ in range(20):
                d = ep.dispatch(world.x[rank].clone(), world.topk_idx[rank].clone(), async_op=True)
                noise = [torch.full((64, 1024), float("nan"), device=device) for _ in range(4)]
                d.event.wait()
                assert torch.equal(d.x.cpu(), expected_rank_layout(world, rank).x)
                del noise

    commlib.run_ranks(rank_main, 2, device=device)


def slow(world):
    """A communicator whose rows take 2 ms each, so that what follows a call comes in the middle of it."""
    return ExpertParallel(link_gbps=world.hidden * 4 / 0.002 / 1e9, num_sms=2, **world.config())


def overwrite_what_was_freed(tensor):
    return [torch.full_like(tensor, 7) for _ in range(40)]


@pytest.mark.parametrize(
    "options", [{"layout": "rank"}, {"layout": "expert"}, {"layout": "expert", "in_waves": True}]
)
def test_an_operation_keeps_its_inputs_whatever_becomes_of_its_event(device, options):
    world = make_world([64, 40], hidden=64, device=device)
    wanted = expected_rank_layout if options["layout"] == "rank" else partial(expected_expert_layout, align=1)

    def rank_main(rank):
        x, idx, weights = world.x[rank], world.topk_idx[rank], world.topk_weights[rank]
        with slow(world) as ep:
            d = ep.dispatch(x.clone(), idx.clone(), weights.clone(), async_op=True, **options)
            rows, row_weights, handle = d.x, d.topk_weights, d.handle
            del d
            junk = overwrite_what_was_freed(x)
            again = ep.dispatch(x.clone(), None, weights.clone(), handle=handle, async_op=True)
            rows_again = again.x
            del again
            junk += overwrite_what_was_freed(x)
            y = torch.arange(rows.numel(), device=device).to(rows.dtype).view_as(rows)
            out, event = ep.combine(y.clone(), handle, async_op=True)
            del event
            junk += overwrite_what_was_freed(y)
            ep.synchronize()
            expected = wanted(world, rank)
            assert torch.equal(rows.cpu(), expected.x) and torch.equal(rows_again.cpu(), expected.x)
            assert torch.equal(row_weights.cpu(), expected.topk_weights)
            assert torch.equal(out, ep.combine(y, handle))

    commlib.run_ranks(rank_main, 2, device=device)


def test_an_operation_keeps_its_results_whatever_the_program_does():
    """Nothing is written to memory that was given back."""
    world = make_world([64, 40], hidden=64)

    def rank_main(rank):
        with slow(world) as ep:
            for layout in ("rank", "expert"):
                with pytest.raises(ZeroDivisionError):
                    d = ep.dispatch(world.x[rank], world.topk_idx[rank], layout=layout, async_op=True)
                    d = 1 / 0
                del d
                mine = [torch.full((n, 64), 7.0) for n in range(1, 120)]
                ep.synchronize()
                assert all(bool((m == 7).all()) for m in mine)

    commlib.run_ranks(rank_main, 2)


def test_what_an_operation_kept_goes_when_it_is_done():
    world = make_world([8, 8])

    def rank_main(rank):
        with ExpertParallel(**world.config()) as ep:
            x = world.x[rank].clone()
            gone = weakref.ref(x)
            event = ep.dispatch(x, world.topk_idx[rank], async_op=True).event
            del x
            event.wait()
            ep.dispatch(world.x[rank], world.topk_idx[rank], async_op=True).event.wait()  # lets go of it
            return gone() is None

    assert commlib.run_ranks(rank_main, 2) == [True, True]


def test_an_operation_needs_no_more_than_its_inputs_and_results(device):
    """All else that it uses is its own, and lives as long as it does, whether or not its event is kept."""
    world = make_world([64, 40], hidden=64, device=device)

    def rank_main(rank):
        with ExpertParallel(link_gbps=world.hidden * 4 / 0.002 / 1e9, num_sms=1, **world.config()) as ep:
            d = ep.dispatch(
                world.x[rank], world.topk_idx[rank], world.topk_weights[rank], layout="expert", async_op=True
            )
            rows, weights, source, handle = d.x, d.topk_weights, d.source, d.handle
            del d  # and its event
            junk = [torch.full((n,), 7, dtype=torch.int32) for n in range(1, 400)]
            ep.synchronize()
            wanted = expected_expert_layout(world, rank, 1)
            assert torch.equal(rows.cpu(), wanted.x) and torch.equal(source.cpu(), wanted.source)
            assert torch.equal(weights.cpu(), wanted.topk_weights)
            assert torch.equal(ep.dispatch(world.x[rank], handle=handle).x.cpu(), wanted.x)
            del junk

    commlib.run_ranks(rank_main, 2, device=device)


def test_synchronous_and_asynchronous_operations_keep_their_order(device):
    world = make_world([10, 12], device=device)

    def rank_main(rank):
        with ExpertParallel(num_sms=2, **world.config()) as ep:
            for _ in range(30):
                first = ep.dispatch(world.x[rank], world.topk_idx[rank], async_op=True)
                second = ep.dispatch(world.x[rank] * 2, handle=first.handle)
                if device == "cuda":  # there, synchronous means: in the order of the stream
                    torch.cuda.current_stream().synchronize()
                assert first.event.query(), "a later synchronous operation overtook it"
                assert torch.equal(second.x, 2 * first.x)

    commlib.run_ranks(rank_main, 2, device=device)


def test_closing_with_operations_under_way(device):
    world = make_world([50, 50], hidden=512, device=device)

    def rank_main(rank):
        ep = ExpertParallel(**world.config())
        d = ep.dispatch(world.x[rank], world.topk_idx[rank], async_op=True)
        ep.close()
        d.event.wait()
        assert torch.equal(d.x.cpu(), expected_rank_layout(world, rank).x)

    commlib.run_ranks(rank_main, 2, device=device)


def test_a_slot_that_only_ended_operations_hold_is_free(in_processes):
    """On the rank that is early, they end while it looks for a slot."""
    world = make_world([8, 8])

    def main(group):
        with ExpertParallel(group, slots=1, **world.config()) as ep:
            x = world.x[group.rank]
            d = ep.dispatch(x, world.topk_idx[group.rank], zero_copy=True)
            handle, rows = d.handle, d.x.clone()
            sleep(0.3 * group.rank)
            sums = [ep.combine(d.x, handle, async_op=True)[0] for _ in range(5)]
            del d
            sleep(0.3 * group.rank)
            again = ep.dispatch(x * 2, handle=handle)
            ep.synchronize()
            return torch.equal(again.x, rows * 2), all(torch.equal(s, sums[0]) for s in sums)

    assert in_processes(main, 2) == [(True, True)] * 2
