"""One rank of a dispatch and combine over the group that KIND names. Argument: the device, "cpu" if none."""

import os
import sys

import torch
import torch.distributed as dist

import commlib

kind = os.environ["KIND"]
device = sys.argv[1] if len(sys.argv) > 1 else "cpu"
shape = dict(num_experts=8, hidden=64, topk=2, max_tokens=8, dtype=torch.float32)
group = None
if kind in ("process group", "subgroup", "device mesh"):
    dist.init_process_group("gloo")
    if kind == "subgroup":
        pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
        group = pairs[dist.get_rank() // 2]
    elif kind == "device mesh":
        group = dist.init_device_mesh("cpu", (dist.get_world_size(),))
elif kind != "default":
    from mpi4py import MPI

    group = MPI.COMM_WORLD
    if kind == "split communicator":
        group = group.Split(group.rank % 2, group.rank)

with commlib.ExpertParallel(group, device=device, timeout=30.0, **shape) as ep:
    x = torch.full((4, 64), float(ep.rank + 1), device=device)
    d = ep.dispatch(x, torch.tensor([[0, 7]] * 4, device=device))
    assert torch.equal(ep.combine(d.x, d.handle), (2 if ep.size > 1 else 1) * x)
    print(f"ok rank {ep.rank} of {ep.size}", flush=True)
if dist.is_initialized():
    dist.destroy_process_group()
    # Python sometimes aborts while it shuts down after gloo ("terminate called without an active exception",
    # seen on a busy machine). commlib has no thread here that could do it, and exits are tested elsewhere.
    sys.stdout.flush()
    os._exit(0)
