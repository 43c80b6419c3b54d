"""Decode with a small mixture-of-experts model whose experts are spread over the ranks.

    mpirun -n 4 python examples/decode.py --check

Each rank has some sequences and writes one token to each in every step. A layer sends its few rows to their
experts with ``bounded=True, layout="batched"``: each expert has room for so many rows, whatever the routing,
so that all experts of a rank are one batched product, and no host waits to hear how many rows come. On a GPU
the step is therefore one CUDA graph, captured once, and Python is not on the way of a token.
``--check`` compares the tokens with those of the same model on one rank, where each expert takes all rows.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import commlib

VOCABULARY, HEADS = 512, 4


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sequences", type=int, default=8, help="of a rank")
    parser.add_argument("--steps", type=int, default=64, help="tokens that each sequence gets")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--ffn-hidden", type=int, default=512)
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--topk", type=int, default=4)
    parser.add_argument("--device", help="cpu or cuda; by default a GPU if there is one")
    parser.add_argument("--check", action="store_true", help="compare with all experts on one rank")
    return parser.parse_args()


class Experts(nn.Module):
    """Some of the experts, each for the rows of its own: ``[experts, rows, hidden]``."""

    def __init__(self, experts: int, hidden: int, ffn_hidden: int) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(experts, hidden, ffn_hidden) / hidden**0.5)
        self.down = nn.Parameter(torch.randn(experts, ffn_hidden, hidden) / ffn_hidden**0.5)

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(x @ self.up) @ self.down


class Block(nn.Module):
    """Attention to all that has been written so far, then experts. Shapes are the same in every step."""

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__()
        h = args.hidden
        self.qkv, self.out = nn.Linear(h, 3 * h, bias=False), nn.Linear(h, h, bias=False)
        self.router = nn.Linear(h, args.experts, bias=False)
        self.experts = Experts(args.experts, h, args.ffn_hidden)
        self.topk = args.topk
        keys_and_values = 2, args.sequences, HEADS, args.steps, h // HEADS
        self.register_buffer("cache", torch.zeros(keys_and_values), persistent=False)
        self.register_buffer("all_steps", torch.arange(args.steps), persistent=False)

    def forward(self, x: Tensor, step: Tensor, ep: commlib.ExpertParallel | None) -> Tensor:
        x = x + self.attention(F.rms_norm(x, x.shape[-1:]), step)
        rows = F.rms_norm(x, x.shape[-1:])
        probs, chosen = self.router(rows).softmax(-1).topk(self.topk)
        if ep is None:
            everyones = self.experts(rows.expand(len(self.experts.up), -1, -1))
            theirs = everyones[chosen, torch.arange(len(rows), device=x.device).unsqueeze(1)]
            return x + (probs.unsqueeze(-1) * theirs).sum(1)
        d = ep.dispatch(rows, chosen, probs, layout="batched", bounded=True)
        y = self.experts(d.x)  # of rows that are none as well: nobody reads those
        return x + ep.combine(y, d.handle, weights=d.topk_weights)

    def attention(self, x: Tensor, step: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).unbind(1)
        self.cache.index_copy_(-2, step, torch.stack([k, v]).unsqueeze(-2))
        keys, values = self.cache  # [sequences, heads, steps, width]
        written = (self.all_steps <= step).unsqueeze(0)
        seen = F.scaled_dot_product_attention(q.unsqueeze(-2), keys, values, attn_mask=written)
        return self.out(seen.flatten(1))


class Decoder(nn.Module):
    """The same weights on every rank, but for experts: a rank keeps its own."""

    def __init__(self, args: argparse.Namespace, ep: commlib.ExpertParallel | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(VOCABULARY, args.hidden)
        self.blocks = nn.ModuleList(Block(args) for _ in range(args.layers))
        self.ep = ep
        if ep is None:
            return
        mine = slice(ep.first_expert, ep.first_expert + ep.num_local_experts)
        for experts in (block.experts for block in self.blocks):
            experts.up = nn.Parameter(experts.up[mine].clone())
            experts.down = nn.Parameter(experts.down[mine].clone())

    def forward(self, tokens: Tensor, step: Tensor) -> Tensor:
        """The next token of each sequence, from the one before it and the number of the step, ``[1]``."""
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, step, self.ep)
        return F.linear(F.rms_norm(x, x.shape[-1:]), self.embedding.weight).argmax(-1)


def captured(run: Callable[[], None]) -> Callable[[], None]:
    """What does the same without Python. The first run, by hand, loads kernels and makes workspaces."""
    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


@torch.inference_mode()
def decode(model: Decoder, first: Tensor, steps: int) -> tuple[Tensor, list[float]]:
    """What the model writes, ``[steps, sequences]``, and the seconds of each step."""
    tokens, step = first.clone(), torch.zeros(1, dtype=torch.int64, device=first.device)

    def run() -> None:
        tokens.copy_(model(tokens, step))
        step.add_(1)

    run_once = captured(run) if first.is_cuda else run
    tokens.copy_(first)
    step.zero_()
    written, seconds = [], []
    for _ in range(steps):
        begun = time.perf_counter()
        run_once()
        written.append(tokens.clone())
        if first.is_cuda:
            torch.cuda.current_stream().synchronize()
        seconds.append(time.perf_counter() - begun)
    return torch.stack(written), seconds


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(1)
    device = args.device or ("cuda" if commlib.cuda.is_available() else "cpu")
    ep = commlib.ExpertParallel(
        num_experts=args.experts,
        hidden=args.hidden,
        topk=args.topk,
        max_tokens=args.sequences,
        dtype=torch.float32,
        device=device,
    )
    with ep:
        first = (torch.arange(args.sequences) + ep.rank * args.sequences).to(device) % VOCABULARY
        written, seconds = decode(Decoder(args, ep).to(device), first, args.steps)
        if ep.rank == 0:
            print(f"{1e3 * statistics.median(seconds):.2f} ms a step of {args.layers} layers")
        if args.check:
            same, _ = decode(Decoder(args, None).to(device), first, args.steps)
            if not torch.equal(written, same):
                raise SystemExit(f"rank {ep.rank} has written other tokens than one rank alone")
            print(f"rank {ep.rank} has written the tokens of one rank alone")


if __name__ == "__main__":
    main()
