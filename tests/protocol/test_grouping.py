"""Rows that go straight to their places in the groups of their experts: the bits of the other way."""

import pytest
import torch
from exchange import relaxed, worlds
from hypothesis import given
from hypothesis import strategies as st
from reference import make_world

import commlib
from commlib import ExpertParallel

WAYS = ("direct", "once")
# What a rank that lacks room gets: with this little, at most one expert's rows.
LITTLE_ROOM = 8


def round_trip(ep, world, rank, align, y_in):
    """Dispatch, experts and combine of a layer, and the gradients."""
    x = world.x[rank].clone().requires_grad_()
    weights = world.topk_weights[rank].clone().requires_grad_()
    d = ep.dispatch(x, world.topk_idx[rank], weights, layout="expert", align=align)
    y = d.x * (1 + rank)
    out = ep.combine(y, d.handle, weights=d.topk_weights)
    out.pow(2).sum().backward()
    results = [d.x, d.topk_weights, d.source, d.offsets, d.tokens_per_expert, out, x.grad, weights.grad]
    with torch.no_grad():
        again = ep.dispatch(x, None, weights, handle=d.handle)
        results += [again.x.clone(), again.topk_weights]
        if y_in == "buffer" and ep._comm.can_group_in_slot(d.handle.num_rows):
            y = ep.combine_buffer(d.handle).copy_(y)
        elif y_in == "slot":
            y = again.x.copy_(y)
        results += [ep.combine(y, d.handle, weights=d.topk_weights), ep.combine(d.x, d.handle)]
    return [t.detach().clone() for t in results]


@relaxed
@given(
    worlds(),
    st.sampled_from([1, 4, 8]),
    st.integers(1, 2),
    st.sampled_from([None, LITTLE_ROOM]),
    st.lists(st.sampled_from(["owned", "buffer", "slot"]), min_size=8, max_size=8),
)
def test_bits_are_the_same_either_way(device, world, align, num_sms, room, places):
    world = world.to(device)

    def rank_main(rank):
        results = []
        for way in WAYS:
            most = room if way == "direct" else None
            with ExpertParallel(grouping=way, max_grouped_rows=most, num_sms=num_sms, **world.config()) as ep:
                assert ep._comm.groups_in_slots == (way == "direct")
                results.append(round_trip(ep, world, rank, align, places[rank]))
        return results

    for direct, once in commlib.run_ranks(rank_main, world.size, device=device):
        for got, want in zip(direct, once, strict=True):
            assert torch.equal(got, want)


def uneven():
    """Two ranks, four experts; rank 1 gets three times as many rows as rank 0."""
    world = make_world([8, 8], num_experts=4, hidden=32, seed=3)
    for rank in range(2):
        world.topk_idx[rank] = torch.tensor([[0, 2]] * 4 + [[2, 3]] * 4)
    return world


def test_a_rank_without_room_gets_its_rows_all_the_same(device):
    world = uneven().to(device)

    def rank_main(rank):
        with ExpertParallel(grouping="direct", max_grouped_rows=16, **world.config()) as ep:
            d = ep.dispatch(world.x[rank], world.topk_idx[rank], layout="expert")
            used = ep._comm.core.slots_in_use
            if rank == 1:
                with pytest.raises(ValueError, match="24 rows grouped by expert have no room in a slot"):
                    ep.combine_buffer(d.handle)
            else:
                ep.combine_buffer(d.handle)
            return d.x.shape[0], used

    assert commlib.run_ranks(rank_main, 2, device=device) == [(8, 1), (24, 0)]


def test_rows_are_copied_where_slots_run_out(device):
    world = uneven().to(device)

    def rank_main(rank):
        with ExpertParallel(grouping="direct", slots=4, **world.config()) as ep:
            arguments = world.x[rank], world.topk_idx[rank]
            held = [ep.dispatch(*arguments, layout="expert") for _ in range(5)]
            assert ep._comm.core.slots_in_use == 2  # two stay free, to receive and to combine
            assert all(torch.equal(d.x, held[0].x) for d in held)
            more = [ep.dispatch(*arguments, layout="expert", zero_copy=True) for _ in range(2)]
            assert ep._comm.core.slots_in_use == 4
            with pytest.raises(commlib.HandleError, match="all 4 slots are in use"):
                ep.dispatch(*arguments, layout="expert", zero_copy=True)
            del more
            y = ep.combine(held[0].x, held[0].handle)
            return torch.equal(y, ep.combine(held[4].x, held[4].handle))

    assert commlib.run_ranks(rank_main, 2, device=device) == [True, True]


def test_grouping_is_chosen_by_the_link():
    def rank_main(rank):
        found = []
        for link in (None, 0.01, 1000.0):
            with ExpertParallel(num_experts=8, hidden=16, topk=4, max_tokens=4, link_gbps=link) as ep:
                found.append(ep._comm.groups_in_slots)
        return found

    assert commlib.run_ranks(rank_main, 2) == [[True, False, True]] * 2


def test_one_rank_with_a_slow_link_decides_for_all():
    def rank_main(rank):
        link = 0.01 if rank == 1 else None
        with ExpertParallel(num_experts=8, hidden=16, topk=4, max_tokens=4, link_gbps=link) as ep:
            return ep._comm.groups_in_slots

    assert commlib.run_ranks(rank_main, 3) == [False] * 3


def test_between_nodes_each_row_goes_once():
    def rank_main(rank):
        with ExpertParallel(
            num_experts=8, hidden=16, topk=4, max_tokens=4, ranks_per_node=1, grouping="direct"
        ) as ep:
            return ep._comm.groups_in_slots

    assert commlib.run_ranks(rank_main, 2) == [False] * 2


def test_a_heap_that_grows_grows_for_groups():
    world = make_world([40, 40], num_experts=4, hidden=32, seed=4)
    config = world.config() | {"max_tokens": None, "capacity": 16}

    def rank_main(rank):
        with ExpertParallel(grouping="direct", **config) as ep:
            before = ep._comm.settings.grouped_rows
            d = ep.dispatch(world.x[rank], world.topk_idx[rank], world.topk_weights[rank], layout="expert")
            assert ep.stats()["growths"] == 1
            assert ep._comm.core.slots_in_use == 1
            y = ep.combine_buffer(d.handle).copy_(d.x)
            sums = ep.combine(y, d.handle, weights=d.topk_weights)
            return before, ep._comm.settings.grouped_rows, sums

    with_room = world.config() | {"max_tokens": 40}

    def plenty(rank):
        with ExpertParallel(grouping="once", **with_room) as ep:
            d = ep.dispatch(world.x[rank], world.topk_idx[rank], world.topk_weights[rank], layout="expert")
            return ep.combine(d.x, d.handle, weights=d.topk_weights)

    for (before, after, got), want in zip(
        commlib.run_ranks(rank_main, 2), commlib.run_ranks(plenty, 2), strict=True
    ):
        assert after > before
        assert torch.equal(got, want)


def test_memory_is_said():
    def rank_main(rank):
        sizes = []
        for way in WAYS:
            with ExpertParallel(num_experts=8, hidden=16, topk=4, max_tokens=4, grouping=way) as ep:
                report = ep.memory_report()
                sizes.append((report.slot_bytes, report.grouped_rows))
        return sizes

    (direct, rows), (once, none) = commlib.run_ranks(rank_main, 1)[0]
    assert rows == 4 * 4 + 8 * 127 and none == 0
    assert direct - once >= (rows - 4) * 16 * 2


@pytest.mark.parametrize(
    "settings, error, text",
    [
        (
            {"grouping": "sometimes"},
            ValueError,
            "grouping must be one of auto, direct, once, got 'sometimes'",
        ),
        ({"grouping": None}, ValueError, "grouping must be one of"),
        ({"max_grouped_rows": 0}, ValueError, "max_grouped_rows"),
        ({"max_grouped_rows": 1.5}, TypeError, "max_grouped_rows"),
    ],
)
def test_settings_that_cannot_be_used(settings, error, text):
    with pytest.raises(error, match=text):
        ExpertParallel(num_experts=8, hidden=16, topk=4, max_tokens=4, **settings)


def test_ranks_must_agree():
    def rank_main(rank):
        with pytest.raises(commlib.ConfigMismatch, match="grouping is direct on rank 0, once on rank 1"):
            ExpertParallel(num_experts=8, hidden=16, topk=4, max_tokens=4, grouping=WAYS[rank])

    commlib.run_ranks(rank_main, 2)


def test_layouts_that_differ_are_named():
    def rank_main(rank):
        with ExpertParallel(num_experts=8, hidden=16, topk=4, max_tokens=4) as ep:
            x, idx = torch.zeros(2, 16, dtype=torch.bfloat16), torch.zeros(2, 4, dtype=torch.int64)
            layout = "expert" if rank == 0 else "rank"
            with pytest.raises(commlib.CallMismatch, match='dispatch, layout="expert"'):
                ep.dispatch(x, idx, layout=layout)

    commlib.run_ranks(rank_main, 2)


def test_zero_copy_needs_groups_in_slots():
    def rank_main(rank):
        with ExpertParallel(num_experts=8, hidden=16, topk=4, max_tokens=4, grouping="once") as ep:
            x, idx = torch.zeros(2, 16, dtype=torch.bfloat16), torch.zeros(2, 4, dtype=torch.int64)
            with pytest.raises(ValueError, match='zero_copy needs layout "rank": rows grouped'):
                ep.dispatch(x, idx, layout="expert", zero_copy=True)
            d = ep.dispatch(x, idx, layout="expert")
            with pytest.raises(ValueError, match='combine_buffer needs layout "rank"'):
                ep.combine_buffer(d.handle)

    commlib.run_ranks(rank_main, 2)


def test_handles_go_to_communicators_with_as_much_room_for_groups(device):
    world = make_world([8, 8], num_experts=4, topk=2, device=device)

    def rank_main(rank):
        given = world.x[rank], world.topk_idx[rank], world.topk_weights[rank]
        config = world.config() | {"grouping": "direct"}
        with (
            ExpertParallel(**config, max_grouped_rows=20) as ep,
            ExpertParallel(**config) as roomier,
            ExpertParallel(**config | {"grouping": "once"}) as once,
        ):
            d = ep.dispatch(*given, layout="expert")
            with pytest.raises(ValueError, match="room for 20, those of the other"):
                d.handle.on(roomier)
            assert torch.equal(once.dispatch(given[0], handle=d.handle.on(once)).x, d.x)
            back = once.dispatch(*given, layout="expert").handle
            with pytest.raises(ValueError, match="room for 0, those of the other"):
                back.on(ep)

    commlib.run_ranks(rank_main, 2, device=device)
