"""One rank of dispatches and combines across nodes, round after round. Started with torchrun's environment.

    across_nodes.py ROUNDS TIMEOUT [TOKENS]

Prints "round N" when N rounds are done, "ok" at the end, or the error; leaves by itself.
"""

import os
import sys

import torch

import commlib
from commlib import ExpertParallel

rounds, timeout = int(sys.argv[1]), float(sys.argv[2])
tokens = int(sys.argv[3]) if len(sys.argv) > 3 else 64
hidden, experts, topk = 1024, 16, 4


def peak_rss() -> int:
    """The most memory this process has had, in bytes."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) << 10 for line in status if line.startswith("VmHWM"))


torch.set_num_threads(1)
with ExpertParallel(
    num_experts=experts, hidden=hidden, topk=topk, max_tokens=tokens, dtype=torch.float32, timeout=timeout
) as ep:
    g = torch.Generator().manual_seed(ep.rank)
    idx = torch.rand(tokens, experts, generator=g).topk(topk).indices
    copies = (
        torch.stack([(idx * ep.size // experts == r).any(1) for r in range(ep.size)]).sum(0, keepdim=True).T
    )
    try:
        before = 0
        for i in range(rounds):
            x = torch.full((tokens, hidden), float(i + 1))
            d = ep.dispatch(x, idx)
            out = ep.combine(d.x, d.handle)
            assert torch.equal(out, x * copies), f"round {i}"
            print(f"round {i + 1}", flush=True)
            before = peak_rss() if i < 2 else before
        print(f"ok, {peak_rss() - before} bytes more than after two rounds", flush=True)
    except commlib.CommError as error:
        print(f"{type(error).__name__}: {error}", flush=True)
os._exit(0)
