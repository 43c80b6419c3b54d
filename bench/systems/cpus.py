"""What is compared on CPUs: commlib, gloo, MPI and the bare limit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import commlib
from bench.harness.launch import Launch
from bench.harness.turns import System
from bench.harness.workload import Shape
from bench.systems.all_to_all import Baseline
from bench.systems.commlib import BareLimit, Commlib, CommlibZeroCopy
from bench.systems.gloo import GlooBaseline, PlainGlooBaseline
from bench.systems.mpi import MpiBaseline

CHOICES = ("commlib", "gloo", "mpi")
PLAIN, GLOO, MPI = "gloo, plain", "gloo, tuned", "MPI"


@contextmanager
def open_systems(
    launch: Launch, shape: Shape, only: set[str], num_sms: int | None = None
) -> Iterator[list[System]]:
    """Those of `CHOICES` that are in `only` and can run here, ready to be measured."""
    sizes = shape.sizes
    with ExitStack() as stack:
        systems: list[System] = []
        if "commlib" in only:
            ep = commlib.ExpertParallel(launch.ranks, device="cpu", num_sms=num_sms, **sizes)
            stack.callback(ep.close)
            systems += [CommlibZeroCopy(ep), Commlib(ep), BareLimit(ep)]
        if "gloo" in only:
            systems.append(Baseline(PLAIN, PlainGlooBaseline(launch.group, **sizes)))
            systems.append(Baseline(GLOO, GlooBaseline(launch.group, **sizes)))
        if "mpi" in only and launch.comm is not None:
            systems.append(Baseline(MPI, MpiBaseline(launch.comm, **sizes)))
        yield systems
