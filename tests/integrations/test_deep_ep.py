"""commlib.compat.deep_ep.Buffer against a plain PyTorch reference."""

import pytest
import torch
from deep_ep_reference import (
    EXACT,
    bytes_of,
    expected_prefix,
    expected_sums,
    finish,
    laid_out,
    made,
    mask_of,
    on_ranks,
    relaxed,
    rows_for,
    top_k,
    worlds,
)
from hypothesis import given
from hypothesis import strategies as st
from reference import expected_rank_layout, make_world

import commlib
from commlib.compat.deep_ep import topk_idx_t

BF16 = dict(dtype=torch.bfloat16)


def same(got, want):
    torch.testing.assert_close(got, want, **EXACT)


@relaxed
@given(worlds())
def test_the_layout_counts_what_goes_where(device, world):
    def call(buffer, rank):
        return buffer.get_dispatch_layout(world.to(device).topk_idx[rank], world.num_experts)

    for rank, (per_rank, per_node, per_expert, mask, event) in enumerate(on_ranks(world.to(device), call)):
        same(mask, mask_of(world, rank))
        same(per_rank, mask_of(world, rank).sum(0).int())
        ids = world.topk_idx[rank]
        same(per_expert, torch.bincount(ids[ids >= 0], minlength=world.num_experts).int())
        assert per_node is None and event.event is None


@relaxed
@given(worlds(), st.booleans(), st.sampled_from([1, 4]))
def test_dispatch_gives_rows_ids_weights_and_counts(device, world, asynchronous, alignment):
    there = world.to(device)

    def call(buffer, rank):
        rest = dict(expert_alignment=alignment, async_finish=asynchronous)
        got = buffer.dispatch(there.x[rank], **laid_out(buffer, there, rank), **top_k(there, rank), **rest)
        return finish(got, asynchronous)

    for rank, (x, idx, weights, counts, _) in enumerate(on_ranks(there, call)):
        want = expected_rank_layout(world, rank)
        same(x, want.x)
        same(idx, want.topk_idx)
        same(weights, want.topk_weights)
        assert idx.dtype == topk_idx_t == torch.int64 and weights.dtype == torch.float32
        assert counts == [-(-n // alignment) * alignment for n in want.tokens_per_expert]


@relaxed
@given(worlds(), st.booleans())
def test_without_top_k_the_mask_routes_and_counts_come_from_the_layout(device, world, asynchronous):
    there = world.to(device)

    def call(buffer, rank):
        got = buffer.dispatch(there.x[rank], **laid_out(buffer, there, rank), async_finish=asynchronous)
        x, idx, weights, counts, handle = finish(got, asynchronous)
        assert idx is None and weights is None
        y = rows_for(world, rank).to(device)
        return x, counts, handle, finish(buffer.combine(y, handle), False)[0]

    for rank, (x, counts, handle, sums) in enumerate(on_ranks(there, call)):
        want = expected_rank_layout(world, rank)
        same(x, want.x)
        assert counts == want.tokens_per_expert
        same(handle[3], want.source[:, 1].int())
        same(sums, expected_sums(world, rank, lambda r: rows_for(world, r)).bfloat16())


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("with_top_k", [False, True])
def test_the_handle_says_what_deepeps_says(device, with_top_k, asynchronous):
    world = make_world([5, 0, 9], 6, 3, 8, holes=0.4, device=device, **BF16)

    def call(buffer, rank):
        rest = top_k(world, rank) if with_top_k else {}
        got = buffer.dispatch(
            world.x[rank], **laid_out(buffer, world, rank), **rest, async_finish=asynchronous
        )
        return finish(got, asynchronous)[-1]

    prefix = expected_prefix(world)
    for rank, handle in enumerate(on_ranks(world, call)):
        ranks, channels, received, source, mask, heads = handle
        same(ranks, prefix)
        sent = mask_of(world, rank)
        same(channels, sent.sum(0).int().view(-1, 1))
        same(received, torch.cat([torch.zeros(1), prefix[:-1, rank]]).int().view(-1, 1))
        same(source, expected_rank_layout(world, rank).source[:, 1].int())
        same(mask, sent)
        for t, r in sent.nonzero().tolist():
            assert heads[t, r] == sent[:t, r].sum()
        assert (heads[~sent.to(device)] == -1).all() and heads.dtype == torch.int32


@relaxed
@given(worlds(), st.integers(0, 2), st.booleans(), st.booleans())
def test_combine_sums_rows_weights_and_biases_with_one_rounding(
    device, world, biases, weighted, asynchronous
):
    there = world.to(device)

    def values(rank, width, seed):
        return rows_for(world, rank, seed, width, torch.float32)

    def bias(rank, which):
        g = torch.Generator().manual_seed(77 * which + rank)
        # Of other magnitudes than the sums: rounding twice gives other results.
        return (torch.randint(1, 100, world.x[rank].shape, generator=g) / 64).bfloat16() * 3 ** (which + 1)

    def call(buffer, rank):
        handle = buffer.dispatch(there.x[rank], **laid_out(buffer, there, rank), **top_k(there, rank))[4]
        given = tuple(bias(rank, i).to(device) for i in range(biases))
        weights = values(rank, world.topk, 5).to(device) if weighted else None
        y = rows_for(world, rank).to(device)
        rest = dict(bias=given if biases == 2 else given[0] if given else None, async_finish=asynchronous)
        return finish(buffer.combine(y, handle, weights, **rest), asynchronous)

    for rank, (sums, weights) in enumerate(on_ranks(there, call)):
        want = expected_sums(world, rank, lambda r: rows_for(world, r))
        want = want + sum(bias(rank, i).float() for i in range(biases))
        same(sums, want.bfloat16())
        if weighted:  # in every place, also for experts of other ranks, as in DeepEP's own test
            same(weights, expected_sums(world, rank, lambda r: values(r, world.topk, 5)))
        else:
            assert weights is None


def test_weights_of_a_dispatch_come_back_exactly(device):
    world = make_world([7, 12, 3], 6, 3, 16, holes=0.3, device=device, **BF16)

    def call(buffer, rank):
        x, _, weights, _, handle, _ = buffer.dispatch(
            world.x[rank], **laid_out(buffer, world, rank), **top_k(world, rank)
        )
        return buffer.combine(x, handle, topk_weights=weights)[1]

    for rank, weights in enumerate(on_ranks(world, call)):
        same(weights, world.topk_weights[rank].masked_fill(world.topk_idx[rank] < 0, 0).cpu())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_on_the_cpu_combine_sums_other_types_too(dtype):
    world = make_world([4, 6], 4, 2, 8, **BF16)

    def call(buffer, rank):
        handle = buffer.dispatch(world.x[rank], **laid_out(buffer, world, rank), **top_k(world, rank))[4]
        two = (torch.ones_like(world.x[rank], dtype=dtype),) * 2
        return buffer.combine(rows_for(world, rank, dtype=dtype), handle, bias=two)[0]

    for rank, sums in enumerate(on_ranks(world, call)):
        same(sums, (expected_sums(world, rank, lambda r: rows_for(world, r)) + 2).to(dtype))


def fp8_rows(world, rank, scales=torch.float32, seed=0):
    """All 256 bytes, NaNs among them, and scales of any bits, as columns of a larger tensor."""
    g = torch.Generator().manual_seed(100 * seed + rank)
    rows = torch.randint(0, 256, world.x[rank].shape, generator=g, dtype=torch.uint8)
    rows[:, :256] = torch.arange(256, dtype=torch.uint8)
    bits = torch.randint(-(2**31), 2**31, (5, len(rows)), generator=g).int().view(scales)
    return rows.view(torch.float8_e4m3fn).to(world.device), bits.to(world.device).t()[:, 1:4]


@pytest.mark.parametrize("scales", [torch.float32, torch.int32])
@pytest.mark.parametrize("asynchronous", [False, True])
def test_fp8_rows_and_their_scales_keep_every_bit(device, asynchronous, scales):
    world = make_world([6, 0, 11], 6, 2, 272, holes=0.2, device=device, **BF16)

    def call(buffer, rank):
        pair = fp8_rows(world, rank, scales)
        rest = dict(**top_k(world, rank), async_finish=asynchronous)
        return finish(buffer.dispatch(pair, **laid_out(buffer, world, rank), **rest), asynchronous)[0]

    everyone = [fp8_rows(world, rank, scales) for rank in range(3)]
    for rank, (rows, factors) in enumerate(on_ranks(world, call)):
        assert rows.dtype == torch.float8_e4m3fn and factors.dtype == scales
        assert rows.is_contiguous() and factors.is_contiguous()
        source = expected_rank_layout(world, rank).source.tolist()
        assert len(source) == len(rows) > 0
        for i, (src, token) in enumerate(source):
            assert torch.equal(bytes_of(rows[i]), bytes_of(everyone[src][0][token]))
            assert torch.equal(bytes_of(factors[i]), bytes_of(everyone[src][1][token]))


@pytest.mark.parametrize(
    "dtype", [torch.int8, torch.uint8, torch.int32, torch.int64, torch.float64, torch.float16, torch.float32]
)
def test_rows_of_any_type_are_dispatched(device, dtype):
    world = make_world([5, 3], 4, 2, 16, device=device, **BF16)
    rows = [(torch.arange(x.numel()).view(x.shape) + 50 * r).to(dtype) for r, x in enumerate(world.x)]

    def call(buffer, rank):
        x = rows[rank].to(device)
        return buffer.dispatch(x, **laid_out(buffer, world, rank), **top_k(world, rank))[0]

    for rank, x in enumerate(on_ranks(world, call)):
        source = expected_rank_layout(world, rank).source.tolist()
        same(x, torch.stack([rows[src][token] for src, token in source]))


def test_rows_may_lie_in_any_way(device):
    world = make_world([5, 3], 4, 2, 16, device=device, **BF16)

    def call(buffer, rank):
        x, args = world.x[rank], laid_out(buffer, world, rank) | top_k(world, rank)
        columns = x.t().contiguous().t()
        apart = torch.cat([x, x], 1)[:, :16]
        found = [buffer.dispatch(rows, **args)[0] for rows in (columns, apart, columns.int(), apart.int())]
        handle = buffer.dispatch(x, **args)[4]
        y = rows_for(world, rank)
        bias = torch.zeros_like(columns)
        return found, buffer.combine(y.t().contiguous().t(), handle, bias=bias)[0]

    for rank, (found, sums) in enumerate(on_ranks(world, call)):
        want = expected_rank_layout(world, rank).x
        for got, dtype in zip(found, [torch.bfloat16, torch.bfloat16, torch.int32, torch.int32], strict=True):
            same(got, want.to(dtype))
        same(sums, expected_sums(world, rank, lambda r: rows_for(world, r)).bfloat16())


@pytest.mark.parametrize("columns", [1, 4])
@pytest.mark.parametrize("tokens", [[0, 4], [1, 0], [4, 3]])
def test_columns_of_scales_may_lie_apart_where_there_are_few(device, columns, tokens):
    """PyTorch calls a tensor without tokens, or with one column, contiguous whatever its strides are."""
    world = make_world(tokens, 2, topk=2, hidden=32, holes=0, device=device, **BF16)

    def pair(rank):
        scales = torch.rand(tokens[rank], columns, generator=torch.Generator().manual_seed(rank))
        apart = torch.zeros(columns, 8, device=device)[:, : tokens[rank]].t().copy_(scales)
        return world.x[rank].to(torch.float8_e4m3fn), apart

    def call(buffer, rank):
        words = torch.zeros(tokens[rank], 8, dtype=torch.int64, device=device)[:, ::4]
        args = dict(**laid_out(buffer, world, rank), **top_k(world, rank))
        return buffer.dispatch(pair(rank), **args)[0], buffer.dispatch(words, **args)[0]

    for (rows, scales), words in on_ranks(world, call):  # each token goes to both ranks
        assert words.shape == (sum(tokens), 2)
        same(bytes_of(rows), torch.cat([bytes_of(pair(rank)[0]) for rank in range(2)]))
        same(scales, torch.cat([pair(rank)[1] for rank in range(2)]))


def test_several_handles_are_good_for_rows_of_any_kind(device):
    there = [make_world([6, 9], 4, 2, 16, holes=0.2, seed=s, device=device, **BF16) for s in range(3)]

    def call(buffer, rank):
        handles = [
            buffer.dispatch(w.x[rank], **laid_out(buffer, w, rank), **top_k(w, rank))[4] for w in there
        ]
        found = []
        for w, handle in reversed(list(zip(there, handles, strict=True))):
            other = w.x[rank] * 2
            pair = (other.to(torch.float8_e4m3fn), other[:, :2].float())
            for x in (other, pair, other, other.float(), pair):
                got, *nothing, event = buffer.dispatch(x, handle)
                assert nothing == [None] * 4 and event.event is None
                found.append(got)
            y = rows_for(w, rank)
            found.append(buffer.combine(y, handle)[0])
        return found

    for rank, found in enumerate(on_ranks(there[0], call)):
        for i, w in enumerate(reversed(there)):
            want = expected_rank_layout(w, rank).x * 2
            bf16, pair, again, wide, last, sums = found[6 * i : 6 * i + 6]
            same(bf16, want)
            same(again, want)
            same(wide, want.float())
            for rows, factors in (pair, last):
                same(rows.float(), want.to(torch.float8_e4m3fn).float())
                same(factors, want[:, :2].float())
            same(sums, expected_sums(w, rank, lambda r, w=w: rows_for(w, r)).bfloat16())


@pytest.mark.parametrize("asynchronous", [False, True])
def test_worst_tokens_fill_up_the_results(device, asynchronous):
    world = make_world([5, 3], 4, 2, 16, holes=0.3, device=device, **BF16)

    def call(buffer, rank):
        rest = dict(num_worst_tokens=20, async_finish=asynchronous)
        pair = (world.x[rank].to(torch.float8_e4m3fn), world.x[rank][:, :1].float())
        got = buffer.dispatch(pair, **laid_out(buffer, world, rank), **top_k(world, rank), **rest)
        rows, idx, weights, counts, handle = finish(got, asynchronous)
        assert counts == []
        (again, *_) = finish(buffer.dispatch(world.x[rank], handle, async_finish=asynchronous), asynchronous)
        y = torch.full_like(again, 7.0)  # in filling, too
        y[: len(rows_for(world, rank))] = rows_for(world, rank)
        sums, summed = finish(buffer.combine(y, handle, weights, async_finish=asynchronous), asynchronous)
        return rows, idx, weights, handle, again, sums, summed

    for rank, ((rows, factors), idx, weights, handle, again, sums, summed) in enumerate(
        on_ranks(world, call)
    ):
        want = expected_rank_layout(world, rank)
        n = len(want.x)
        for got, expected, fill in (
            (rows.float(), want.x.to(torch.float8_e4m3fn).float(), 0),
            (factors, want.x[:, :1].float(), 0),
            (idx, want.topk_idx, -1),
            (weights, want.topk_weights, 0),
            (again, want.x, 0),
            (handle[3], want.source[:, 1].int(), -1),
        ):
            assert len(got) == 20 > n
            same(got[:n], expected)
            assert (got[n:] == fill).all()
        same(sums, expected_sums(world, rank, lambda r: rows_for(world, r)).bfloat16())
        same(summed, world.topk_weights[rank].masked_fill(world.topk_idx[rank] < 0, 0).cpu())


def test_more_rows_than_worst_tokens_are_an_error():
    world = make_world([5, 3], 2, 2, 8, holes=0, **BF16)  # every token goes to both

    def call(buffer, rank):
        for most in (8, 7):
            buffer.dispatch(
                world.x[rank], **laid_out(buffer, world, rank), **top_k(world, rank), num_worst_tokens=most
            )

    with pytest.raises(commlib.CapacityExceeded, match=r"received 8 rows, but num_worst_tokens is 7"):
        on_ranks(world, call)


def test_batches_may_be_larger_than_any_before():
    """Their size is not given beforehand."""
    world = make_world([6000, 1], 2, 2, 8, holes=0, **BF16)

    def call(buffer, rank):
        few = make_world([1, 1], 2, 2, 8, holes=0, **BF16)
        handle = buffer.dispatch(few.x[rank], **laid_out(buffer, few, rank), **top_k(few, rank))[4]
        got = buffer.dispatch(world.x[rank], **laid_out(buffer, world, rank), **top_k(world, rank))
        sums = buffer.combine(got[0], got[4], got[2])[0]
        early = buffer.combine(few.x[0].repeat(2, 1), handle)[0]
        return got[0], sums, early

    for rank, (x, sums, early) in enumerate(on_ranks(world, call)):
        same(x, expected_rank_layout(world, rank).x)
        same(sums, world.x[rank] * 2)
        assert early.shape == (1, 8)


def test_calls_are_outside_of_autograd(device):
    world = make_world([4, 4], 4, 2, 8, device=device, **BF16)

    def call(buffer, rank):
        x = world.x[rank].clone().requires_grad_()
        weights = world.topk_weights[rank].clone().requires_grad_()
        args = laid_out(buffer, world, rank)
        got, _, w, _, handle, _ = buffer.dispatch(
            x, **args, topk_idx=world.topk_idx[rank], topk_weights=weights
        )
        sums, back, _ = buffer.combine(got.requires_grad_(), handle, w.requires_grad_())
        return sums.requires_grad or back.requires_grad

    assert on_ranks(world, call) == [False, False]


def test_inference_mode(device):
    world = make_world([4, 5], 4, 2, 8, device=device, **BF16)

    def call(buffer, rank):
        with torch.inference_mode():
            got = buffer.dispatch(world.x[rank], **laid_out(buffer, world, rank), **top_k(world, rank))
            buffer.dispatch(world.x[rank], got[4])
            return buffer.combine(got[0], got[4], got[2])[0]

    for rank, sums in enumerate(on_ranks(world, call)):
        copies = mask_of(world, rank).sum(1, keepdim=True)
        same(sums, (world.x[rank].cpu().float() * copies).bfloat16())


@pytest.mark.parametrize("node", ["2", "1"])
def test_between_nodes_the_calls_are_the_same(monkeypatch, node):
    monkeypatch.setenv("COMMLIB_NODE_SIZE", node)
    world = make_world([4, 6], 4, 2, 8, **BF16)

    def call(buffer, rank):
        config = buffer.get_dispatch_config(2)
        args = laid_out(buffer, world, rank) | dict(num_tokens_per_rdma_rank=torch.ones(1, dtype=torch.int32))
        got = buffer.internode_dispatch(world.x[rank], **args, **top_k(world, rank), config=config)
        again = buffer.internode_dispatch(world.x[rank], got[4], config=config)[0]
        return got[0], again, buffer.internode_combine(rows_for(world, rank), got[4], config=config)[0]

    for rank, (x, again, sums) in enumerate(on_ranks(world, call)):
        same(x, expected_rank_layout(world, rank).x)
        same(again, x)
        same(sums, expected_sums(world, rank, lambda r: rows_for(world, r)).bfloat16())


def test_buffers_of_one_rank_do_not_share_communicators(device):
    world = make_world([4, 6], 4, 2, 8, device=device, **BF16)

    def call(buffer, rank):
        with made() as other:
            handles = []
            for b in (buffer, other, buffer):
                got = b.dispatch(world.x[rank], **laid_out(b, world, rank), **top_k(world, rank))
                handles.append((b, got[4]))
            return [b.combine(rows_for(world, rank), handle)[0] for b, handle in reversed(handles)]

    for rank, all_sums in enumerate(on_ranks(world, call)):
        for sums in all_sums:
            same(sums, expected_sums(world, rank, lambda r: rows_for(world, r)).bfloat16())
