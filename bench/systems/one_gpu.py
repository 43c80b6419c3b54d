"""The rows of the GPU table: commlib in several ways and plain PyTorch, on in-process ranks of one GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

import commlib
from bench.harness.turns import System
from bench.harness.workload import Job, Received, Shape, expert
from bench.systems.all_to_all import Baseline
from bench.systems.commlib import Commlib, CommlibZeroCopy
from bench.systems.peer_copy import PeerCopyBaseline, TunedPeerCopyBaseline

DISPATCH, REDISPATCH, COMBINE = "dispatch", "dispatch again", "combine"
OPERATIONS = (DISPATCH, REDISPATCH, COMBINE)
GROUPED, PLAIN, TUNED = "commlib by expert", "PyTorch, plain", "PyTorch, tuned"
ALIGN = 8  # rows; a group of bf16 rows is then a multiple of 16 bytes, as grouped matmuls require
# A dispatch holds one slot, the lent buffer or the copy of y another; two more let results stay in place.
SLOTS = 4


class Grouped(Commlib):
    """commlib with rows grouped by expert, and weights applied by combine."""

    name = GROUPED

    def __init__(self, ep: commlib.ExpertParallel, job: Job) -> None:
        super().__init__(ep)
        self._expected = expected_groups(job, ep.num_local_experts)

    def dispatch(self, job: Job) -> Received:
        d = self._ep.dispatch(job.x, job.topk_idx, job.topk_weights, layout="expert", align=ALIGN)
        self._handle, self._weights = d.handle, d.topk_weights
        return Received(d.x, d.source, d.topk_weights)

    def place(self, job: Job) -> Tensor:
        return expert(self._expected.rows, self._ep.rank)

    def combine(self, y: Tensor) -> Tensor:
        return self._ep.combine(y, self._handle, weights=self._weights)

    def wrong_rows(self, job: Job, received: Received) -> list[str]:
        want = self._expected
        pairs = {
            "rows": (received.rows, want.rows),
            "weights": (received.topk_weights, want.topk_weights),
        }
        return [f"{what} differ" for what, (a, b) in pairs.items() if not torch.equal(a, b)]

    def wrong_sum(self, job: Job, out: Tensor) -> list[str]:
        exact = torch.zeros(out.shape, dtype=torch.float32, device=out.device)
        bound = torch.zeros_like(exact)  # each rank's part is rounded once
        for owner in range(self._ep.size):
            mine = job.topk_idx // self._ep.num_local_experts == owner
            part = expert(job.x, owner).float() * (job.topk_weights * mine).sum(1, keepdim=True)
            exact += part
            bound += part.abs()
        bound = torch.finfo(out.dtype).eps * (bound + exact.abs()) + 1e-5
        off = ~((out.float() - exact).abs() <= bound)
        return [f"sum: {int(off.sum())} of {off.numel()} values differ"] if off.any() else []


def expected_groups(job: Job, local_experts: int) -> Received:
    """The job's rows and weights by local expert, each group padded with zeros; ids are left out."""
    unique = job.expected
    rows, weights = [], []
    for e in range(local_experts):
        chosen = unique.topk_idx == e
        count = int(chosen.sum())
        padding = -count % ALIGN
        rows += [unique.rows[chosen.any(1)], unique.rows.new_zeros(padding, unique.rows.shape[1])]
        weights += [unique.topk_weights[chosen], unique.topk_weights.new_zeros(padding)]
    return Received(torch.cat(rows), unique.topk_idx, torch.cat(weights))


@contextmanager
def open_commlib(shape: Shape, num_sms: int, grouped_for: Job | None) -> Iterator[list[System]]:
    """commlib with that many SMs a rank; also grouped by expert if a job is given. Called by all ranks."""
    with commlib.ExpertParallel(num_sms=num_sms, slots=SLOTS, **shape.sizes) as ep:
        systems: list[System] = [CommlibZeroCopy(ep), Commlib(ep)]
        yield systems if grouped_for is None else [*systems, Grouped(ep, grouped_for)]


def make_baselines(group: commlib.Group, shape: Shape, device: str) -> list[System]:
    return [
        Baseline(PLAIN, PeerCopyBaseline(group, **shape.sizes)),
        Baseline(TUNED, TunedPeerCopyBaseline(group, device, **shape.sizes)),
    ]


Timed = Callable[[str, Callable[[], Any]], tuple[float, Any]]  # seconds of a named operation, and its result


def iterate(system: System, job: Job, timed: Timed, check: bool) -> tuple[dict[str, float], list[str]]:
    """Seconds of one dispatch, one with the known routing, and one combine; and what was wrong, if checked.

    Called by all ranks.
    """
    seconds: dict[str, float] = {}
    wrong: list[str] = []
    seconds[DISPATCH], received = timed(DISPATCH, lambda: system.dispatch(job))
    if check:
        wrong += system.wrong_rows(job, received)
    del received  # its slot is free again
    if isinstance(system, Commlib):
        seconds[REDISPATCH], rows = timed(REDISPATCH, lambda: system.redispatch(job))
        del rows
    y = system.place(job)
    seconds[COMBINE], out = timed(COMBINE, lambda: system.combine(y))
    if check:
        wrong += system.wrong_sum(job, out)
    system.release()
    return seconds, [f"{system.name}: {text}" for text in wrong]
