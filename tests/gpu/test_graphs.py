"""CUDA graphs: what is captured once is run again and again, without Python, and each time with other ids."""

import gc
import runpy
import sys
from pathlib import Path

import pytest
import torch
from capture import captured, one_at_a_time
from reference import make_world

import commlib
from commlib import CapacityExceeded, CommError, ExpertParallel

EXPERTS, TOPK, TOKENS, HIDDEN = 8, 2, 12, 64
CONFIG = {"num_experts": EXPERTS, "hidden": HIDDEN, "topk": TOPK, "max_tokens": TOKENS, "num_sms": 1}
CONFIG |= {"dtype": torch.float32, "slots": 8, "rows_per_expert": 3 * TOKENS}

pytestmark = pytest.mark.gpu


class Inputs:
    """What a graph reads, and where: other ids and values for each run, the same on no two ranks."""

    def __init__(self, rank):
        self._random = torch.Generator().manual_seed(rank)
        self.x = torch.zeros(TOKENS, HIDDEN, device="cuda")
        self.idx = torch.zeros(TOKENS, TOPK, dtype=torch.int64, device="cuda")
        self.weights = torch.zeros(TOKENS, TOPK, device="cuda")
        self.change()

    def change(self):
        scores = torch.rand(TOKENS, EXPERTS, generator=self._random)
        idx = scores.topk(TOPK).indices
        idx[torch.rand(TOKENS, TOPK, generator=self._random) < 0.2] = -1
        self.idx.copy_(idx)
        self.x.copy_(torch.randn(TOKENS, HIDDEN, generator=self._random))
        self.weights.copy_(torch.rand(TOKENS, TOPK, generator=self._random))

    def __iter__(self):
        return iter((self.x, self.idx, self.weights))


def experts(ep, d, layout):
    """Expert e multiplies by e + 1. In layout "rank" by the weights, too: sums of groups have theirs."""
    first = ep.rank * EXPERTS // ep.size
    if layout == "rank":
        ids = torch.where(d.topk_idx < 0, 0, first + d.topk_idx + 1)
        return torch.tanh(d.x) * (ids * d.topk_weights).sum(-1, keepdim=True)
    if layout == "batched":
        e = torch.arange(d.x.shape[0], device="cuda")[:, None, None]
    else:
        rows = torch.arange(d.x.shape[0], device="cuda")
        e = torch.searchsorted(d.offsets[1:], rows, right=True)[:, None]
    return torch.tanh(d.x) * (first + e + 1)


def layer(ep, inputs, layout, **options):
    d = ep.dispatch(*inputs, layout=layout, **options)
    weights = None if layout == "rank" else d.topk_weights
    return d, ep.combine(experts(ep, d, layout), d.handle, weights=weights)


def plain(inputs):
    """The same on one rank."""
    x, idx, weights = inputs
    ids = torch.where(idx < 0, 0, idx + 1)
    return torch.tanh(x) * (ids * weights).sum(-1, keepdim=True)


@pytest.mark.parametrize(("layout", "runs"), [("rank", 100), ("expert", 100), ("batched", 1000)])
def test_each_run_of_a_graph_takes_the_way_of_its_ids(layout, runs):
    def rank_main(rank):
        with ExpertParallel(**CONFIG) as ep, torch.no_grad():
            inputs = Inputs(rank)
            layer(ep, inputs, layout, bounded=True)
            graph = torch.cuda.CUDAGraph()
            with captured(graph):
                d, out = layer(ep, inputs, layout, bounded=True)
            exact = "expert" if layout == "batched" else layout
            for run in range(runs):
                inputs.change()
                graph.replay()
                got = out.clone()
                torch.testing.assert_close(got, plain(inputs))
                if run % 10 == 0:  # other operations may come between, and have the same results
                    rows = int(d.tokens_per_expert.sum() if layout == "batched" else d.num_rows)
                    other, want = layer(ep, inputs, exact)
                    assert other.source.shape[0] == rows
                    torch.testing.assert_close(got, want, rtol=0, atol=0)
            ep.synchronize()

    commlib.run_ranks(rank_main, 2, device="cuda")


def test_a_graph_may_wait_for_an_event_of_its_own():
    def rank_main(rank):
        with ExpertParallel(**CONFIG) as ep, torch.no_grad():
            inputs = Inputs(rank)
            graph = torch.cuda.CUDAGraph()
            with captured(graph):
                d = ep.dispatch(*inputs, layout="rank", bounded=True, async_op=True)
                beside = inputs.x.square()
                d = d.finish()
                out, event = ep.combine(experts(ep, d, "rank"), d.handle, async_op=True)
                beside += 1
                event.wait()
            for _ in range(10):
                inputs.change()
                graph.replay()
                torch.testing.assert_close(out, plain(inputs))
                torch.testing.assert_close(beside, inputs.x.square() + 1)

    commlib.run_ranks(rank_main, 2, device="cuda")


@pytest.mark.parametrize("layout", ["rank", "expert", "batched"])
def test_a_step_forward_and_backward_may_be_captured(layout):
    def rank_main(rank):
        with ExpertParallel(**CONFIG) as ep:
            inputs = Inputs(rank)
            asked = inputs.x.requires_grad_(), inputs.weights.requires_grad_()

            def step(of):
                return torch.autograd.grad(of.pow(2).sum(), asked)

            step(layer(ep, inputs, layout, bounded=True)[1])
            graph = torch.cuda.CUDAGraph()
            with captured(graph):
                got = step(layer(ep, inputs, layout, bounded=True)[1])
            for _ in range(20):
                with torch.no_grad():
                    inputs.change()
                graph.replay()
                for mine, want in zip(got, step(plain(inputs)), strict=True):
                    torch.testing.assert_close(mine, want)

    commlib.run_ranks(rank_main, 2, device="cuda")


def test_a_bounded_layer_may_be_captured():
    def rank_main(rank):
        with ExpertParallel(**CONFIG | {"dtype": torch.bfloat16}) as ep, torch.no_grad():
            with one_at_a_time:
                torch.manual_seed(rank)
                options = {"bounded": True, "device": "cuda", "dtype": torch.bfloat16}
                layer = commlib.nn.MoELayer(HIDDEN, 32, EXPERTS, TOPK, ep, **options)
            x = Inputs(rank).x.bfloat16()
            layer(x)
            graph = torch.cuda.CUDAGraph()
            with captured(graph):
                out = layer(x)
            random = torch.Generator().manual_seed(rank)
            for _ in range(10):
                x.copy_(torch.randn(TOKENS, HIDDEN, generator=random))
                graph.replay()
                torch.testing.assert_close(out.clone(), layer(x), rtol=0, atol=0)

    commlib.run_ranks(rank_main, 2, device="cuda")


def test_what_follows_a_dispatch_may_be_captured_with_its_handle():
    world = make_world([12, 7], 8, 2, 64, torch.float32, 1).to("cuda")

    def rank_main(rank):
        with ExpertParallel(**world.config(), num_sms=1) as ep, torch.no_grad():
            x = world.x[rank].clone()
            d = ep.dispatch(x, world.topk_idx[rank], world.topk_weights[rank])
            graph = torch.cuda.CUDAGraph()
            with captured(graph):
                again = ep.dispatch(x, None, handle=d.handle)
                out = ep.combine(again.x * 2, d.handle)
            for scale in (1.0, -3.0):
                x.copy_(world.x[rank] * scale)
                graph.replay()
                want = ep.combine(d.x * 2 * scale, d.handle)
                torch.testing.assert_close(out, want, rtol=0, atol=0)

    commlib.run_ranks(rank_main, 2, device="cuda")


@pytest.mark.parametrize("bounded", [False, True])
def test_a_graph_keeps_the_routing_of_a_handle_that_nobody_has_any_more(bounded):
    def rank_main(rank):
        with ExpertParallel(**CONFIG) as ep, torch.no_grad():
            inputs, graph = Inputs(rank), torch.cuda.CUDAGraph()
            d = ep.dispatch(*inputs, layout="rank", bounded=bounded)
            x, want = d.x, ep.combine(d.x * 2, d.handle)
            with captured(graph):
                out = ep.combine(x * 2, d.handle)
                again = ep.dispatch(inputs.x, None, handle=d.handle).x
            came = x.shape[0] if not bounded else int(d.num_rows)
            del d
            gc.collect()
            refilled = [torch.full((n,), 7, dtype=torch.int64, device="cuda") for n in range(1, 200)]
            graph.replay()
            torch.testing.assert_close(out, want, rtol=0, atol=0)
            torch.testing.assert_close(again[:came], x[:came], rtol=0, atol=0)
            assert len(refilled) == 199

    commlib.run_ranks(rank_main, 2, device="cuda")


def test_closing_waits_for_graphs_that_run():
    def rank_main(rank):
        graph, inputs = torch.cuda.CUDAGraph(), Inputs(rank)
        with ExpertParallel(**CONFIG) as ep, torch.no_grad():
            with captured(graph):
                _, out = layer(ep, inputs, "rank", bounded=True)
            torch.cuda._sleep(50_000_000)
            graph.replay()
        torch.testing.assert_close(out, plain(inputs))

    commlib.run_ranks(rank_main, 2, device="cuda")


def test_a_communicator_that_may_grow_cannot_be_captured():
    def rank_main(rank):
        with ExpertParallel(**CONFIG | {"max_tokens": None, "rows_per_expert": None}) as ep, torch.no_grad():
            inputs = Inputs(rank)
            d = ep.dispatch(*inputs)
            y = experts(ep, d, "rank")
            with pytest.raises(CommError, match="give max_tokens"), captured(torch.cuda.CUDAGraph()):
                ep.combine(y, d.handle)
            torch.testing.assert_close(ep.combine(y, d.handle), plain(inputs))

    commlib.run_ranks(rank_main, 2, device="cuda")


def test_a_combine_buffer_of_a_graph_is_lent_within_it():
    def rank_main(rank):
        with ExpertParallel(**CONFIG) as ep, torch.no_grad():
            inputs, graph = Inputs(rank), torch.cuda.CUDAGraph()
            d = ep.dispatch(*inputs)
            y, lent = experts(ep, d, "rank"), ep.combine_buffer(d.handle)
            with pytest.raises(CommError, match="lent before the capture"), captured(torch.cuda.CUDAGraph()):
                ep.combine(lent, d.handle)
            del lent
            gc.collect()
            with captured(graph):
                lent = ep.combine_buffer(d.handle)
                lent.copy_(y)
                out = ep.combine(lent, d.handle)
            for _ in range(20):
                graph.replay()
                torch.cuda._sleep(rank * 1_000_000)
                torch.testing.assert_close(out, plain(inputs))

    commlib.run_ranks(rank_main, 2, device="cuda")


def test_a_dispatch_whose_sizes_the_host_reads_cannot_be_captured():
    def rank_main(rank):
        with ExpertParallel(**CONFIG) as ep, torch.no_grad():
            inputs = Inputs(rank)
            with pytest.raises(CommError, match="bounded=True"), captured(torch.cuda.CUDAGraph()):
                ep.dispatch(*inputs)
            _, out = layer(ep, inputs, "rank")  # and all goes on
            assert out.shape == (TOKENS, HIDDEN)

    commlib.run_ranks(rank_main, 2, device="cuda")


def test_what_has_no_room_in_a_run_is_told_afterwards():
    def rank_main(rank):
        with ExpertParallel(**CONFIG | {"capacity": TOKENS}) as ep, torch.no_grad():
            inputs = Inputs(rank)
            graph = torch.cuda.CUDAGraph()
            with captured(graph):
                d, _ = layer(ep, inputs, "rank", bounded=True)
            inputs.idx.fill_(-1)
            graph.replay()
            ep.synchronize()
            assert (int(d.num_rows), int(d.dropped)) == (0, 0)
            inputs.idx[:, 0] = 0  # all to rank 0
            graph.replay()
            if rank == 0:
                with pytest.raises(CapacityExceeded, match=rf"no room for {TOKENS} of the {2 * TOKENS} rows"):
                    ep.synchronize()
            ep.synchronize()
            assert (int(d.num_rows), int(d.dropped)) == ((TOKENS, TOKENS) if rank == 0 else (0, 0))

    commlib.run_ranks(rank_main, 2, device="cuda")


def test_layers_of_a_graph_take_its_slots_in_turns_and_another_graph_has_others():
    def deep(ep, inputs):
        x = inputs.x
        for _ in range(6):
            _, x = layer(ep, (x, inputs.idx, inputs.weights), "expert", bounded=True)
        return x

    def rank_main(rank):
        with ExpertParallel(**CONFIG | {"slots": 4}) as ep, torch.no_grad():
            inputs, graph, others = Inputs(rank), torch.cuda.CUDAGraph(), []
            with captured(graph):
                out = deep(ep, inputs)
            for _ in range(10):
                inputs.change()
                graph.replay()
                torch.testing.assert_close(out.clone(), deep(ep, inputs), rtol=0, atol=0)
            with pytest.raises(CommError, match="CUDA graphs"):
                for _ in range(4):
                    others.append(torch.cuda.CUDAGraph())
                    with captured(others[-1]):
                        deep(ep, inputs)
            others.clear()
            gc.collect()  # the error's frames
            graph.replay()
            torch.testing.assert_close(out.clone(), deep(ep, inputs), rtol=0, atol=0)

    commlib.run_ranks(rank_main, 2, device="cuda")


def test_the_example_decodes_with_a_graph(monkeypatch, capsys):
    program = Path(__file__).parents[2] / "examples/decode.py"
    arguments = ["--device", "cuda", "--steps", "8", "--hidden", "64", "--ffn-hidden", "64", "--experts", "4"]
    monkeypatch.setattr(sys, "argv", [str(program), *arguments, "--check"])
    runpy.run_path(str(program), run_name="__main__")
    assert "has written the tokens of one rank alone" in capsys.readouterr().out


def test_a_graph_does_nothing_once_its_communicator_is_closed():
    def rank_main(rank):
        inputs, graph = Inputs(rank), torch.cuda.CUDAGraph()
        with ExpertParallel(**CONFIG) as ep, torch.no_grad():
            with captured(graph):
                _, out = layer(ep, inputs, "rank", bounded=True)
            graph.replay()
            ep.synchronize()
            torch.cuda.current_stream().synchronize()
        before = out.clone()
        inputs.change()
        graph.replay()
        torch.testing.assert_close(out, before, rtol=0, atol=0)
        with pytest.raises(RuntimeError, match="closed"):
            ep.synchronize()

    commlib.run_ranks(rank_main, 2, device="cuda")
