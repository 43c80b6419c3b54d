"""Rank 0 dispatches; the others never do. Arguments: rank, ranks, folder."""

import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

import commlib
from commlib.startup.group import StoreGroup

rank, ranks, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
group = StoreGroup(dist.FileStore(str(folder / "store"), ranks), rank, ranks)
ep = commlib.ExpertParallel(
    group, num_experts=8, hidden=64, topk=2, max_tokens=8, dtype=torch.float32, device="cpu", timeout=60.0
)
if rank == 0:
    (folder / "0.ready").touch()
    ep.dispatch(torch.ones(4, 64), torch.tensor([[0, 7]] * 4))
time.sleep(60)
