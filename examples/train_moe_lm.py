"""Train a small mixture-of-experts language model whose experts are spread over the ranks.

    mpirun -n 4 python examples/train_moe_lm.py --steps 200 --plot loss.png
    torchrun --nproc-per-node 4 examples/train_moe_lm.py --check

It learns, byte by byte, the English text that every Python ships: the help topics of
``pydoc_data.topics``. Each rank has its own sentences and E/R of the experts; all other parameters
are replicated. ``--check`` also trains the unsharded model, all experts on one rank and without
commlib, on the same batches, and compares the two losses step by step. Rounding alone can make a
router choose the other of two experts that score the same (an estimated 3 to 4 % of such runs), and
from there on the losses diverge; with ``--dtype float64`` that is out of the question.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from pydoc_data.topics import topics

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import commlib
from commlib.nn import MoELayer, sync_gradients

VOCABULARY = 256  # bytes
AUX_WEIGHT = 0.01  # of the load-balance loss, as in Switch Transformer
TOLERANCE = 1e-4  # --check: largest difference of the losses, in nats per byte


class Block(nn.Module):
    """Causal self-attention, then experts, each with a residual around it."""

    def __init__(self, args: argparse.Namespace, ep: commlib.ExpertParallel | None) -> None:
        super().__init__()
        self.heads = args.heads
        self.attention_norm = nn.RMSNorm(args.hidden)
        self.qkv = nn.Linear(args.hidden, 3 * args.hidden, bias=False)
        self.projection = nn.Linear(args.hidden, args.hidden, bias=False)
        self.moe_norm = nn.RMSNorm(args.hidden)
        self.moe = MoELayer(args.hidden, args.ffn_hidden, args.experts, args.topk, ep)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``[B, S, H]`` to the same and the load-balance loss."""
        q, k, v = self.qkv(self.attention_norm(x)).unflatten(-1, (3, self.heads, -1)).unbind(2)
        heads = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True
        )
        x = x + self.projection(heads.transpose(1, 2).flatten(2))
        out, aux = self.moe(self.moe_norm(x))
        return x + out, aux.loss


class LanguageModel(nn.Module):
    """Predicts each byte from those before it. ``ep=None``: all experts in this process."""

    def __init__(self, args: argparse.Namespace, ep: commlib.ExpertParallel | None) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, args.hidden)
        self.position = nn.Parameter(0.02 * torch.randn(args.context, args.hidden))
        self.blocks = nn.ModuleList(Block(args, ep) for _ in range(args.layers))
        self.norm = nn.RMSNorm(args.hidden)
        self.head = nn.Linear(args.hidden, VOCABULARY, bias=False)

    def forward(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """``[B, context + 1]`` bytes to the mean cross entropy and the load-balance loss."""
        x = self.embedding(text[:, :-1]) + self.position
        balance = x.new_zeros(())
        for block in self.blocks:
            x, loss = block(x)
            balance = balance + loss / len(self.blocks)
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits.flatten(0, 1), text[:, 1:].flatten()), balance


def batches(args: argparse.Namespace, rank: int) -> Iterator[Tensor]:
    """Random pieces of the text, ``[batch, context + 1]`` int64, the same for a seed and a rank."""
    text = torch.frombuffer(bytearray("".join(topics.values()).encode()), dtype=torch.uint8).long()
    generator = torch.Generator().manual_seed(args.seed * 1009 + rank)
    while True:
        starts = torch.randint(len(text) - args.context, (args.batch, 1), generator=generator)
        yield text[starts + torch.arange(args.context + 1)]


def average(model: nn.Module, loss: Tensor) -> None:
    """Make gradients, and the loss, those of the mean over ranks, in place."""
    sync_gradients(model)
    dist.all_reduce(loss)
    loss /= dist.get_world_size()


def train(
    args: argparse.Namespace,
    ep: commlib.ExpertParallel | None,
    sources: list[Iterator[Tensor]],
    finish: Callable[[nn.Module, Tensor], None],
    show: str | None,
) -> list[float]:
    """Train a new model; return the loss of each step, mean over all ranks' batches.

    Args:
        args: sizes of the model and of its training.
        ep: communicator of the experts, or ``None``.
        sources: batches for this process; several are taken one after another, so that in either
            case the load-balance loss is over the tokens of one rank.
        finish: called with model and loss after each backward.
        show: title of the progress bar; ``None``: no output.
    """
    torch.manual_seed(args.seed)  # the same parameters on all ranks, and in the unsharded model
    model = LanguageModel(args, ep)
    # Not Adam: its steps hardly depend on the gradient's scale, so --check would miss a wrong one.
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=0.9)
    losses = []
    with tqdm(range(args.steps), desc=show, unit="step", disable=show is None) as bar:
        for step in bar:
            optimizer.zero_grad()
            mean = torch.zeros(())
            for source in sources:
                loss, balance = model(next(source))
                ((loss + AUX_WEIGHT * balance) / len(sources)).backward()
                mean += loss.detach() / len(sources)
            finish(model, mean)
            optimizer.step()
            losses.append(mean.item())
            bar.set_postfix(loss=f"{losses[-1]:.4f}", refresh=False)
            if show and (step % 10 == 0 or step == args.steps - 1):
                bar.write(f"{show}: step {step:4d}  loss {losses[-1]:.4f}")
    return losses


def train_sharded(args: argparse.Namespace, rank: int) -> list[float]:
    """Train with the experts spread over the ranks."""
    with commlib.ExpertParallel(
        num_experts=args.experts,
        hidden=args.hidden,
        topk=args.topk,
        max_tokens=args.batch * args.context,
        dtype=torch.get_default_dtype(),
        device="cpu",
    ) as ep:
        title = f"experts over {args.ranks} ranks" if rank == 0 else None
        return train(args, ep, [batches(args, rank)], average, title)


def train_unsharded(args: argparse.Namespace) -> list[float]:
    """Train on the batches of all ranks, here, with all experts and no communication."""
    sources = [batches(args, rank) for rank in range(args.ranks)]
    return train(args, None, sources, lambda model, loss: None, "unsharded, one rank")


def join_ranks() -> tuple[int, int]:
    """Make torch's gloo group from torchrun, mpirun or neither; return rank and number of ranks."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        dist.init_process_group("gloo")
    elif "OMPI_COMM_WORLD_SIZE" in os.environ or "PMI_SIZE" in os.environ:
        from mpi4py import MPI

        # MPI only tells the ranks where to meet: rank 0 listens on a free port of this machine.
        world = MPI.COMM_WORLD
        address = ("127.0.0.1", 0)
        if world.rank == 0:
            store = dist.TCPStore(*address, is_master=True, wait_for_workers=False)
        port = world.bcast(store.port if world.rank == 0 else None)
        if world.rank != 0:
            store = dist.TCPStore(address[0], port)
        dist.init_process_group("gloo", store=store, rank=world.rank, world_size=world.size)
    else:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    return dist.get_rank(), dist.get_world_size()


def plot(path: Path, curves: dict[str, list[float]]) -> None:
    """Write the loss curves as an image."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for style, (name, losses) in zip(("-", "--"), curves.items(), strict=False):
        axes.plot(losses, style, label=name)
    axes.set(xlabel="step", ylabel="cross entropy (nats per byte)", title="MoE language model")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)


def parse_arguments() -> argparse.Namespace:
    summary = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(
        description=summary, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--check", action="store_true", help="train the unsharded model, compare")
    parser.add_argument(
        "--plot", type=Path, nargs="?", const="loss.png", metavar="PNG", help="write the loss curves"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the losses")
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float32")
    parser.add_argument("--batch", type=int, default=4, help="pieces of text per rank and step")
    parser.add_argument("--context", type=int, default=64, help="bytes in a piece")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--experts", type=int, default=8, help="over all ranks")
    parser.add_argument("--topk", type=int, default=2, help="experts for each byte")
    parser.add_argument("--ffn-hidden", type=int, default=256)
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> int:
    args = parse_arguments()
    rank, args.ranks = join_ranks()
    torch.set_default_dtype(getattr(torch, args.dtype))
    torch.set_num_threads(max(len(os.sched_getaffinity(0)) // args.ranks, 1))

    start = time.perf_counter()
    curves = {"sharded": train_sharded(args, rank)}
    seconds = time.perf_counter() - start
    agree = True
    if rank == 0:
        tokens = args.steps * args.ranks * args.batch * args.context
        first, last = curves["sharded"][0], curves["sharded"][-1]
        print(f"loss {first:.4f} -> {last:.4f}, {seconds:.1f} s, {tokens / seconds:.0f} bytes/s")
        report = {"arguments": vars(args), "seconds": seconds, "loss": curves["sharded"]}
        if args.check:
            curves["unsharded"] = train_unsharded(args)
            apart = [abs(a - b) for a, b in zip(*curves.values(), strict=True)]
            agree = all(difference <= TOLERANCE for difference in apart)  # nan does not agree
            print(
                f"{'ok' if agree else 'FAILED'}: over {args.steps} steps the losses differ by at "
                f"most {max(apart):.1e} (allowed: {TOLERANCE:.0e})"
            )
            if not agree and args.dtype == "float32":
                print("a wrong gradient, or two experts that score the same: try --dtype float64")
            report |= {"unsharded_loss": curves["unsharded"], "largest_difference": max(apart)}
        if args.json:
            args.json.write_text(json.dumps(report, indent=1, default=str) + "\n")
        if args.plot:
            plot(args.plot, curves)
    dist.barrier()  # the others sleep here while rank 0 trains the unsharded model
    dist.destroy_process_group()
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())
