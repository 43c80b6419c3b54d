"""Train a small transformers model with experts spread over ranks, and see which expert got which tokens.

    torchrun --nproc-per-node 2 examples/hf_moe.py --steps 60
    torchrun --nproc-per-node 4 examples/hf_moe.py --model mixtral --plot experts.png
    python examples/hf_moe.py

A small random Qwen3-MoE, Mixtral or GPT-OSS learns, byte by byte, the English text that every Python ships
(the help topics of ``pydoc_data.topics``); nothing is downloaded. Each rank has its own text, and some of the
experts. At the end comes a heat map: how many of all tokens chose each expert of each layer.
"""

from __future__ import annotations

import argparse
import gc
import os
from pydoc_data.topics import topics

import torch
import torch.distributed as dist
from rich.console import Console
from rich.text import Text
from torch import Tensor
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    GptOssConfig,
    MixtralConfig,
    PreTrainedModel,
    Qwen3MoeConfig,
)

from commlib.integrations.transformers import parallelize
from commlib.nn import clip_grad_norm_, sync_gradients

VOCABULARY = 256  # bytes
CONTEXT = 128
SHADES = " ░▒▓█"


def make_model(args: argparse.Namespace) -> PreTrainedModel:
    """The same on every rank."""
    small = dict(
        vocab_size=VOCABULARY,
        hidden_size=128,
        num_hidden_layers=args.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_experts_per_tok=args.topk,
        output_router_logits=True,  # and with them a balance loss
        router_aux_loss_coef=0.01,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    config = {
        "qwen3_moe": lambda: Qwen3MoeConfig(num_experts=args.experts, moe_intermediate_size=128, **small),
        "mixtral": lambda: MixtralConfig(num_local_experts=args.experts, intermediate_size=128, **small),
        "gpt_oss": lambda: GptOssConfig(
            num_local_experts=args.experts,
            intermediate_size=128,
            layer_types=["full_attention"] * args.layers,
            **small,
        ),
    }[args.model]()
    torch.manual_seed(args.seed)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def batch(text: Tensor, args: argparse.Namespace, step: int) -> Tensor:
    """``[B, CONTEXT]`` bytes of this rank's own text."""
    seed = 1000 * step + dist.get_rank()
    starts = torch.randint(len(text) - CONTEXT, (args.batch,), generator=torch.Generator().manual_seed(seed))
    return torch.stack([text[start : start + CONTEXT] for start in starts.tolist()])


def chosen(model: PreTrainedModel, ids: Tensor, topk: int) -> Tensor:
    """``[layers, experts]``: how many of all ranks' tokens chose each expert."""
    with torch.no_grad():
        logits = model(input_ids=ids, output_router_logits=True).router_logits
    counts = torch.stack(
        [one.topk(topk).indices.flatten().bincount(minlength=one.shape[-1]) for one in logits]
    )
    dist.all_reduce(counts)
    return counts


def show(counts: Tensor, console: Console) -> None:
    """A row for each layer, a cell for each expert: darker and lighter than the mean."""
    mean = counts.float().mean().item()
    console.print(f"tokens by expert (columns) and layer (rows); {mean:.0f} is each one's share")
    for layer, row in enumerate(counts.tolist()):
        line = Text(f"{layer:3} ")
        for n in row:
            shade = min(int(n / (2 * mean) * len(SHADES)), len(SHADES) - 1)
            line.append(f"{SHADES[shade] * 2}{n:5} ", style="bold" if n > 1.5 * mean else "")
        console.print(line)


def plot(counts: Tensor, path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 3))
    image = axes.imshow(counts.numpy(), aspect="auto", cmap="viridis")
    axes.set(xlabel="expert", ylabel="layer", title="tokens")
    figure.colorbar(image)
    figure.savefig(path, bbox_inches="tight")


def main(args: argparse.Namespace) -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    model = parallelize(make_model(args))
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
    text = torch.frombuffer(bytearray("\n".join(topics.values()).encode()), dtype=torch.uint8).long()
    steps = tqdm(range(args.steps), disable=rank != 0, desc=f"{args.model} on {size} ranks")
    for step in steps:
        ids = batch(text, args, step)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        sync_gradients(model)
        clip_grad_norm_(model, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        steps.set_postfix_str(f"{mean.item() / size:.3f} nats per byte")
        if step in (0, args.steps - 1) and rank == 0:
            tqdm.write(f"step {step}: loss {mean.item() / size:.4f}")
    counts = chosen(model, batch(text, args, args.steps), args.topk)
    if rank == 0:
        show(counts, Console(width=8 * args.experts + 8))
        if args.plot:
            plot(counts, args.plot)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=("qwen3_moe", "mixtral", "gpt_oss"), default="qwen3_moe")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--experts", type=int, default=10, help="of all ranks, at least one for each")
    parser.add_argument("--topk", type=int, default=2)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=4, help="texts of 128 bytes for each rank and step")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", help="write the heat map to this file, too")
    return parser.parse_args()


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    arguments = parse()
    if "RANK" in os.environ:  # torchrun
        dist.init_process_group("gloo")
    else:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    main(arguments)
    gc.collect()  # collect what uses the group before it is destroyed
    dist.destroy_process_group()
