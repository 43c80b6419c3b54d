"""commlib.compat.deep_ep.ElasticBuffer against a plain PyTorch reference."""

import threading

import pytest
import torch
from deep_ep_reference import (
    EXACT,
    bytes_of,
    expected_prefix,
    expected_sums,
    finish,
    on_ranks,
    relaxed,
    rows_for,
    top_k,
    worlds,
)
from hypothesis import given
from hypothesis import strategies as st
from reference import expected_expert_layout, expected_rank_layout, make_world

import commlib
from commlib.compat.deep_ep import ElasticBuffer, EventHandle, Refused

MOST = 16  # tokens of a rank
BF16 = dict(dtype=torch.bfloat16)


def same(got, want):
    torch.testing.assert_close(got, want, **EXACT)


def run(world, call, **options):
    return on_ranks(world, call, ElasticBuffer, num_max_tokens_per_rank=MOST, **options)


def expanded(world, rank, alignment):
    """What a rank gets with do_expand, and where groups begin."""
    want = expected_expert_layout(world, rank, alignment)
    return want, torch.tensor(want.offsets[:-1])


@pytest.mark.parametrize("alignment", [1, 4, 128])
@pytest.mark.parametrize("expand", [False, True])
@relaxed
@given(world=worlds(), asynchronous=st.booleans())
def test_dispatch_gives_rows_by_rank_or_by_expert(device, world, expand, asynchronous, alignment):
    there = world.to(device)

    def call(buffer, rank):
        got = buffer.dispatch(
            there.x[rank],
            **top_k(there, rank),
            num_experts=world.num_experts,
            expert_alignment=alignment,
            do_expand=expand,
            async_with_compute_stream=asynchronous,
        )
        return finish(got, asynchronous)

    for rank, (x, idx, weights, handle) in enumerate(run(there, call)):
        if expand:
            want = expected_expert_layout(world, rank, alignment)
            assert idx is None
        else:
            want = expected_rank_layout(world, rank)
            same(idx, want.topk_idx)
        same(x, want.x)
        same(weights, want.topk_weights)
        counts = [-(-n // alignment) * alignment for n in want.tokens_per_expert]
        assert handle.num_recv_tokens_per_expert_list == counts


@pytest.mark.parametrize("alignment", [1, 4])  # not drawn: each would get few worlds, without tokens
@pytest.mark.parametrize("expand", [False, True])
@relaxed
@given(world=worlds())
def test_the_handle_says_what_came_from_where(device, world, expand, alignment):
    there = world.to(device)

    def call(buffer, rank):
        rest = dict(num_experts=world.num_experts, expert_alignment=alignment, do_expand=expand)
        return buffer.dispatch(there.x[rank], **top_k(there, rank), **rest)[3]

    handles = run(there, call)
    for rank, handle in enumerate(handles):
        unique = expected_rank_layout(world, rank)
        counts = torch.tensor(unique.tokens_per_expert)
        assert (handle.do_expand, handle.num_experts, handle.expert_alignment) == (
            expand,
            world.num_experts,
            alignment,
        )
        assert handle.num_max_tokens_per_rank == MOST
        same(handle.topk_idx, world.topk_idx[rank])
        assert handle.num_recv_tokens == len(unique.x) == len(handle.recv_src_metadata)
        same(handle.psum_num_recv_tokens_per_scaleup_rank, expected_prefix(world)[:, rank])
        rank_of, token = unique.source.unbind(1)
        same(handle.recv_src_metadata[:, 0], (rank_of * MOST + token).int())
        first = (unique.topk_idx >= 0).int().argmax(1) if len(unique.x) else torch.empty(0)
        same(handle.recv_src_metadata[:, 1], (rank_of * world.topk + first).int())
        if expand:
            _, begins = expanded(world, rank, alignment)
            same(handle.psum_num_recv_tokens_per_expert, (begins + counts).int())
            same(handle.num_unaligned_recv_tokens_per_expert, counts.int())
            rows = handle.recv_src_metadata[:, 2:].cpu()
            same(rows >= 0, unique.topk_idx >= 0)
            for expert, begin in enumerate(begins.tolist()):
                mine = rows[unique.topk_idx == expert]
                same(mine, torch.arange(begin, begin + len(mine)).int())
            padded = sum(-(-n // alignment) * alignment for n in counts.tolist())
            assert handle.num_expanded_tokens == padded
        else:
            rounded = -(-counts // alignment) * alignment
            same(handle.psum_num_recv_tokens_per_expert, rounded.cumsum(0).int())
            assert handle.num_unaligned_recv_tokens_per_expert is None
            assert (handle.recv_src_metadata[:, 2:] == -1).all()
            assert handle.num_expanded_tokens == handle.num_recv_tokens
    for rank, handle in enumerate(handles):  # where its tokens lie at the others
        for t, chosen in enumerate(world.topk_idx[rank].tolist()):
            for k, expert in enumerate(chosen):
                there_at = int(handle.dst_buffer_slot_idx[t, k])
                if expert < 0:
                    assert there_at == -1
                    continue
                owner = expert // (world.num_experts // world.size)
                source = expected_rank_layout(world, owner).source[there_at]
                assert source.tolist() == [rank, t]


def rows_expanded(world, rank, alignment):
    """Rows of each (token, expert) for combine, whole numbers; something else in padding."""
    want, _ = expanded(world, rank, alignment)
    g = torch.Generator().manual_seed(rank)
    rows = torch.randint(-8, 9, want.x.shape, generator=g).bfloat16()
    rows[want.source[:, 0] < 0] = 1000
    return rows.to(world.device)


def sums_of_expanded(world, rank, alignment):
    total = torch.zeros(world.x[rank].shape)
    for other in range(world.size):
        source = expected_expert_layout(world, other, alignment).source
        mine = source[:, 0] == rank
        total.index_add_(
            0, source[mine, 1], rows_expanded(world, other, alignment)[mine.to(world.device)].cpu().float()
        )
    return total


@relaxed
@given(worlds(), st.booleans(), st.booleans(), st.integers(0, 2), st.sampled_from([1, 4]), st.booleans())
def test_combine_is_the_way_back(device, world, expand, asynchronous, biases, alignment, multiple):
    there = world.to(device)

    def bias(rank, i):
        return torch.full(world.x[rank].shape, 2.0 + i + rank, dtype=torch.bfloat16)

    def call(buffer, rank):
        rest = dict(num_experts=world.num_experts, expert_alignment=alignment, do_expand=expand)
        _, _, weights, handle, _ = buffer.dispatch(there.x[rank], **top_k(there, rank), **rest)
        y = rows_expanded(there, rank, alignment) if expand else rows_for(there, rank)
        given = tuple(bias(rank, i).to(device) for i in range(biases))
        rest = dict(bias=given if biases == 2 else given[0] if given else None)
        got = buffer.combine(y, handle, weights, **rest, async_with_compute_stream=asynchronous)
        return finish(got, asynchronous)

    for rank, (sums, weights) in enumerate(run(there, call, allow_multiple_reduction=multiple)):
        if expand:
            want = sums_of_expanded(world, rank, alignment)
        else:
            want = expected_sums(world, rank, lambda r: rows_for(world, r))
        same(sums, (want + sum(bias(rank, i).float() for i in range(biases))).bfloat16())
        same(weights, world.topk_weights[rank].masked_fill(world.topk_idx[rank] < 0, 0))


def test_values_of_other_ranks_experts_do_not_come_back(device):
    """V2 sums no weights: places of other ranks' experts may hold anything."""
    world = make_world([4, 7], 4, 3, 8, holes=0.3, device=device, **BF16)

    def call(buffer, rank):
        x, idx, weights, handle, _ = buffer.dispatch(world.x[rank], **top_k(world, rank), num_experts=4)
        weights = weights.masked_fill(idx < 0, float("nan"))
        return buffer.combine(x, handle, weights)[1]

    for rank, weights in enumerate(run(world, call)):
        same(weights, world.topk_weights[rank].masked_fill(world.topk_idx[rank] < 0, 0).cpu())


def test_without_multiple_reduction_a_rank_does_not_round_its_sums(device):
    world = make_world([1], 2, 2, 8, holes=0, device=device, **BF16)

    def call(buffer, rank):
        handle = buffer.dispatch(world.x[0], **top_k(world, 0), num_experts=2, do_expand=True)[3]
        # 256 + 1 is no bfloat16; with the bias of -256 it matters when the sum is rounded.
        y = torch.tensor([[256.0], [1.0]], device=device).expand(2, 8).bfloat16()
        return buffer.combine(y.contiguous(), handle, bias=torch.full_like(world.x[0], -256.0))[0]

    (rounded,) = run(world, call)
    (exact,) = run(world, call, allow_multiple_reduction=False)
    assert (exact == 1).all()
    assert (rounded == 0).all()


@pytest.mark.parametrize("expand", [False, True])
@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_handle_sends_other_rows_the_same_way(device, asynchronous, expand):
    world = make_world([5, 0, 9], 6, 2, 16, holes=0.3, device=device, **BF16)
    rest = dict(do_expand=expand, async_with_compute_stream=asynchronous)

    def call(buffer, rank):
        first = buffer.dispatch(
            world.x[rank], **top_k(world, rank), num_experts=6, expert_alignment=4, **rest
        )
        handle = first[3]
        pair = (world.x[rank].to(torch.float8_e4m3fn), world.x[rank][:, :3].float())
        found = []
        for x, weights in (
            (world.x[rank] * 2, world.topk_weights[rank] * 3),
            (pair, None),
            (world.x[rank], None),
        ):
            got, idx, w, same_handle, event = buffer.dispatch(x, topk_weights=weights, handle=handle, **rest)
            finish((event,), asynchronous)
            assert same_handle is handle
            found.append((got, None if idx is None else idx.clone(), w))
            if idx is not None:
                idx.fill_(77)  # the caller's own
        return found

    for rank, (twice, pair, once) in enumerate(run(world, call)):
        want = expected_expert_layout(world, rank, 4) if expand else expected_rank_layout(world, rank)
        same(twice[0], want.x * 2)
        same(twice[2], want.topk_weights * 3)
        same(once[0], want.x)
        same(pair[0][0].float(), want.x.to(torch.float8_e4m3fn).float())
        same(pair[0][1], want.x[:, :3].float())
        assert pair[2] is None and once[2] is None
        for _, idx, _ in (twice, pair, once):
            if expand:
                assert idx is None
            else:
                same(idx, want.topk_idx)


@pytest.mark.parametrize("expand", [False, True])
@pytest.mark.parametrize("asynchronous", [False, True])
def test_scales_may_come_column_by_column(device, asynchronous, expand):
    world = make_world([5, 6], 4, 2, 256, holes=0.2, device=device, **BF16)

    def pair_of(rank):
        g = torch.Generator().manual_seed(rank)
        rows = torch.randint(0, 256, world.x[rank].shape, generator=g, dtype=torch.uint8)
        return rows.view(torch.float8_e4m3fn), torch.rand(len(rows), 2, generator=g)

    def call(buffer, rank):
        pair = tuple(t.to(device) for t in pair_of(rank))
        rest = dict(do_expand=expand, async_with_compute_stream=asynchronous, num_experts=4)
        got = buffer.dispatch(pair, **top_k(world, rank), **rest, use_tma_aligned_col_major_sf=True)
        return finish(got, asynchronous)[0]

    pairs = [pair_of(rank) for rank in range(2)]
    for rank, (rows, scales) in enumerate(run(world, call, use_fp8_dispatch=True)):
        assert scales.stride(0) == 1 and scales.stride(1) % 4 == 0 and scales.stride(1) >= len(rows)
        want = expected_expert_layout(world, rank, 1) if expand else expected_rank_layout(world, rank)
        for i, (src, token) in enumerate(want.source.tolist()):
            assert torch.equal(bytes_of(rows[i]), bytes_of(pairs[src][0][token]))
            same(scales[i], pairs[src][1][token])


@pytest.mark.parametrize("asynchronous", [False, True])
def test_statistics_count_tokens_of_local_experts(device, asynchronous):
    world = make_world([5, 9], 4, 2, 8, holes=0.3, device=device, **BF16)

    def call(buffer, rank):
        stats = torch.tensor([100, 0], dtype=torch.int32, device=device)
        rest = dict(cumulative_local_expert_recv_stats=stats, async_with_compute_stream=asynchronous)
        got = buffer.dispatch(world.x[rank], **top_k(world, rank), num_experts=4, expert_alignment=8, **rest)
        handle = finish(got, asynchronous)[3]
        finish(buffer.dispatch(world.x[rank], handle=handle, **rest), asynchronous)
        return stats

    for rank, stats in enumerate(run(world, call)):
        first, second = expected_rank_layout(world, rank).tokens_per_expert
        assert stats.tolist() == [100 + 2 * first, 2 * second]


def test_the_handles_ids_are_a_copy_unless_the_caller_says():
    world = make_world([5, 9], 4, 2, 8, **BF16)

    def call(buffer, rank):
        found = []
        for copy in (True, False):
            rest = dict(num_experts=4, do_handle_copy=copy)
            handle = buffer.dispatch(world.x[rank], **top_k(world, rank), **rest)[3]
            found.append(handle.topk_idx.data_ptr() == world.topk_idx[rank].data_ptr())
        return found

    assert run(world, call) == [[False, True]] * 2


def test_without_weights_none_come(device):
    world = make_world([5, 9], 4, 2, 8, device=device, **BF16)

    def call(buffer, rank):
        ids = world.topk_idx[rank]
        return [buffer.dispatch(world.x[rank], ids, num_experts=4, do_expand=e)[2] for e in (False, True)]

    assert run(world, call) == [[None, None]] * 2


def test_a_call_may_say_how_many_tokens_a_rank_sends():
    world = make_world([40, 3], 4, 2, 8, **BF16)

    def call(buffer, rank):
        rest = dict(num_experts=4, num_max_tokens_per_rank=64)
        x, _, _, handle, _ = buffer.dispatch(world.x[rank], **top_k(world, rank), **rest)
        assert handle.num_max_tokens_per_rank == 64
        return x, handle.recv_src_metadata[:, 0]

    for rank, (x, numbers) in enumerate(run(world, call)):
        want = expected_rank_layout(world, rank)
        same(x, want.x)
        assert numbers.tolist() == [64 * src + token for src, token in want.source.tolist()]


def test_a_previous_event_of_either_kind_is_waited_for(device):
    world = make_world([5, 9], 4, 2, 8, device=device, **BF16)

    def call(buffer, rank):
        before = dict(allocate_on_comm_stream=True, async_with_compute_stream=True)
        event = buffer.capture()
        assert isinstance(event, EventHandle)
        for _ in range(3):
            got = buffer.dispatch(
                world.x[rank], **top_k(world, rank), num_experts=4, previous_event=event, **before
            )
            out = buffer.combine(
                rows_for(world, rank),
                got[3],
                previous_event=got[4],
                previous_event_before_epilogue=event,
                **before,
            )
            event = out[2].event
        event.current_stream_wait()
        return got[0], out[0]

    for rank, (x, sums) in enumerate(run(world, call)):
        same(x, expected_rank_layout(world, rank).x)
        same(sums, expected_sums(world, rank, lambda r: rows_for(world, r)).bfloat16())


def test_numbers_of_a_buffer():
    def call(buffer, rank):
        buffer.barrier()
        assert (buffer.rank_idx, buffer.num_ranks) == (rank, 2)
        assert buffer.get_logical_domain_size() == (1, 2) == buffer.get_physical_domain_size()
        ranks = (buffer.num_scaleout_ranks, buffer.num_scaleup_ranks, buffer.scaleup_rank_idx)
        assert ranks == (1, 2, rank)
        sms = buffer.get_theoretical_num_sms(8, 2)
        assert sms >= 4 and sms % 2 == 0
        assert buffer.get_theoretical_num_qps(sms) <= buffer.num_allocated_qps
        hint = ElasticBuffer.get_buffer_size_hint(buffer.group, MOST, 4096, 2)
        assert hint % (2 << 20) == 0 and hint >= 2 * MOST * 4096 * 2
        assert buffer.num_bytes == ElasticBuffer.get_buffer_size_hint(buffer.group, MOST, 0)
        return True

    world = make_world([1, 1], **BF16)
    assert run(world, call) == [True, True]


REFUSED = {
    "topk_idx is needed": dict(topk_idx=None),
    "num_experts is needed": dict(num_experts=None),
    "a positive multiple of the 2 ranks, got 5": dict(num_experts=5),
    "num_max_tokens_per_rank is 4": dict(num_max_tokens_per_rank=4),
    "expert_alignment must be at least 1, got 0": dict(expert_alignment=0),
    "do_zero_padding needs do_expand": dict(do_zero_padding=True),
    "previous_event needs allocate_on_comm_stream": dict(previous_event=EventHandle()),
    "num_qps is 1000, but 129 are allocated": dict(num_qps=1000),
    r"\[2\] int32, got \[4\] torch.int32": dict(
        cumulative_local_expert_recv_stats=torch.zeros(4, dtype=torch.int32)
    ),
    "cumulative_local_expert_recv_stats must be on cpu, as x is, got meta": dict(
        cumulative_local_expert_recv_stats=torch.zeros(2, dtype=torch.int32, device="meta")
    ),
    "must be deep_ep.topk_idx_t": dict(topk_idx=torch.zeros(5, 2, dtype=torch.int32)),
    "topk_idx must be on cpu, as x is, got meta": dict(topk_idx=torch.zeros(5, 2).long().to("meta")),
    "topk_weights must be on cpu, as x is, got meta": dict(topk_weights=torch.zeros(5, 2, device="meta")),
    "topk_idx has 3 tokens, but x has 5": dict(topk_idx=torch.zeros(3, 2, dtype=torch.int64)),
    r"topk_weights must be \[5, 2\] float32, got \[5, 3\]": dict(topk_weights=torch.zeros(5, 3)),
}


@pytest.mark.parametrize("text", REFUSED)
def test_dispatch_refuses(text):
    world = make_world([5, 5], 4, 2, 8, **BF16)
    given = dict(x=world.x[0], topk_idx=world.topk_idx[0], num_experts=4) | REFUSED[text]

    def call(buffer, rank):
        with pytest.raises(Refused, match=text):
            buffer.dispatch(**given)

    run(world, call)


def test_calls_with_a_handle_refuse_what_contradicts_it():
    world = make_world([5, 5], 4, 2, 8, **BF16)

    def call(buffer, rank):
        x, ids = world.x[rank], world.topk_idx[rank]
        handle = buffer.dispatch(x, ids, num_experts=4, expert_alignment=4)[3]
        for text, wrong in {
            "topk_idx must be None": dict(topk_idx=ids),
            "do_cpu_sync cannot be True": dict(do_cpu_sync=True),
            "do_expand is True, but the handle's dispatch had False": dict(do_expand=True),
            "expert_alignment is 8, but the handle's dispatch had 4": dict(expert_alignment=8),
            "num_experts is 8": dict(num_experts=8),
            "x has 3 tokens, but the handle's dispatch had 5": dict(x=x[:3]),
        }.items():
            with pytest.raises(Refused, match=text):
                buffer.dispatch(**(dict(x=x, handle=handle) | wrong))
        with pytest.raises(TypeError, match=r"must be the EPHandle that dispatch returned, .* got tuple"):
            buffer.dispatch(x, handle=(1, 2))
        y = rows_for(world, rank)
        with pytest.raises(Refused, match="x must have a row for each of the"):
            buffer.combine(y[:-1], handle)
        with pytest.raises(Refused, match=r"topk_weights must be \[\d+, 2\] float32"):
            buffer.combine(y, handle, torch.zeros(len(y)))
        for which, elsewhere in {
            "x": (y.to("meta"), handle, torch.zeros(len(y), 2, device="meta")),
            "topk_weights": (y, handle, torch.zeros(len(y), 2, device="meta")),
            "bias": (y, handle, None, x.to("meta")),
        }.items():
            with pytest.raises(Refused, match=f"{which} must be on cpu, as .*, got meta"):
                buffer.combine(*elsewhere)

    run(world, call)


@pytest.mark.parametrize("seconds", [(1, 0), (0, 1)])
def test_the_larger_timeout_is_how_long_a_rank_waits(seconds):
    world, given_up = make_world([1, 1], 4, **BF16), threading.Event()

    def call(buffer, rank):
        if rank == 1:
            assert given_up.wait(60)
            return
        try:
            with pytest.raises(commlib.PeerTimeout, match="rank 1 did not come within 1 s"):
                buffer.dispatch(world.x[rank], world.topk_idx[rank], num_experts=4)
        finally:
            given_up.set()

    run(world, call, num_cpu_timeout_secs=seconds[0], num_gpu_timeout_secs=seconds[1])


def test_construction_refuses():
    def call(buffer, rank):
        with pytest.raises(Refused, match="num_max_tokens_per_rank must be at least 0, got -1"):
            ElasticBuffer(None, num_max_tokens_per_rank=-1)
        with pytest.raises(NotImplementedError, match="no num_cpu_bytes"):
            ElasticBuffer(None, num_bytes=1 << 21, num_cpu_bytes=1 << 21)
        nobody = ElasticBuffer(None)
        with pytest.raises(Refused, match="destroy needs a buffer made with explicitly_destroy=True"):
            nobody.destroy()
        with pytest.raises(Refused, match="num_max_tokens_per_rank must be at least 1, got 0"):
            nobody.dispatch(torch.zeros(1, 8).bfloat16(), torch.zeros(1, 1, dtype=torch.int64), num_experts=2)

    run(make_world([1, 1], **BF16), call)
    with pytest.raises(ValueError, match="Either 'group' or 'comm' must be provided"):
        ElasticBuffer(None)


@pytest.mark.parametrize(
    "name",
    [
        "engram_write",
        "engram_fetch",
        "pp_set_config",
        "pp_send",
        "pp_recv",
        "create_agrs_session",
        "all_gather",
    ],
)
def test_what_is_not_about_experts_is_refused(name):
    def call(buffer, rank):
        with pytest.raises(NotImplementedError, match=f"has no {name}: .*use torch"):
            getattr(buffer, name)(torch.zeros(1), 1)

    run(make_world([1], **BF16), call)
