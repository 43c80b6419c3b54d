"""The calls that Megatron-Core, vLLM and SGLang make of DeepEP, in their order, over commlib's module.

The code around them is written anew here, as small as possible. docs/deepep.md says which versions are meant.
"""

import pytest
import torch
from deep_ep_reference import EXACT, on_ranks
from reference import apply_experts, expected_combine, expected_rank_layout, expert_scale, make_world

from commlib.compat import install

deep_ep = install()

from deep_ep import Buffer, Config  # noqa: E402
from deep_ep.utils import EventHandle, EventOverlap  # noqa: E402

E, K, H = 8, 3, 16


def close(got, want, **tolerance):
    torch.testing.assert_close(got.cpu(), want.to(got.dtype).cpu(), **tolerance)


# -- Megatron-Core: two autograd functions around the calls, which are asynchronous --------------------------


def sizes_for(group_size, hidden_bytes):
    """Of the two buffers, from all configs."""
    nvl = rdma = 0
    for config in (Buffer.get_dispatch_config(group_size), Buffer.get_combine_config(group_size)):
        nvl = max(config.get_nvl_buffer_size_hint(hidden_bytes, group_size), nvl)
        rdma = max(config.get_rdma_buffer_size_hint(hidden_bytes, group_size), rdma)
    return nvl, rdma


class Calls:
    """The arguments of Megatron's calls beside tensors."""

    def __init__(self, buffer, asynchronous):
        self.buffer, self.asynchronous = buffer, asynchronous

    def options(self, event=None):
        if self.asynchronous and event is None:
            event = EventOverlap(EventHandle())
        rest = dict(async_finish=self.asynchronous, allocate_on_comm_stream=self.asynchronous)
        return dict(previous_event=event if self.asynchronous else None) | rest

    def done(self, event):
        if self.asynchronous:
            event.current_stream_wait()


class FusedDispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, topk_idx, topk_weights, num_experts, calls):
        per_rank, per_node, per_expert, mask, event = calls.buffer.get_dispatch_layout(
            topk_idx, num_experts, **calls.options()
        )
        recv_x, recv_idx, recv_weights, counts, handle, event = calls.buffer.dispatch(
            x,
            topk_idx=topk_idx,
            topk_weights=topk_weights,
            num_tokens_per_rank=per_rank,
            num_tokens_per_rdma_rank=per_node,
            is_token_in_rank=mask,
            num_tokens_per_expert=per_expert,
            **calls.options(event),
        )
        calls.done(event)
        ctx.calls, ctx.handle = calls, handle
        ctx.mark_non_differentiable(recv_idx)
        return recv_x, recv_idx, recv_weights, torch.tensor(counts), handle

    @staticmethod
    def backward(ctx, grad_x, _idx, grad_weights, _counts, _handle):
        grad_x, grad_weights, event = ctx.calls.buffer.combine(
            grad_x.contiguous(), ctx.handle, topk_weights=grad_weights.float(), **ctx.calls.options()
        )
        ctx.calls.done(event)
        return grad_x, None, grad_weights, None, None


class FusedCombine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, handle, calls):
        combined, _, event = calls.buffer.combine(x, handle=handle, **calls.options())
        calls.done(event)
        ctx.calls, ctx.handle = calls, handle
        return combined

    @staticmethod
    def backward(ctx, grad):
        grad_x, *_, event = ctx.calls.buffer.dispatch(
            grad.contiguous(), handle=ctx.handle, **ctx.calls.options()
        )
        ctx.calls.done(event)
        return grad_x, None, None


def through_local_experts(x, idx, weights, counts, first):
    """Permuted by expert, computed, weighted and put back, as in the flex dispatcher without fusion."""
    token, place = (idx >= 0).nonzero(as_tuple=True)
    order = idx[token, place].argsort(stable=True)
    token, place = token[order], place[order]
    assert torch.bincount(idx[token, place], minlength=len(counts)).tolist() == counts.tolist()
    scales = torch.tensor([expert_scale(first + e) for e in range(len(counts))], device=x.device)
    rows = (x[token] * scales[idx[token, place]].view(-1, 1).to(x.dtype)).tanh()
    rows = rows * weights[token, place].view(-1, 1).to(x.dtype)
    return torch.zeros_like(x).index_add(0, token, rows)


def plain_layer(x, idx, weights):
    """The same, not distributed."""
    out = torch.zeros_like(x)
    for k in range(idx.shape[1]):
        here = idx[:, k] >= 0
        scales = torch.tensor([expert_scale(e) for e in idx[:, k].tolist()], dtype=x.dtype).view(-1, 1)
        out = out + (x * scales).tanh() * (weights[:, k] * here).view(-1, 1).to(x.dtype)
    return out


def needing_grad(*tensors):
    return [t.clone().requires_grad_() for t in tensors]


@pytest.mark.parametrize("asynchronous", [True, False])
def test_megatrons_dispatcher_forward_and_backward(asynchronous):
    """Two micro-batches are under way, as in a pipeline. float32 on the CPU, to compare gradients."""
    worlds = [make_world([6, 0, 9, 4], E, K, H, seed=s, holes=0.2) for s in range(2)]

    def call(buffer, rank):
        sized = Buffer(buffer.group, *sizes_for(buffer.group_size, H * 4))
        assert sized.num_nvl_bytes > 0 and sized.num_rdma_bytes == 0 and sized.group is buffer.group
        calls, first = Calls(buffer, asynchronous), rank * E // 4
        outs, leaves = [], []
        for world in worlds:
            x, weights = needing_grad(world.x[rank], world.topk_weights[rank])
            got, idx, w, counts, handle = FusedDispatch.apply(x, world.topk_idx[rank], weights, E, calls)
            y = through_local_experts(got, idx, w, counts, first)
            outs.append(FusedCombine.apply(y, handle, calls))
            leaves.append((x, weights))
        for out in reversed(outs):  # later handles first
            out.backward(torch.linspace(-1, 1, out.numel()).view_as(out))
        return [(out.detach(), x.grad, w.grad) for out, (x, w) in zip(outs, leaves, strict=True)]

    for rank, found in enumerate(on_ranks(worlds[0], call)):
        for world, (out, grad_x, grad_weights) in zip(worlds, found, strict=True):
            x, weights = needing_grad(world.x[rank], world.topk_weights[rank])
            want = plain_layer(x, world.topk_idx[rank], weights)
            want.backward(torch.linspace(-1, 1, want.numel()).view_as(want))
            close(out, want.detach())
            close(grad_x, x.grad)
            close(grad_weights, weights.grad)


def test_megatrons_dispatcher_in_bfloat16(device):
    world = make_world([6, 9], E, K, H, torch.bfloat16, holes=0, device=device)

    def call(buffer, rank):
        calls = Calls(buffer, True)
        x, weights = needing_grad(world.x[rank], world.topk_weights[rank])
        got, idx, w, counts, handle = FusedDispatch.apply(x, world.topk_idx[rank], weights, E, calls)
        out = FusedCombine.apply(through_local_experts(got, idx, w, counts, rank * E // 2), handle, calls)
        out.sum().backward()
        return out.detach(), x.grad, weights.grad

    for rank, (out, grad_x, grad_weights) in enumerate(on_ranks(world, call)):
        x, weights = needing_grad(world.x[rank].cpu().float(), world.topk_weights[rank].cpu())
        want = plain_layer(x, world.topk_idx[rank].cpu(), weights)
        want.sum().backward()
        for got, expected in ((out, want.detach()), (grad_x, x.grad)):
            close(got, expected, rtol=0.05, atol=0.05)
        close(grad_weights, weights.grad, rtol=0.05, atol=0.1)


# -- vLLM, deepep_high_throughput: prepare and finalize, and two micro-batches at a time ---------------------


class HighThroughput:
    """prepare_async and finalize_async: each issues, and returns the function that receives."""

    def __init__(self, buffer, rank, config):
        self.buffer, self.config = buffer, config
        self.first = rank * E // buffer.group_size
        self.handles = {}

    def prepare(self, x, topk_idx, topk_weights, batch):
        previous = self.buffer.capture()
        per_rank, per_node, per_expert, mask, event = self.buffer.get_dispatch_layout(
            topk_idx=topk_idx,
            num_experts=E,
            previous_event=previous,
            async_finish=False,
            allocate_on_comm_stream=False,
        )
        got, idx, weights, counts, self.handles[batch], event = self.buffer.dispatch(
            x=x,
            handle=None,
            num_tokens_per_rank=per_rank,
            num_tokens_per_rdma_rank=per_node,
            is_token_in_rank=mask,
            num_tokens_per_expert=per_expert,
            topk_idx=topk_idx,
            topk_weights=topk_weights,
            expert_alignment=1,
            config=self.config,
            previous_event=previous,
            async_finish=True,
            allocate_on_comm_stream=False,
        )
        return lambda: self.received(event, got, idx, weights, counts)

    def received(self, event, got, idx, weights, counts):
        if event.event is not None:
            event.current_stream_wait()
        return got, torch.where(idx == -1, -1, idx + self.first), weights, counts

    def finalize(self, output, y, batch):
        combined, _, event = self.buffer.combine(
            x=y,
            handle=self.handles.pop(batch),
            topk_weights=None,
            config=self.config,
            previous_event=self.buffer.capture(),
            async_finish=True,
            allocate_on_comm_stream=False,
        )

        def receive():
            if event.event is not None:
                event.current_stream_wait()
            output.copy_(combined, non_blocking=True)

        return receive


def sum_of_experts(x, ids, weights):
    """A rank's part of the layer, on rows with the ids of its experts; in the dtype of the rows."""
    scales = torch.tensor([expert_scale(e) for e in range(E)], device=x.device)
    factors = (scales[ids.clamp(min=0)] * weights).masked_fill(ids < 0, 0).sum(1, keepdim=True)
    return (x.float() * factors).bfloat16()


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("with_config", [False, True])
def test_vllms_prepare_and_finalize(device, with_config, fp8):
    worlds = [make_world([6, 11], E, K, H, torch.bfloat16, s, holes=0.2, device=device) for s in range(2)]

    def call(buffer, rank):
        config = Buffer.get_dispatch_config(2) if with_config else None
        layer = HighThroughput(buffer, rank, config)
        rows = [w.x[rank] for w in worlds]
        if fp8:
            rows = [
                ((x / 2).to(torch.float8_e4m3fn), torch.full((len(x), 1), 2.0, device=device)) for x in rows
            ]
        receivers = [
            layer.prepare(x, w.topk_idx[rank], w.topk_weights[rank], i)
            for i, (x, w) in enumerate(zip(rows, worlds, strict=True))
        ]
        outputs, finals = [torch.empty_like(w.x[rank]) for w in worlds], []
        for i, receive in enumerate(receivers):
            got, ids, weights, counts = receive()
            if fp8:
                got = (got[0].float() * got[1]).bfloat16()
            assert sum(counts) == int((ids >= 0).sum())
            finals.append(layer.finalize(outputs[i], sum_of_experts(got, ids, weights), i))
        for receive in finals:
            receive()
        return outputs

    for rank, outputs in enumerate(on_ranks(worlds[0], call)):
        for world, out in zip(worlds, outputs, strict=True):
            close(out, expected_combine(world, rank), rtol=0.1 if fp8 else 0.02, atol=0.2 if fp8 else 0.03)


# -- SGLang, normal mode: four steps, between which two batches overlap --------------------------------------


class Normal:
    """dispatch_a, dispatch_b, combine_a, combine_b of one batch."""

    def __init__(self, buffer, config, asynchronous):
        self.buffer, self.config, self.asynchronous = buffer, config, asynchronous

    def capture(self):
        return Buffer.capture() if self.asynchronous else None

    def options(self, event):
        rest = dict(async_finish=self.asynchronous)
        return (
            dict(previous_event=event, allocate_on_comm_stream=event is not None and self.asynchronous) | rest
        )

    def dispatch_a(self, x, topk_ids, topk_weights):
        return x, topk_ids.to(torch.int64), topk_weights, self.capture()

    def dispatch_b(self, x, topk_ids, topk_weights, previous):
        per_rank, per_node, per_expert, mask, previous = self.buffer.get_dispatch_layout(
            topk_ids, E, **self.options(previous)
        )
        got, ids, weights, counts, self.handle, event = self.buffer.dispatch(
            x,
            topk_idx=topk_ids,
            topk_weights=topk_weights,
            num_tokens_per_rank=per_rank,
            num_tokens_per_rdma_rank=per_node,
            is_token_in_rank=mask,
            num_tokens_per_expert=per_expert,
            **self.options(previous if self.asynchronous else None),
            expert_alignment=128,
            config=self.config,
        )
        if self.asynchronous:
            event.current_stream_wait()
        return got, ids, weights, counts

    def combine_a(self, y):
        return y, self.capture()

    def combine_b(self, y, previous):
        out, _, event = self.buffer.combine(y, self.handle, **self.options(previous), config=self.config)
        if self.asynchronous:
            event.current_stream_wait()
        self.handle = None
        return out


@pytest.mark.parametrize("asynchronous", [False, True])
def test_sglangs_four_steps_with_two_batches(device, asynchronous):
    worlds = [make_world([6, 11], E, K, H, torch.bfloat16, s, holes=0.2, device=device) for s in range(2)]

    def call(buffer, rank):
        assert buffer.group_size == 2 and not buffer.low_latency_mode and Buffer.num_sms == 20
        config = Config(
            **dict(num_sms=20, num_max_nvl_chunked_send_tokens=8, num_max_nvl_chunked_recv_tokens=256)
        )
        batches = [Normal(buffer, config, asynchronous) for _ in worlds]
        begun = [
            batch.dispatch_a(w.x[rank], w.topk_idx[rank].int(), w.topk_weights[rank])
            for batch, w in zip(batches, worlds, strict=True)
        ]
        received = [batch.dispatch_b(*args) for batch, args in zip(batches, begun, strict=True)]
        ended, all_counts = [], []
        for batch, (x, ids, weights, counts) in zip(batches, received, strict=True):
            ids = torch.where(ids < 0, -1, ids + rank * E // 2)
            ended.append(batch.combine_a(sum_of_experts(x, ids, weights)))
            all_counts.append(counts)
        outs = [batch.combine_b(*args) for batch, args in zip(batches, ended, strict=True)]
        buffer.clean_low_latency_buffer(128, H, E)
        return outs, all_counts

    for rank, (outs, all_counts) in enumerate(on_ranks(worlds[0], call)):
        for world, out, counts in zip(worlds, outs, all_counts, strict=True):
            close(out, expected_combine(world, rank), rtol=0.02, atol=0.03)
            tokens = expected_rank_layout(world, rank).tokens_per_expert
            assert counts == [-(-n // 128) * 128 for n in tokens]


# -- DeepEP's second interface, as torchtitan, vLLM and DeepSpeed call it ------------------------------------


def test_expanded_rows_go_through_grouped_experts(device):
    """do_expand: experts see their group of rows; scores are applied before combine."""
    world = make_world([6, 11, 2], 6, K, H, torch.bfloat16, holes=0.2, device=device)

    def call(buffer, rank):
        x, _, weights, handle, event = buffer.dispatch(
            world.x[rank],
            topk_idx=world.topk_idx[rank],
            topk_weights=world.topk_weights[rank],
            num_experts=6,
            expert_alignment=8,
            do_expand=True,
            async_with_compute_stream=True,
        )
        event.current_stream_wait(release_handle=True)
        ends = torch.tensor(handle.num_recv_tokens_per_expert_list).cumsum(0).tolist()
        y = apply_experts(world, rank, x, [0, *ends])
        y = (y.float() * weights.view(-1, 1)).bfloat16()
        out, _, event = buffer.combine(y, handle, async_with_compute_stream=True)
        with event:
            pass
        return out

    found = on_ranks(world, call, deep_ep.ElasticBuffer, num_max_tokens_per_rank=16, hidden=H, num_topk=K)
    for rank, out in enumerate(found):
        close(out, expected_combine(world, rank), rtol=0.02, atol=0.03)


def test_second_interface_gradients_go_back_along_the_handle(device):
    """Backward of an expanding dispatch is a combine with weight gradients; of a combine, a dispatch."""
    world = make_world([5, 7], 4, 2, H, torch.bfloat16, holes=0.2, device=device)

    def call(buffer, rank):
        ids, weights = world.topk_idx[rank], world.topk_weights[rank]
        rest = dict(num_experts=4, expert_alignment=4, do_expand=True)
        x, _, w, handle, _ = buffer.dispatch(world.x[rank], ids, weights, **rest)
        _, grad_weights, _ = buffer.combine(x, handle, topk_weights=w * 2)
        grad, _, again, _, _ = buffer.dispatch(
            world.x[rank], topk_weights=weights, handle=handle, do_expand=True, do_zero_padding=True
        )
        torch.testing.assert_close(grad, x, **EXACT)
        torch.testing.assert_close(again, w, **EXACT)
        return grad_weights

    found = on_ranks(world, call, deep_ep.ElasticBuffer, num_max_tokens_per_rank=8)
    for rank, grad_weights in enumerate(found):
        want = 2 * world.topk_weights[rank].masked_fill(world.topk_idx[rank] < 0, 0)
        torch.testing.assert_close(grad_weights, want.cpu(), **EXACT)
