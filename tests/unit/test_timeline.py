"""A timeline notes what ran, and when."""

import json

import pytest
import torch
from reference import make_world

import commlib
from commlib import ExpertParallel
from commlib.timeline import COMMUNICATION, COMPUTE, Interval, Timeline


def test_operations_and_compute_are_noted_in_order(device, tmp_path):
    world = make_world([6, 9], device=device)

    def rank_main(rank):
        with ExpertParallel(**world.config()) as ep:
            x = world.x[rank].clone().requires_grad_()
            ep.dispatch(x, world.topk_idx[rank])  # before: not noted
            with Timeline(ep) as timeline:
                d = ep.dispatch(x, world.topk_idx[rank], async_op=True).finish()
                with timeline.compute("experts"):
                    y = d.x * 2
                ep.combine(y, d.handle).sum().backward()
            ep.dispatch(x, world.topk_idx[rank])  # after: not noted
            timeline.save_perfetto(tmp_path / f"{rank}.json")
            return timeline.intervals

    for rank, intervals in enumerate(commlib.run_ranks(rank_main, 2, device=device)):
        assert [i.name for i in intervals] == ["dispatch", "experts", "combine", "redispatch", "combine"]
        assert [i.lane == COMPUTE for i in intervals] == [False, True, False, False, False]
        assert all(0 <= i.begin <= i.end < 60 for i in intervals)
        events = json.loads((tmp_path / f"{rank}.json").read_text())["traceEvents"]
        assert [e["name"] for e in events if e["ph"] == "X"] == [i.name for i in intervals]


def test_timelines_of_layers_that_share_a_communicator_do_not_meet(device):
    """Each notes the operations of both, as long as it is open."""
    world = make_world([6, 9], device=device)

    def rank_main(rank):
        with ExpertParallel(**world.config()) as first, ExpertParallel(**world.config()) as second:
            with Timeline(first) as outer:
                with Timeline(second) as inner:
                    d = second.dispatch(world.x[rank], world.topk_idx[rank])
                first.dispatch(world.x[rank], world.topk_idx[rank])
                second.combine(d.x, d.handle)
            assert first._comm.backend.traces == ()
            return [[i.name for i in timeline.intervals] for timeline in (outer, inner)]

    for names in commlib.run_ranks(rank_main, 2, device=device):
        assert names == [["dispatch", "dispatch", "combine"], ["dispatch"]]


def test_busy_counts_no_moment_twice():
    timeline = Timeline.__new__(Timeline)
    timeline.intervals = [
        Interval(COMPUTE, "a", 0.0, 2.0),
        Interval(COMMUNICATION, "b", 1.0, 4.0),
        Interval(COMMUNICATION, "c", 1.5, 3.0),
        Interval(COMPUTE, "d", 3.5, 5.0),
    ]
    assert timeline.busy(COMPUTE) == pytest.approx(3.5)
    assert timeline.busy(COMMUNICATION) == pytest.approx(3.0)
    assert timeline.both_busy() == pytest.approx(1.5)


def test_an_error_inside_is_passed_on_and_nothing_is_noted_afterwards(device):
    world = make_world([3], device=device)

    def rank_main(rank):
        with ExpertParallel(**world.config()) as ep:
            with pytest.raises(KeyError), Timeline(ep) as timeline:
                raise KeyError
            ep.dispatch(world.x[0], world.topk_idx[0])
            return timeline.intervals, torch.is_grad_enabled()

    assert commlib.run_ranks(rank_main, 1, device=device)[0][0] == []
