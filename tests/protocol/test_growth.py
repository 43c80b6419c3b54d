"""Communicators without max_tokens: results are those of one that had it, before and after it grows."""

import copy
import pickle
import threading

import pytest
import torch
from exchange import check, worlds
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reference import expected_rank_layout, make_world

import commlib
from commlib import ExpertParallel
from commlib.nn import MoELayer
from commlib.startup import connect
from commlib.timeline import Timeline


def growing(world, capacity=1, **options):
    return ExpertParallel(**{**world.config(), "max_tokens": None, "capacity": capacity, **options})


def on_ranks(rank_main, world):
    return commlib.run_ranks(rank_main, world.size, device=world.device.type)


def everywhere(world):
    return [expected_rank_layout(world, rank) for rank in range(world.size)]


def same(got, want):
    torch.testing.assert_close(got, want, rtol=0, atol=0)


@given(worlds(), st.sampled_from(["rank", "expert"]), st.integers(1, 20))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_results_are_those_of_a_communicator_that_was_large_enough(world, layout, capacity):
    def round_trip(ep, rank):
        d = ep.dispatch(world.x[rank], world.topk_idx[rank], world.topk_weights[rank], layout=layout)
        y = d.x * 2
        return d, ep.combine(y, d.handle, weights=d.topk_weights if layout == "expert" else None)

    def rank_main(rank):
        with growing(world, capacity) as ep, ExpertParallel(**world.config()) as fixed:
            return [*round_trip(ep, rank), *round_trip(fixed, rank)]

    for got, summed, want, wanted_sum in on_ranks(rank_main, world):
        same(got.x, want.x)
        same(got.topk_weights, want.topk_weights)
        same(got.source, want.source)
        same(summed, wanted_sum)


def test_one_grows_once_for_each_batch_that_does_not_fit(device):
    """And by powers of two, so that few batches do not fit."""
    world = make_world([9, 4, 0], num_experts=5, device=device, holes=0.0)
    wanted = everywhere(world)
    most = max(len(want.x) for want in wanted)

    def rank_main(rank):
        with growing(world, capacity=2) as ep:
            first = ep.dispatch(world.x[rank][:1], world.topk_idx[rank][:1])
            few = ep.stats()["growths"]
            for _ in range(3):
                d = ep.dispatch(world.x[rank], world.topk_idx[rank], world.topk_weights[rank])
            assert len(first.x) <= 2
            return d, few, ep.stats()["growths"], ep.settings.capacity

    for (got, few, grown, capacity), want in zip(on_ranks(rank_main, world), wanted, strict=True):
        check(got, want)
        assert (few, grown) == (0, 1)
        assert most <= capacity < 2 * most and capacity.bit_count() == 1


def test_what_was_dispatched_before_is_combined_and_differentiated_afterwards(device):
    world = make_world([5, 3], num_experts=4, dtype=torch.float32, holes=0.0, device=device)
    idx = world.topk_idx

    def gradients(rank, ep):
        x = world.x[rank].clone().requires_grad_()
        few = ep.dispatch(x[:1], idx[rank][:1])
        kept = ep.dispatch(x[:1].detach(), idx[rank][:1], zero_copy=True)
        in_flight = ep.dispatch(x[:1].detach(), idx[rank][:1], async_op=True)
        many = ep.dispatch(x, idx[rank])
        in_flight.event.wait()
        same(kept.x, few.x.detach())  # in the old heap
        same(in_flight.x, kept.x)
        again = ep.dispatch(x[:1].detach(), handle=few.handle)
        same(again.x, kept.x)
        loss = ep.combine(few.x**2, few.handle).sum() + ep.combine(many.x**3, many.handle).sum()
        loss.backward()
        return x.grad

    def rank_main(rank):
        with growing(world, capacity=2) as ep, ExpertParallel(**world.config()) as fixed:
            got = gradients(rank, ep)
            assert ep.stats()["growths"] == 1
            return got, gradients(rank, fixed)

    for got, want in on_ranks(rank_main, world):
        same(got, want)


def test_a_lent_buffer_of_before_is_summed_like_any_other_tensor(device):
    world = make_world([6, 2], num_experts=4, holes=0.0, device=device)

    def rank_main(rank):
        with growing(world, capacity=2) as ep:
            few = ep.dispatch(world.x[rank][:1], world.topk_idx[rank][:1])
            buffer = ep.combine_buffer(few.handle)
            buffer.copy_(few.x)
            ep.dispatch(world.x[rank], world.topk_idx[rank])
            assert ep.stats()["growths"] == 1
            same(ep.combine(buffer, few.handle), ep.combine(few.x, few.handle))

    on_ranks(rank_main, world)


def test_a_layer_is_compiled_once_and_grows_in_compiled_code():
    def rank_main(rank):
        torch.manual_seed(0)
        options = dict(num_experts=4, topk=2, device="cpu", dtype=torch.float32, hidden=8)
        with ExpertParallel(max_tokens=None, capacity=1, **options) as ep:
            layer = MoELayer(8, 16, 4, 2, ep)
            x = torch.randn(13, 8, generator=torch.Generator().manual_seed(rank))
            out = torch.compile(layer, backend="aot_eager", fullgraph=True)(x)[0]
            return out, layer(x)[0], ep.stats()["growths"]

    torch._dynamo.reset()
    for out, eager, growths in commlib.run_ranks(rank_main, 1):
        torch.testing.assert_close(out, eager)
        assert growths == 1


def test_settings_of_before_stay(device):
    world = make_world([5, 5], num_experts=4, holes=0.0, device=device)

    def rank_main(rank):
        with growing(world) as ep:
            ep.timeout = 77.0
            with Timeline(ep) as timeline:
                d = ep.dispatch(world.x[rank], world.topk_idx[rank])
                ep.combine(d.x, d.handle)
            assert ep.timeout == 77.0 and ep.stats()["growths"] == 1
            return [i.name for i in timeline.intervals]

    for names in on_ranks(rank_main, world):
        assert names == ["dispatch", "combine"]


def test_nothing_is_dropped(device):
    world = make_world([5, 5], num_experts=4, holes=0.0, device=device)

    def rank_main(rank):
        with growing(world) as ep:
            d = ep.dispatch(world.x[rank], world.topk_idx[rank], world.topk_weights[rank], overflow="drop")
            return d, ep.stats()["dropped"]

    for (got, dropped), want in zip(on_ranks(rank_main, world), everywhere(world), strict=True):
        check(got, want)
        assert dropped == 0


def test_more_tokens_than_any_communicator_has_room_for_must_go_somewhere(monkeypatch):
    """All ranks see only rows that arrive; tokens without experts make none."""
    monkeypatch.setattr("commlib.expert_parallel.ANY_TOKENS", 4)
    world = make_world([9, 1], num_experts=4, holes=0.0)
    sparse = world.topk_idx[0].clone()
    sparse[1:] = -1

    def rank_main(rank):
        with growing(world) as ep:
            if rank == 0:
                with pytest.raises(ValueError, match="x has 9 rows, of which 8 go nowhere"):
                    ep.dispatch(world.x[0], sparse)
            return ep.dispatch(world.x[rank], world.topk_idx[rank], world.topk_weights[rank])

    for got, want in zip(on_ranks(rank_main, world), everywhere(world), strict=True):
        check(got, want)


@pytest.mark.parametrize("layout", ["rank", "expert"])
def test_a_routing_serves_rows_of_another_width_and_dtype(device, layout):
    world = make_world([7, 3, 5], num_experts=5, dtype=torch.bfloat16, device=device)
    wide = [
        torch.arange(len(x) * 3, device=device).view(-1, 3).double() + 100 * r for r, x in enumerate(world.x)
    ]

    def rank_main(rank):
        options = dict(hidden=3, dtype=torch.float64)
        with (
            growing(world) as ep,
            growing(world, **options) as other,
            ExpertParallel(**(world.config() | options)) as large_enough,
        ):
            d = ep.dispatch(world.x[rank], world.topk_idx[rank], layout=layout)
            moved = d.handle.on(other)
            rows = other.dispatch(wide[rank], handle=moved)
            assert other.settings.capacity == ep.settings.capacity and moved.layout == layout
            want = large_enough.dispatch(wide[rank], world.topk_idx[rank], layout=layout)
            same(rows.x, want.x)
            same(rows.source, want.source)
            same(other.combine(rows.x, moved), large_enough.combine(want.x, want.handle))
            same(ep.combine(d.x, d.handle), ep.combine(d.x, moved.on(ep)))

    on_ranks(rank_main, world)


def test_a_routing_goes_to_no_communicator_that_it_does_not_fit():
    world = make_world([4, 4], num_experts=4, topk=2, holes=0.0)

    def rank_main(rank):
        with growing(world) as ep, growing(world, topk=3) as wider, growing(world, num_experts=6) as more:
            d = ep.dispatch(world.x[rank], world.topk_idx[rank])
            with pytest.raises(ValueError, match="communicator with topk 2, the other one has 3"):
                d.handle.on(wider)
            with pytest.raises(ValueError, match="communicator with num_experts 4, the other one has 6"):
                d.handle.on(more)
            with (
                ExpertParallel(**(world.config() | {"max_tokens": 1})) as small,
                pytest.raises(ValueError, match=r"capacity=2 and max_tokens=1: make it with as many"),
            ):
                d.handle.on(small)
            with pytest.raises(commlib.HandleError, match=r"handle.on\(ep\)"):
                wider.combine(d.x, d.handle)
            d.handle.release()
            with pytest.raises(commlib.HandleError, match="released"):
                d.handle.on(ep)

    on_ranks(rank_main, world)


def test_the_error_says_how_many_rows_there_would_be():
    world = make_world([6, 5], num_experts=4, holes=0.0)

    def rank_main(rank):
        with ExpertParallel(**(world.config() | {"capacity": 4})) as ep:
            try:
                ep.dispatch(world.x[rank], world.topk_idx[rank])
            except commlib.CapacityExceeded as error:
                return error

    want = [len(expected.x) for expected in everywhere(world)]
    errors = on_ranks(rank_main, world)
    for error in (*errors, pickle.loads(pickle.dumps(errors[0])), copy.copy(errors[0])):
        assert error.rows == max(want) and want[error.receiver] == max(want)


def test_one_that_is_closed_while_it_grows_is_closed():
    """By a signal handler, say, which knows only the old heap."""
    world = make_world([6], num_experts=4, holes=0.0)

    def rank_main(rank):
        ep = growing(world)
        reconnect = ep._comm._reconnect

        def closed_meanwhile(*arguments):
            ep.close()
            return reconnect(*arguments)

        ep._comm._reconnect = closed_meanwhile
        with pytest.raises(commlib.CommError, match="closed this communicator while it took a larger heap"):
            ep.dispatch(world.x[0], world.topk_idx[0])
        with pytest.raises(commlib.CommError, match="closed"):
            ep.dispatch(world.x[0][:1], world.topk_idx[0][:1])

    on_ranks(rank_main, world)


def test_ranks_that_could_not_grow_because_of_another_are_not_blamed(device, monkeypatch):
    """Rank 2 has no memory for a larger heap, which ends rank 1's growth; rank 0 is asked for counts late."""
    world = make_world([6, 5, 4], num_experts=4, holes=0.0, device=device)
    introduce = connect._introduce
    grow = threading.Event()

    def no_memory(talk, *arguments):
        if grow.is_set() and talk.rank == 2:
            raise MemoryError("no memory")
        return introduce(talk, *arguments)

    monkeypatch.setattr(connect, "_introduce", no_memory)

    def rank_main(rank):
        ep = growing(world)
        ep.group.barrier()
        grow.set()
        with pytest.raises((commlib.CommError, MemoryError)) as raised:
            if rank > 0:
                ep._comm.make_room(10**4, tokens=10**4)
            ep.group.barrier()
            ep.dispatch(world.x[rank], world.topk_idx[rank])
            ep.synchronize()
        if rank > 0:
            ep.group.barrier()
        return raised.value

    errors = on_ranks(rank_main, world)
    assert str(errors[1]) == "rank 2 could not take a larger heap: MemoryError: no memory"
    assert errors[1].peers == [2]
    assert isinstance(errors[0], commlib.PeerTimeout) and errors[0].peers == [2]


def grow_in_threads(rank, turns=6):
    """Two communicators at once, each in a thread of its own; ranks come to them in different orders."""
    world = make_world([40, 40], num_experts=4, hidden=8, topk=1, holes=0.0, dtype=torch.float32)
    said = []

    def use(ep, number, turn):
        turn.wait()
        try:
            rows = torch.full((40, 8), 10.0 * rank + number)
            said.append((number, sorted(set(ep.dispatch(rows, world.topk_idx[rank]).x[:, 0].tolist()))))
        except BaseException as error:
            said.append((number, str(error)))

    for _ in range(turns):
        turn = threading.Barrier(2)
        options = dict(timeout=10.0, exclusive=True)
        with growing(world, **options) as first, growing(world, **options) as second:
            order = [(first, 0, turn), (second, 1, turn)]
            threads = [threading.Thread(target=use, args=a) for a in (order if rank else reversed(order))]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert [ep.stats()["growths"] for ep in (first, second)] == [1, 1]
    return sorted(said)


IN_THREADS = sorted(6 * [(0, [0.0, 10.0]), (1, [1.0, 11.0])])


def test_two_that_grow_in_threads_of_a_process_do_not_meet_each_other(torch_ranks):
    """Rows of one once went to the other, unnoticed: ranks numbered growths in the order they came."""
    for said in torch_ranks(grow_in_threads, 2):
        assert said == IN_THREADS


def test_two_that_grow_in_threads_beside_threads_that_are_ranks():
    for said in commlib.run_ranks(grow_in_threads, 2):
        assert said == IN_THREADS
