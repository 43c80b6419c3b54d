"""What is compared by ranks with a GPU each: commlib, NCCL, and other libraries where they are installed."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import commlib
from bench.harness.launch import Launch
from bench.harness.turns import System
from bench.harness.workload import Job, Received, Shape
from bench.systems.all_to_all import Baseline
from bench.systems.commlib import OWNED, ZERO_COPY, Commlib, CommlibZeroCopy
from bench.systems.nccl import CupyNcclBaseline, NcclBaseline, PlainNcclBaseline
from bench.systems.one_gpu import SLOTS
from bench.systems.peers import (
    DeepEp,
    Vdev,
    VdevBaseline,
    why_no_cupy,
    why_no_deep_ep,
    why_no_symmetric_memory,
)

PLAIN, TUNED, CUPY = "NCCL, plain", "NCCL, tuned", "CuPy's NCCL"
VDEV, DEEP_EP = "symmetric memory", "DeepEP"


@dataclass
class Setting:
    """What systems are made from.

    Attributes:
        group: of NCCL; gloo stands in for it in tests.
        open: closes the systems that were made.
    """

    launch: Launch
    shape: Shape
    device: torch.device
    num_sms: int | None
    group: dist.ProcessGroup
    open: ExitStack

    @property
    def sizes(self) -> dict[str, Any]:
        """Sizes, by the names that baselines have for them."""
        return self.shape.sizes | {"device": self.device}


@dataclass(frozen=True)
class Choice:
    """One or more systems that belong together.

    Attributes:
        names: of its systems, in the table's order.
        why_not: the reason why this rank cannot have them; empty if it can.
        make: makes the systems. Called by all ranks, if none has a reason.
    """

    names: tuple[str, ...]
    why_not: Callable[[Setting], str]
    make: Callable[[Setting], list[System]]


def _commlib(setting: Setting) -> list[System]:
    options = {"device": setting.device, "num_sms": setting.num_sms, "slots": SLOTS}
    ep = commlib.ExpertParallel(setting.launch.ranks, **options, **setting.shape.sizes)
    setting.open.callback(ep.close)
    return [CommlibZeroCopy(ep), Commlib(ep)]


def _nccl(setting: Setting) -> list[System]:
    return [
        Baseline(PLAIN, PlainNcclBaseline(setting.group, **setting.sizes)),
        Baseline(TUNED, NcclBaseline(setting.group, **setting.sizes)),
    ]


def _cupy(setting: Setting) -> list[System]:
    return [Baseline(CUPY, CupyNcclBaseline(setting.launch, **setting.sizes))]


def _vdev(setting: Setting) -> list[System]:
    assert dist.group.WORLD is not None
    return [Vdev(VDEV, VdevBaseline(dist.group.WORLD, **setting.sizes))]


def _deep_ep(setting: Setting) -> list[System]:
    assert dist.group.WORLD is not None
    system = DeepEp(DEEP_EP, dist.group.WORLD, setting.shape, setting.num_sms)
    setting.open.callback(system.close)
    return [system]


CHOICES = {
    "commlib": Choice((ZERO_COPY, OWNED), lambda _: "", _commlib),
    "nccl": Choice((PLAIN, TUNED), lambda _: "", _nccl),
    "cupy": Choice((CUPY,), lambda _: why_no_cupy(), _cupy),
    "symm_mem": Choice((VDEV,), lambda s: why_no_symmetric_memory(s.launch.size), _vdev),
    "deep_ep": Choice((DEEP_EP,), lambda s: why_no_deep_ep(s.shape, s.launch.size), _deep_ep),
}
ORDER = [name for choice in CHOICES.values() for name in choice.names]


class UntilDone(System):
    """A system whose operations end when the GPU has done them."""

    def __init__(self, system: System, device: torch.device) -> None:
        self.name, self._system = system.name, system
        self._wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None

    def dispatch(self, job: Job) -> Received:
        received = self._system.dispatch(job)
        self._wait()
        return received

    def place(self, job: Job) -> Tensor:
        y = self._system.place(job)
        self._wait()
        return y

    def combine(self, y: Tensor) -> Tensor:
        out = self._system.combine(y)
        self._wait()
        return out

    def release(self) -> None:
        self._system.release()

    def wrong_rows(self, job: Job, received: Received) -> list[str]:
        return self._system.wrong_rows(job, received)

    def wrong_sum(self, job: Job, out: Tensor) -> list[str]:
        return self._system.wrong_sum(job, out)
