"""A rank that dispatches and combines until it fails. Arguments: rank, ranks, folder."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist

import commlib
from commlib.startup.group import StoreGroup

rank, ranks, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
torch.set_num_threads(1)
group = StoreGroup(dist.FileStore(str(folder / "store"), ranks), rank, ranks)
ep = commlib.ExpertParallel(
    group, num_experts=8, hidden=64, topk=2, max_tokens=8, dtype=torch.float32, device="cpu", timeout=60.0
)
x, idx = torch.ones(4, 64), torch.tensor([[0, 7]] * 4)
try:
    while True:
        d = ep.dispatch(x, idx)
        ep.combine(d.x, d.handle)
        (folder / f"{rank}.ready").touch()
except commlib.PeerTimeout as error:
    print(f"PeerTimeout peers={error.peers}: {error}")
    sys.exit(3)
