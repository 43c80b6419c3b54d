"""Megatron-Core's flexible token dispatcher over ``commlib.compat.deep_ep``, beside its all-to-all one.

The dispatchers alone, on the CPU: the rest of Megatron's layers needs a GPU.
"""

import contextlib
import sys

import pytest
import torch
import torch.distributed as dist

from commlib import compat

HIDDEN, EXPERTS, TOPK, TOKENS = 16, 8, 3, 10


@pytest.fixture(scope="module", autouse=True)
def megatron():
    """Megatron's module of dispatchers, imported where ``deep_ep`` is commlib's, as in no other test."""
    before = set(sys.modules)
    compat.install()
    from megatron.core.transformer.moe import token_dispatcher

    with torch.compiler.set_stance("force_eager"):  # else each process of each test compiles permutations
        yield token_dispatcher
    for name in set(sys.modules) - before:
        if name.partition(".")[0] == "deep_ep":
            del sys.modules[name]


class HostStream:
    """In place of the streams and events with which the all-to-all dispatcher copies counts to the host."""

    def wait_stream(self, stream):
        pass

    def record_event(self):
        return self

    def synchronize(self):
        pass


def on_the_host(megatron):
    """Let the all-to-all dispatcher run without a GPU, in this process, which ends with the test."""
    stream = HostStream()
    torch.cuda.Stream = torch.cuda.current_stream = lambda *_: stream
    torch.cuda.stream = lambda _: contextlib.nullcontext()
    torch.cuda.current_device = lambda: torch.device("cpu")
    megatron.maybe_move_tensor_to_cpu = lambda tensor, as_numpy=False, record_stream=False: (
        tensor.numpy() if as_numpy and tensor is not None else tensor
    )


def groups_of(rank, ranks, tp):
    """Process groups as Megatron has them: consecutive ranks are tensor-parallel."""
    from megatron.core.process_groups_config import ProcessGroupCollection

    found = ProcessGroupCollection()
    for name, members in [
        *(("expt_tp", range(first, first + tp)) for first in range(0, ranks, tp)),
        *(("ep", range(first, ranks, tp)) for first in range(tp)),
    ]:
        group = dist.new_group(list(members))
        if rank in members:
            setattr(found, name, group)
    found.tp_ep = dist.group.WORLD
    return found


def dispatcher(megatron, kind, groups, **options):
    from megatron.core.transformer.transformer_config import TransformerConfig

    config = TransformerConfig(
        num_layers=1,
        hidden_size=HIDDEN,
        num_attention_heads=1,
        add_bias_linear=False,
        num_moe_experts=EXPERTS,
        moe_router_topk=TOPK,
        moe_router_dtype="fp32",
        moe_token_dispatcher_type=kind,
        expert_model_parallel_size=groups.ep.size(),
        expert_tensor_parallel_size=groups.expt_tp.size(),
        **options,
    )
    if kind == "flex":
        config.moe_flex_dispatcher_backend = "deepep"
    which = dict(flex=megatron.MoEFlexTokenDispatcher, alltoall=megatron.MoEAlltoAllTokenDispatcher)[kind]
    local = EXPERTS // groups.ep.size()
    first = groups.ep.rank() * local
    return which(local, list(range(first, first + local)), config, groups)


def batch(rank, micro=0, dtype=torch.float32, of=range(EXPERTS)):
    """Tokens ``[sequence, batch, HIDDEN]`` and logits ``[tokens, EXPERTS]`` that choose experts in ``of``."""
    generator = torch.Generator().manual_seed(10 * micro + rank)
    x = torch.randn(TOKENS, 2, HIDDEN, generator=generator).to(dtype)
    logits = torch.randn(2 * TOKENS, EXPERTS, generator=generator)
    logits += torch.tensor([0.0 if e in of else -100.0 for e in range(EXPERTS)])
    return x.requires_grad_(), logits.requires_grad_()


def routed(logits, dropped=0.0):
    """Probabilities and map ``[tokens, EXPERTS]``; the part ``dropped`` is left out, as beyond a capacity."""
    probs, idx = logits.softmax(-1).topk(TOPK, -1)
    kept = torch.rand(probs.shape, generator=torch.Generator().manual_seed(7)) >= dropped
    dense = torch.zeros_like(logits).scatter(1, idx, probs * kept)
    return dense, dense > 0


def expert(rows, number):
    """A different function for each expert, its number for each row: ``[R, HIDDEN]``, ``[R]``."""
    return torch.tanh(rows * (1.0 + number.unsqueeze(-1)).to(rows.dtype))


def run(dispatcher, x, probs, routing_map):
    """A layer without a router: its output, how many rows each local expert got, and the rows."""
    rows, weights = dispatcher.dispatch_preprocess(x, routing_map, probs)
    rows, weights = dispatcher.token_dispatch(rows, weights)
    rows, counts, weights = dispatcher.dispatch_postprocess(rows, weights)
    numbers = torch.tensor(dispatcher.local_expert_indices).repeat_interleave(counts)
    y = expert(rows, numbers) * weights.unsqueeze(-1).to(rows.dtype)
    out = dispatcher.combine_postprocess(dispatcher.token_combine(dispatcher.combine_preprocess(y)))
    return out, counts, rows


def plain(x, probs, routing_map):
    """The same in plain PyTorch, on one rank with all experts."""
    tokens = x.reshape(-1, HIDDEN)
    out = torch.zeros_like(tokens, dtype=torch.float32)
    for e in range(EXPERTS):
        y = expert(tokens, torch.full((tokens.shape[0],), e)) * probs[:, e, None].to(x.dtype)
        out = out + torch.where(routing_map[:, e, None], y, 0.0).float()
    return out.to(x.dtype).view(x.shape)


def step(layer, x, logits, dropped=0.0):
    """Output, gradients of tokens and logits, and the layer's other results."""
    out, *rest = layer(x, *routed(logits, dropped))
    (out.float() * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum().backward()
    return out.detach(), x.grad, logits.grad, *(it.detach() for it in rest)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ranks", [2, 4])
def test_results_and_gradients_are_those_of_the_all_to_all_dispatcher_and_of_plain_torch(
    torch_ranks, megatron, ranks, dtype
):
    def main(rank):
        on_the_host(megatron)
        groups = groups_of(rank, ranks, 1)
        said = []
        for kind in "flex", "alltoall":
            one = dispatcher(megatron, kind, groups)
            said.append(step(lambda *given, one=one: run(one, *given), *batch(rank, dtype=dtype)))
        return *said, step(lambda *given: [plain(*given)], *batch(rank, dtype=dtype))

    close = {} if dtype == torch.float32 else dict(rtol=2e-2, atol=2e-2)
    for flex, alltoall, wanted in torch_ranks(main, ranks):
        torch.testing.assert_close(flex[:3], alltoall[:3], **close)
        torch.testing.assert_close(flex[:3], wanted, **close)
        for mine, theirs in zip(flex[3:], alltoall[3:], strict=True):  # counts and rows, in the same order
            assert torch.equal(mine, theirs)


def test_tensor_parallel_ranks_get_the_same_rows_and_their_results_are_added(torch_ranks, megatron):
    def main(rank):
        one = dispatcher(megatron, "flex", groups_of(rank, 4, 2))
        flex = step(lambda *given: run(one, *given), *batch(rank))
        return flex, step(lambda *given: [2 * plain(*given)], *batch(rank))

    found = torch_ranks(main, 4)
    for flex, wanted in found:
        torch.testing.assert_close(flex[:3], wanted)
    for first in 0, 2:
        (*_, counts, rows), (*_, other_counts, other_rows) = found[first][0], found[first + 1][0]
        assert torch.equal(counts, other_counts)
        assert torch.equal(rows, other_rows)


def test_places_beyond_the_capacity_are_left_out(torch_ranks, megatron):
    def main(rank):
        one = dispatcher(megatron, "flex", groups_of(rank, 2, 1), moe_expert_capacity_factor=1.0)
        flex = step(lambda *given: run(one, *given), *batch(rank), dropped=0.6)
        return flex[:3], step(lambda *given: [plain(*given)], *batch(rank), dropped=0.6)

    for flex, wanted in torch_ranks(main, 2):
        assert (wanted[0].abs().sum(-1) == 0).any()  # a token with nothing left
        torch.testing.assert_close(flex, wanted)


def test_a_rank_whose_experts_no_token_chooses(torch_ranks, megatron):
    def main(rank):
        one = dispatcher(megatron, "flex", groups_of(rank, 2, 1))
        flex = step(lambda *given: run(one, *given), *batch(rank, of=range(4)))
        assert flex[3].sum() == (4 * TOKENS * TOPK, 0)[rank]
        return flex[:3], step(lambda *given: [plain(*given)], *batch(rank, of=range(4)))

    for flex, wanted in torch_ranks(main, 2):
        torch.testing.assert_close(flex, wanted)


def test_batches_in_flight_as_in_a_pipeline(torch_ranks, megatron):
    """Three forwards of two layers, then their backwards, the oldest first."""

    def main(rank):
        groups = groups_of(rank, 2, 1)
        layers = [dispatcher(megatron, "flex", groups) for _ in range(2)]
        given = [batch(rank, micro) for micro in range(3)]
        outs = []
        for x, logits in given:
            for one in layers:
                x = run(one, x, *routed(logits))[0]
            outs.append(x)
        for out in outs:
            out.square().sum().backward()
        return [(out.detach(), x.grad, logits.grad) for out, (x, logits) in zip(outs, given, strict=True)]

    for rank, found in enumerate(torch_ranks(main, 2)):
        for micro, got in enumerate(found):
            x, logits = batch(rank, micro)
            out = plain(plain(x, *routed(logits)), *routed(logits))
            out.square().sum().backward()
            torch.testing.assert_close(got, (out.detach(), x.grad, logits.grad))
