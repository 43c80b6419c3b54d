"""Rank 1 fails before it can tell any other; the others say which is missing; then all construct once more.

Argument: an empty folder.
"""

import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

import commlib
from commlib.startup.group import resolve_group

if "TORCHELASTIC_RUN_ID" in os.environ:
    dist.init_process_group("gloo")
shape = dict(num_experts=8, hidden=64, topk=2, max_tokens=8, dtype=torch.float32, device="cpu")
group, folder = resolve_group(), Path(sys.argv[1])
for attempt in range(2):
    if group.rank == 1:
        while len(list(folder.glob(f"{attempt}.*"))) < group.size - 1:
            time.sleep(0.01)
    else:
        try:
            commlib.ExpertParallel(**shape, startup_timeout=0.5)
            raise AssertionError("constructed")
        except commlib.PeerTimeout as error:
            assert 1 in error.peers and "within 0.5 s" in str(error), error
        (folder / f"{attempt}.{group.rank}").touch()
    with commlib.ExpertParallel(**shape, startup_timeout=60.0) as ep:
        x = torch.full((4, 64), float(ep.rank + 1))
        d = ep.dispatch(x, torch.tensor([[0, 7]] * 4))
        assert torch.equal(ep.combine(d.x, d.handle), 2 * x)
print(f"ok rank {ep.rank} of {ep.size}", flush=True)
if dist.is_initialized():
    dist.destroy_process_group()
    os._exit(0)  # as in round_trip.py
