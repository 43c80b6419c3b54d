"""Every kind of dispatch and combine once, on few small rows: what compute-sanitizer can watch in a minute.

    python gpu_small.py [device [ranks ...]] [--timeout SECONDS]        # default: cuda 1 2 --timeout 120

The ranks' results are compared with the CPU backend's, bit for bit. Only commlib's kernels run, and one rank
runs first: it loads them all, so that with more ranks none is loaded while another waits on the GPU.
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
from reference import make_world

import commlib
from commlib import ExpertParallel


def everything(world, rank, timeout):
    """All results of a rank."""
    x = world.x[rank].clone().requires_grad_()
    idx, weights = world.topk_idx[rank], world.topk_weights[rank].clone().requires_grad_()
    with ExpertParallel(**{**world.config(), "num_sms": 2, "slots": 6, "timeout": timeout}) as ep:
        unique = ep.dispatch(x, idx, weights)
        rows = unique.x.detach()
        gradients = torch.autograd.grad(
            [unique.x, unique.topk_weights], [x, weights], [rows, unique.topk_weights.detach()]
        )
        with torch.no_grad():
            grouped = ep.dispatch(x, idx, weights, layout="expert", align=4)
            again = ep.dispatch(x, topk_weights=weights, handle=unique.handle, zero_copy=True)
            later, event = ep.combine(rows, unique.handle, bias=x, async_op=True)
            buffer = ep.combine_buffer(unique.handle).copy_(rows)
            sums = [
                ep.combine(buffer, unique.handle),
                ep.combine(grouped.x, grouped.handle, weights=grouped.topk_weights),
            ]
            event.wait()
        got = [rows, unique.topk_idx, unique.source, grouped.x, grouped.source, again.x, later, *sums]
        return [t.detach() for t in (*got, *gradients)]


def run(device, ranks, hidden, dtype, timeout=120.0):
    world = make_world([9, 0, 14, 5][:ranks], num_experts=8, topk=3, hidden=hidden, dtype=dtype)

    def on(device):
        there = world.to(device)
        return commlib.run_ranks(lambda rank: everything(there, rank, timeout), ranks, device=device)

    for rank, (got, want) in enumerate(zip(on(device), on("cpu"), strict=True)):
        for i, (a, b) in enumerate(zip(got, want, strict=True)):
            what = f"rank {rank} of {ranks}, hidden {hidden}, {dtype}: result {i}"
            assert torch.equal(a.cpu(), b), f"{what} differs"


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("device", nargs="?", default="cuda")
    parser.add_argument("ranks", nargs="*", type=int, default=[1, 2])
    parser.add_argument(
        "--timeout", type=float, default=120.0, help="a rank's; under a sanitizer all is slow"
    )
    args = parser.parse_args()
    for size in args.ranks:
        for hidden, dtype in ((7, torch.bfloat16), (72, torch.bfloat16), (64, torch.float32)):
            run(args.device, size, hidden, dtype, args.timeout)
        print(f"ok: {size} ranks on {args.device}", flush=True)


if __name__ == "__main__":
    main()
