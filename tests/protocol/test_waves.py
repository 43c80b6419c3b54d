"""Starting on an expert before the whole dispatch is done: in_waves and wait_expert."""

import itertools
import time
from contextlib import nullcontext

import pytest
import torch
from exchange import check
from reference import expected_expert_layout, make_world

import commlib
from commlib import ExpertParallel


def send(ep, world, rank, **options):
    inputs = world.x[rank], world.topk_idx[rank], world.topk_weights[rank]
    return ep.dispatch(*inputs, **{"layout": "expert", "async_op": True, "in_waves": True, **options})


@pytest.mark.parametrize("num_experts", [3, 12, 30])
@pytest.mark.parametrize("num_sms", [1, 3])
def test_each_expert_has_its_rows_when_it_has_been_waited_for(device, num_sms, num_experts):
    world = make_world([40, 0, 33], num_experts=num_experts, topk=3, device=device)

    def rank_main(rank):
        wanted = expected_expert_layout(world, rank, 4)
        with ExpertParallel(num_sms=num_sms, **world.config()) as ep:
            for _ in range(5):
                d = send(ep, world, rank, align=4)
                for e in range(ep.num_local_experts):
                    begin, end = wanted.offsets[e : e + 2]
                    d.wait_expert(e)
                    assert torch.equal(d.x[begin:end].cpu(), wanted.x[begin:end])
                    assert torch.equal(d.topk_weights.cpu(), wanted.topk_weights)
                    assert torch.equal(d.source.cpu(), wanted.source)
                check(d.finish(), wanted)

    commlib.run_ranks(rank_main, 3, device=device)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_dispatch_in_waves_is_bit_for_bit_one_without(device, dtype):
    world = make_world([50, 61], num_experts=16, topk=6, hidden=120, dtype=dtype, device=device)

    def rank_main(rank):
        with ExpertParallel(num_sms=2, capacity=100, **world.config()) as ep:
            waves = send(ep, world, rank, overflow="drop").finish()
            plain = send(ep, world, rank, overflow="drop", in_waves=False).finish()
            for name in ("x", "topk_weights", "tokens_per_expert", "offsets", "source"):
                assert torch.equal(getattr(waves, name), getattr(plain, name)), name
            out = [ep.combine(d.x, d.handle, weights=d.topk_weights) for d in (waves, plain)]
            assert torch.equal(*out)

    commlib.run_ranks(rank_main, 2, device=device)


def last_wave_world(device):
    """Four experts on each of two ranks. Rank 1 sends rank 0 rows for its last expert only."""
    world = make_world([6, 4], num_experts=8, topk=1, holes=0.0, device=device)
    world.topk_idx[0][:] = torch.tensor([0, 0, 1, 2, 0, 1]).view(6, 1)
    world.topk_idx[1][:] = 3
    return world


def test_an_early_expert_does_not_wait_for_rows_of_a_late_one(device):
    world = last_wave_world(device)
    seconds_a_row = 0.5

    def rank_main(rank):
        gbps = world.hidden * 4 / seconds_a_row / 1e9 if rank else None
        wanted = expected_expert_layout(world, rank, 1)
        with ExpertParallel(link_gbps=gbps, num_sms=2, **world.config()) as ep:
            ep.group.barrier()
            d = send(ep, world, rank)
            if rank == 0:
                begun = time.monotonic()
                for e in (1, 0, 2):
                    d.wait_expert(e)
                early = d.x[: wanted.offsets[3]].cpu()
                assert not d.event.query(), "the wait was for all rows"
                assert torch.equal(early, wanted.x[: wanted.offsets[3]])
                d.wait_expert(3)
                assert torch.equal(d.x.cpu(), wanted.x)
                assert time.monotonic() - begun > seconds_a_row
            check(d.finish(), wanted)

    commlib.run_ranks(rank_main, 2, device=device)


@pytest.mark.parametrize("in_waves", [False, True])
def test_gradients_are_those_of_the_whole(device, in_waves):
    """Experts that begin one after another: values and gradients do not change."""
    world = make_world([30, 21], num_experts=10, topk=4, dtype=torch.float64, device=device)

    def run(ep, rank, early):
        x = world.x[rank].clone().requires_grad_()
        weights = world.topk_weights[rank].clone().requires_grad_()
        d = ep.dispatch(
            x, world.topk_idx[rank], weights, layout="expert", async_op=True, in_waves=early and in_waves
        )
        offsets = [0, *itertools.accumulate(d.handle.counts())]  # on a GPU, d.offsets comes with the rows
        if not early:
            d = d.finish()
        y = []
        for e in range(ep.num_local_experts):
            d.wait_expert(e)
            y.append(torch.tanh(d.x[offsets[e] : offsets[e + 1]] * (e + 1)))
        d = d.finish()
        out = ep.combine(torch.cat(y), d.handle, weights=d.topk_weights)
        out.square().sum().backward()
        return out.detach(), x.grad, weights.grad

    def rank_main(rank):
        with ExpertParallel(**world.config()) as ep:
            for got, wanted in zip(run(ep, rank, True), run(ep, rank, False), strict=True):
                assert torch.equal(got, wanted)

    commlib.run_ranks(rank_main, 2, device=device)


@pytest.mark.parametrize("options", [{}, {"async_op": True}, {"async_op": True, "in_waves": True}])
def test_waiting_for_an_expert_is_always_allowed(device, options):
    """Without waves it waits for all rows, and where nothing is left to wait for it returns at once."""
    world = make_world([9, 8], device=device)

    def rank_main(rank):
        with ExpertParallel(**world.config()) as ep:
            d = ep.dispatch(world.x[rank], world.topk_idx[rank], layout="expert", **options)
            d.wait_expert(0)
            if not options.get("in_waves"):
                ep.synchronize()
            done = d.finish()
            for _ in range(2):
                d.wait_expert(3)
                done.wait_expert(0)
            again = ep.dispatch(world.x[rank], handle=d.handle, async_op=True)
            again.wait_expert(1)
            assert torch.equal(again.finish().x, done.x)
        d.wait_expert(0)

    commlib.run_ranks(rank_main, 2, device=device)


def test_what_cannot_be_waited_for_is_an_error(device):
    world = make_world([5], device=device)

    def rank_main(rank):
        with ExpertParallel(**world.config()) as ep:
            d = send(ep, world, rank)
            for e in (-1, 8):
                with pytest.raises(ValueError, match=f"expert is {e}, but .* experts 0 to 7"):
                    d.wait_expert(e)
            d = d.finish()
            with pytest.raises(ValueError, match='needs layout "expert"'):
                ep.dispatch(world.x[rank], world.topk_idx[rank]).wait_expert(0)
            for options in ({"layout": "rank"}, {"async_op": False}, {"handle": d.handle}):
                with pytest.raises(ValueError, match="in_waves needs"):
                    send(ep, world, rank, **options)
            assert ep.stats()["dispatches"] == 2

    commlib.run_ranks(rank_main, 1, device=device)


def test_a_rank_that_does_not_send_is_an_error_not_a_hang(device):
    """Rank 1 is slow beyond the deadline: rank 0's wait ends by then, and the failure is raised."""
    world = last_wave_world(device)

    def rank_main(rank):
        gbps = world.hidden * 4 / 2 / 1e9 if rank else None  # two seconds a row
        # On a GPU the operation of rank 1 fails unseen when rank 0 gives up: closing reports it.
        told = pytest.raises(commlib.PeerTimeout, match=r"rank 0 (gave up on it first|has given up on it)")
        unseen = rank == 1 and device == "cuda"
        with told if unseen else nullcontext(), ExpertParallel(link_gbps=gbps, **world.config()) as ep:
            ep.timeout = 0.5 if rank == 0 else 30.0
            d = send(ep, world, rank)
            if rank == 0:
                with pytest.raises(commlib.PeerTimeout, match="phase arrival"):
                    d.wait_expert(3)
                    ep.synchronize()  # on a GPU only the stream waits
            ep.group.barrier()

    begun = time.monotonic()
    commlib.run_ranks(rank_main, 2, device=device)
    assert time.monotonic() - begun < 25


def test_in_waves_on_some_ranks_only_is_an_error():
    world = make_world([5, 5])

    def rank_main(rank):
        with ExpertParallel(**world.config()) as ep:
            try:
                send(ep, world, rank, in_waves=rank == 0)
            except commlib.CallMismatch as error:
                assert "called dispatch with weights, in_waves" in str(error)
                return True
            except commlib.CommError:  # the other rank has reported it first
                return False

    assert True in commlib.run_ranks(rank_main, 2)
