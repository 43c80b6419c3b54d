"""Combine against a plain PyTorch reference."""

import pytest
import torch
from exchange import expert_layer, relaxed, worlds
from hypothesis import given
from hypothesis import strategies as st
from reference import (
    copies_of_tokens,
    expected_combine,
    expected_rank_layout,
    expert_scale,
    make_world,
    tolerance,
)

import commlib
from commlib import ExpertParallel


@relaxed
@given(worlds(), st.sampled_from([1, 4]), st.integers(1, 2))
def test_expert_layout_gives_the_weighted_sum(device, world, align, num_sms):
    world = world.to(device)

    def rank_main(rank):
        with ExpertParallel(num_sms=num_sms, **world.config()) as ep:
            return expert_layer(world, rank, ep, align)

    for rank, out in enumerate(commlib.run_ranks(rank_main, world.size, device=device)):
        want = expected_combine(world, rank)
        torch.testing.assert_close(out.cpu().double(), want, **tolerance(world.dtype, 4 * world.topk))


@relaxed
@given(worlds(), st.sampled_from(["owned", "buffer", "slot"]), st.integers(1, 2))
def test_rank_layout_sums_in_rank_order_bitwise(device, world, place, num_sms):
    world = world.to(device)

    def rank_main(rank):
        with ExpertParallel(num_sms=num_sms, **world.config()) as ep:
            d = ep.dispatch(world.x[rank], world.topk_idx[rank], zero_copy=place == "slot")
            if place == "slot":
                y = d.x.mul_(1 + rank)
            elif place == "buffer":
                y = ep.combine_buffer(d.handle)
                torch.mul(d.x, 1 + rank, out=y)
            else:
                y = d.x * (1 + rank)
            return ep.combine(y, d.handle)

    outs = commlib.run_ranks(rank_main, world.size, device=device)
    accumulator = world.weight_dtype
    rows = [expected_rank_layout(world, r) for r in range(world.size)]
    for rank, out in enumerate(outs):
        want = torch.zeros(out.shape, dtype=accumulator)
        for owner in range(world.size):  # the documented order
            y = (rows[owner].x * (1 + owner)).to(accumulator)
            for row, (src, t) in enumerate(rows[owner].source.tolist()):
                if src == rank:
                    want[t] += y[row]
        assert torch.equal(out.cpu(), want.to(world.dtype))


@pytest.mark.parametrize("layout", ["rank", "expert"])
def test_weights_scale_each_row_of_y(device, layout):
    world = make_world([6, 9], hidden=40, device=device)

    def rank_main(rank):
        with ExpertParallel(**world.config()) as ep:
            d = ep.dispatch(world.x[rank], world.topk_idx[rank], layout=layout, align=2)
            weights = torch.linspace(0.5, 2, d.handle.num_rows, device=device)
            return ep.combine(d.x, d.handle, weights=weights), ep.combine(d.x * weights[:, None], d.handle)

    for weighted, scaled in commlib.run_ranks(rank_main, 2, device=device):
        torch.testing.assert_close(weighted, scaled)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_are_rounded_to_nearest_even_as_in_torch(device, dtype):
    """Every 16-bit value times fp32 weights: ties, subnormal results, overflow and NaNs among them."""
    world = make_world([64], hidden=1024, dtype=dtype, topk=1, device=device)
    x = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype).reshape(64, 1024).to(device)
    g = torch.Generator().manual_seed(1)
    powers = 2.0 ** torch.randint(-20, 17, (64,), generator=g).float()
    uneven = powers * (1 + torch.rand(64, generator=g))

    def rank_main(rank):
        with ExpertParallel(**world.config()) as ep:
            d = ep.dispatch(x, torch.zeros(64, 1, dtype=torch.int64, device=device))
            return [ep.combine(d.x, d.handle, weights=w.to(device)) for w in (powers, uneven)]

    [outs] = commlib.run_ranks(rank_main, 1, device=device)
    for out, weights in zip(outs, (powers, uneven), strict=True):
        want = (x.cpu().float() * weights[:, None] + 0.0).to(dtype)
        assert torch.equal(out.cpu().isnan(), want.isnan())
        assert torch.equal(out.cpu().nan_to_num(), want.nan_to_num())


def test_bias_is_added_once_and_out_is_written(device):
    world = make_world([6, 9], holes=0.5, device=device)
    bias = [torch.randn(len(x), world.hidden, device=device) for x in world.x]

    def rank_main(rank):
        with ExpertParallel(**world.config()) as ep:
            d = ep.dispatch(world.x[rank], world.topk_idx[rank])
            plain = ep.combine(d.x, d.handle)
            out = torch.full_like(plain, float("nan"))
            result = ep.combine(d.x, d.handle, bias=bias[rank], out=out)
            assert result is out
            return plain, out

    for rank, (plain, out) in enumerate(commlib.run_ranks(rank_main, 2, device=device)):
        torch.testing.assert_close(out, plain + bias[rank])


def test_tokens_without_experts_come_back_as_zero(device):
    world = make_world([6, 9], holes=1.0, device=device)

    def rank_main(rank):
        with ExpertParallel(**world.config()) as ep:
            return expert_layer(world, rank, ep)

    for out in commlib.run_ranks(rank_main, 2, device=device):
        assert torch.equal(out, torch.zeros_like(out))


def test_the_same_input_gives_the_same_bits_every_time(device):
    shape = dict(dtype=torch.bfloat16, num_experts=12, topk=6, hidden=256)
    world = make_world([64, 50, 70], **shape, device=device)

    def rank_main(rank):
        with ExpertParallel(num_sms=2, **world.config()) as ep:
            return [expert_layer(world, rank, ep) for _ in range(5)]

    for outs in commlib.run_ranks(rank_main, 3, device=device):
        assert all(torch.equal(out, outs[0]) for out in outs)


def test_two_batches_in_flight_do_not_disturb_each_other(device):
    batches = [make_world([20, 14], seed=s, hidden=128, device=device) for s in range(2)]

    def rank_main(rank):
        with ExpertParallel(**batches[0].config()) as ep:
            outs = []
            for _ in range(20):
                d = [ep.dispatch(w.x[rank], w.topk_idx[rank], async_op=True) for w in batches]
                pending = []
                for b in d:
                    b.event.wait()
                    pending.append(ep.combine(b.x * 2, b.handle, async_op=True))
                for _, event in pending:
                    event.synchronize()
                    assert event.query()
                outs.append([out.clone() for out, _ in pending])
            return outs

    for rank, outs in enumerate(commlib.run_ranks(rank_main, 2, device=device)):
        for pair in outs:
            for world, out in zip(batches, pair, strict=True):
                torch.testing.assert_close(out, 2 * copies_of_tokens(world, rank) * world.x[rank])


def test_experts_are_told_apart():
    """The stand-in experts differ; otherwise the other tests would not see a row at the wrong expert."""
    assert len({expert_scale(e) for e in range(4)}) == 4


def test_rows_received_may_be_written_as_soon_as_combine_returns(device):
    """Rank 0 pulls nothing and is done at once, and writes where rank 1 still pulls."""
    world = make_world([0, 1500], num_experts=4, topk=1, hidden=1024, holes=0.0, device=device)
    world.topk_idx[1] %= 2  # rank 0's experts

    def rank_main(rank):
        with ExpertParallel(**world.config()) as ep:
            for _ in range(5):
                d = ep.dispatch(world.x[rank], world.topk_idx[rank], zero_copy=True)
                out = ep.combine(d.x, d.handle)
                d.x[-1:] = float("nan")  # the row that is pulled last
            return out

    assert torch.equal(commlib.run_ranks(rank_main, 2, device=device)[1], world.x[1])
