"""commlib.compat.deep_ep: low latency mode, and how vLLM and SGLang call it."""

import pytest
import torch
from capture import captured
from deep_ep_reference import on_ranks
from reference import make_world

import commlib
from commlib.compat.deep_ep import Buffer, Refused

E, K, H, M = 6, 3, 512, 12
TOKENS = [7, 0, 12]


@pytest.fixture
def world(device):
    return make_world(TOKENS, E, K, H, torch.bfloat16, seed=3, holes=0.2, device=device)


def experts_of(rank, ranks):
    return range(rank * E // ranks, (rank + 1) * E // ranks)


def sent_to(world, expert):
    """Source rank and token of each of an expert's rows, in their order."""
    return [
        (rank, token)
        for rank, idx in enumerate(world.topk_idx)
        for token in range(len(idx))
        if expert in idx[token].tolist()
    ]


def weighted(world, rank):
    """What a layer gives whose expert e multiplies by e + 1."""
    idx, weights = world.topk_idx[rank], world.topk_weights[rank]
    factors = torch.where(idx < 0, 0, (idx + 1) * weights).sum(-1, keepdim=True)
    return (world.x[rank].float() * factors).bfloat16()


def run_experts(x, rank, ranks):
    experts = experts_of(rank, ranks)
    scales = torch.arange(experts.start + 1, experts.stop + 1, device=x.device)
    return x * scales.view(-1, 1, 1).to(x.dtype)


FORMATS = {
    "bf16": dict(use_fp8=False),
    "fp8": dict(use_fp8=True),
    "rounded": dict(use_fp8=True, round_scale=True),
    "packed": dict(use_fp8=True, round_scale=True, use_ue8m0=True),
}


def dequantized(recv, name):
    if name == "bf16":
        return recv
    rows, scales = recv
    assert rows.dtype == torch.float8_e4m3fn and scales.stride(1) == 1
    if name == "packed":
        assert scales.dtype == torch.int32 and scales.shape[-1] == H // 512
        dense = scales.clone(memory_format=torch.contiguous_format)
        exponents = dense.view(torch.uint8).to(torch.int32) << 23
        scales = exponents.view(torch.float32)
    assert scales.dtype == torch.float32 and scales.shape[-1] == H // 128
    return commlib.dequantize(rows, scales.contiguous())


def reference(x, name):
    if name == "bf16":
        return x
    return commlib.dequantize(*commlib.quantize(x, "fp8_e4m3" if name == "fp8" else "fp8_e4m3_ue8m0"))


@pytest.mark.parametrize("how", ["at once", "hook", "event"])
@pytest.mark.parametrize("name", FORMATS)
def test_each_expert_gets_its_rows_by_source_and_token(world, name, how):
    later = {"at once": {}, "hook": dict(return_recv_hook=True), "event": dict(async_finish=True)}[how]

    def call(buffer, rank):
        stats = torch.full((E // 3,), 100, dtype=torch.int32, device=world.x[rank].device)
        for round in (1, 2):
            recv, count, handle, event, hook = buffer.low_latency_dispatch(
                world.x[rank],
                world.topk_idx[rank],
                M,
                E,
                cumulative_local_expert_recv_stats=stats,
                **FORMATS[name],
                **later,
            )
            assert (hook is not None, event.event is not None) == (how == "hook", how == "event")
            if hook:
                hook()
            if how == "event":
                event.current_stream_wait()
            came = dequantized(recv, name)
            src_info, ranges, *rest = handle
            assert rest == [M, H, E] and came.shape == (E // 3, 3 * M, H)
            assert (count.dtype, src_info.dtype, ranges.dtype) == (torch.int32, torch.int32, torch.int64)
            assert src_info.shape == (E // 3, 3 * M) and ranges.shape == (E // 3, 3)
            for i, expert in enumerate(experts_of(rank, 3)):
                wanted = sent_to(world, expert)
                assert int(count[i]) == len(wanted)
                assert int(stats[i]) == 100 + round * len(wanted)
                assert src_info[i].tolist() == [t for _, t in wanted] + [-1] * (3 * M - len(wanted))
                for source in range(3):
                    begin, n = int(ranges[i, source]) >> 32, int(ranges[i, source]) & 0xFFFFFFFF
                    assert wanted[begin : begin + n] == [w for w in wanted if w[0] == source]
                for row, (source, token) in enumerate(wanted):
                    want = reference(world.x[source][token : token + 1], name)[0]
                    torch.testing.assert_close(came[i, row], want, rtol=0, atol=0)

    on_ranks(world, call, low_latency_mode=True)


@pytest.mark.parametrize("how", ["at once", "hook", "event"])
@pytest.mark.parametrize("where", ["own", "out", "zero copy"])
def test_combine_sums_with_the_weights_of_the_sources(world, where, how):
    later = {"at once": {}, "hook": dict(return_recv_hook=True), "event": dict(async_finish=True)}[how]

    def call(buffer, rank):
        x, idx, weights = world.x[rank], world.topk_idx[rank], world.topk_weights[rank]
        for _ in range(3):
            recv, _, handle, _, _ = buffer.low_latency_dispatch(x, idx, M, E, use_fp8=False)
            y = run_experts(recv, rank, 3)
            options = dict(later)
            if where == "zero copy":
                lent = buffer.get_next_low_latency_combine_buffer(handle)
                assert lent.shape == y.shape
                y, options["zero_copy"] = lent.copy_(y), True
            out = torch.full_like(x, torch.nan) if where == "out" else None
            got, event, hook = buffer.low_latency_combine(y, idx, weights, handle, out=out, **options)
            if hook:
                hook()
            if how == "event":
                event.current_stream_wait()
            assert out is None or got.data_ptr() == out.data_ptr() or len(x) == 0
            torch.testing.assert_close(got, weighted(world, rank), rtol=0.02, atol=0.05)

    on_ranks(world, call, low_latency_mode=True)


def test_two_batches_may_be_under_way_with_hooks(world):
    """vLLM's dual batch overlap: both are sent before either is received."""
    halves = [make_world(TOKENS, E, K, H, torch.bfloat16, seed=s, device=world.device.type) for s in (5, 6)]

    def call(buffer, rank):
        sent = [
            buffer.low_latency_dispatch(
                w.x[rank], w.topk_idx[rank], M, E, use_fp8=True, async_finish=False, return_recv_hook=True
            )
            for w in halves
        ]
        ended = []
        for *_, hook in sent:
            hook()
        for w, (recv, _, handle, _, _) in zip(halves, sent, strict=True):
            y = run_experts(dequantized(recv, "fp8"), rank, 3)
            ended.append(
                buffer.low_latency_combine(
                    y,
                    w.topk_idx[rank],
                    w.topk_weights[rank],
                    handle,
                    async_finish=False,
                    zero_copy=False,
                    return_recv_hook=True,
                    out=torch.empty_like(w.x[rank]),
                )
            )
        for w, (out, _, hook) in zip(halves, ended, strict=True):
            hook()
            torch.testing.assert_close(out, weighted(w, rank), rtol=0.1, atol=0.2)

    on_ranks(world, call, low_latency_mode=True)


def test_one_buffer_serves_both_modes(world):
    """SGLang prefills in normal mode and decodes in low latency mode."""

    def call(buffer, rank):
        x, idx, weights = world.x[rank], world.topk_idx[rank], world.topk_weights[rank]
        layout = buffer.get_dispatch_layout(idx, E)
        for _ in range(2):
            recv, _, _, _, handle, _ = buffer.dispatch(
                x,
                topk_idx=idx,
                topk_weights=weights,
                num_tokens_per_rank=layout[0],
                num_tokens_per_expert=layout[2],
                is_token_in_rank=layout[3],
            )
            buffer.combine(recv, handle)
            buffer.clean_low_latency_buffer(M, H, E)
            recv, _, handle, _, _ = buffer.low_latency_dispatch(x, idx, M, E, use_fp8=False)
            out, _, _ = buffer.low_latency_combine(run_experts(recv, rank, 3), idx, weights, handle)
            torch.testing.assert_close(out, weighted(world, rank), rtol=0.02, atol=0.05)

    on_ranks(world, call, low_latency_mode=True)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["bf16", "fp8"])
def test_a_cuda_graph_may_hold_both(name):
    worlds = [make_world(TOKENS, E, K, H, torch.bfloat16, seed=s, holes=0.2, device="cuda") for s in range(4)]

    def call(buffer, rank):
        x, idx, weights = (getattr(worlds[0], n)[rank].clone() for n in ("x", "topk_idx", "topk_weights"))

        def step():
            recv, _, handle, _, _ = buffer.low_latency_dispatch(x, idx, M, E, **FORMATS[name])
            return buffer.low_latency_combine(
                run_experts(dequantized(recv, name), rank, 3), idx, weights, handle
            )[0]

        step()  # makes the communicators, which a capture cannot
        graph = torch.cuda.CUDAGraph()
        with captured(graph):
            out = step()
        for world in worlds * 3:
            x.copy_(world.x[rank]), idx.copy_(world.topk_idx[rank]), weights.copy_(world.topk_weights[rank])
            graph.replay()
            torch.testing.assert_close(out, weighted(world, rank), rtol=0.1, atol=0.2)

    on_ranks(worlds[0], call, low_latency_mode=True)


# -- what it refuses -----------------------------------------------------------------------------------------

ONE = make_world([5], 4, 2, 256, torch.bfloat16)
IDX = ONE.topk_idx[0]
WRONG = {
    "x must be a tensor, got list": dict(x=[]),
    r"x must be \[tokens, hidden\], got \[256\]": dict(x=torch.zeros(256).bfloat16()),
    "x must be bfloat16, got torch.float32": dict(x=torch.zeros(5, 256)),
    "x has 5 tokens, and num_max_dispatch_tokens_per_rank is 4": dict(num_max_dispatch_tokens_per_rank=4),
    "num_experts must be a positive multiple of the 1 ranks, got 0": dict(num_experts=0),
    r"topk_idx\[0, 0\] is 9": dict(topk_idx=torch.full_like(IDX, 9)),
    "topk_idx has 3 tokens, but x has 5": dict(topk_idx=IDX[:3]),
    r"recv_stats must be \[4\] int32": dict(cumulative_local_expert_recv_stats=torch.zeros(4)),
    "use_ue8m0 needs round_scale": dict(use_ue8m0=True),
    "hidden must be a multiple of 512 for these scales, got 256": dict(round_scale=True, use_ue8m0=True),
    "hidden must be a multiple of 128": dict(x=torch.zeros(5, 64).bfloat16()),
    "exclude each other": dict(async_finish=True, return_recv_hook=True),
}


@pytest.mark.parametrize("text", WRONG)
def test_a_wrong_dispatch_is_refused_before_anything_is_sent(text):
    def call(buffer, rank):
        given = dict(x=ONE.x[0], topk_idx=IDX, num_max_dispatch_tokens_per_rank=8, num_experts=4)
        with pytest.raises((Refused, ValueError, TypeError), match=text):
            buffer.low_latency_dispatch(**given | WRONG[text])
        assert not buffer.runtime._made
        with pytest.raises(NotImplementedError, match="dispatch_wait_recv_cost_stats"):
            buffer.low_latency_dispatch(**given, dispatch_wait_recv_cost_stats=torch.zeros(1))

    on_ranks(ONE, call)


def test_a_wrong_combine_is_refused():
    def call(buffer, rank):
        x, idx, weights = ONE.x[0], IDX, ONE.topk_weights[0]
        recv, _, handle, _, hook = buffer.low_latency_dispatch(
            x, idx, 8, 4, use_fp8=False, return_recv_hook=True
        )
        with pytest.raises(Refused, match="call the hook of low_latency_dispatch before combine"):
            buffer.low_latency_combine(recv, idx, weights, handle)
        hook()
        with pytest.raises(Refused, match="this hook of low_latency_dispatch has been called before"):
            hook()
        for wrong, text in {
            (recv[:, 1:], idx, weights, handle): r"x must be \[4, 8, 256\] bfloat16",
            (recv.float(), idx, weights, handle): r"got \[4, 8, 256\] torch.float32",
            (recv, idx[1:], weights, handle): r"topk_idx must be \[5, 2\], as dispatched",
            (recv, idx, weights.double(), handle): r"topk_weights must be \[5, 2\] float32",
            (recv, idx, weights, tuple(handle)): "the object itself and not a copy",
        }.items():
            with pytest.raises((Refused, TypeError), match=text):
                buffer.low_latency_combine(*wrong)
        for options, text in (
            (dict(zero_copy=True), "what get_next_low_latency_combine_buffer"),
            (dict(out=torch.zeros(4, 256).bfloat16()), r"out must be \[5, 256\]"),
        ):
            with pytest.raises(Refused, match=text):
                buffer.low_latency_combine(recv, idx, weights, handle, **options)
        for name in ("use_logfmt", "combine_wait_recv_cost_stats"):
            with pytest.raises(NotImplementedError, match=name):
                buffer.low_latency_combine(recv, idx, weights, handle, **{name: True})
        out, _, _ = buffer.low_latency_combine(recv, idx, weights, handle)
        assert out.shape == x.shape
        with pytest.raises(Refused, match="no low_latency_dispatch"):
            buffer.get_next_low_latency_combine_buffer(type(handle)(handle))

    on_ranks(ONE, call)


def test_sizes_for_memory_are_only_a_hint():
    assert Buffer.get_low_latency_rdma_size_hint(128, 7168, 8, 64) >= 2 * 128 * 64 * 7168 * 2
