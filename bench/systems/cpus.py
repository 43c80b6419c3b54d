"""What is compared on CPUs: commlib, gloo, MPI, its shared windows and the bare limit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import commlib
from bench.harness.launch import Launch
from bench.harness.turns import System
from bench.harness.workload import Shape
from bench.systems.all_to_all import AllToAllBaseline, Baseline
from bench.systems.commlib import LIMIT, OWNED, ZERO_COPY, BareLimit, Commlib, CommlibZeroCopy
from bench.systems.gloo import GlooBaseline, PlainGlooBaseline
from bench.systems.grouped import CommlibGrouped, CommlibGroupedZeroCopy, GroupBuffer, GroupedBaseline
from bench.systems.grouped_windows import GroupedWindows
from bench.systems.mpi import MpiBaseline
from bench.systems.windows import Windows, WindowsBaseline, why_no_windows

CHOICES = ("commlib", "gloo", "mpi", "windows")
PLAIN, GLOO, MPI, WINDOWS = "gloo, plain", "gloo, tuned", "MPI", "MPI windows"
WINDOWS_OWNED = "MPI windows owned"  # y in a tensor that the caller owns
PEERS = (GLOO, MPI, WINDOWS)  # each as fast as we could write it
PEERS_OF_OWNED = (GLOO, MPI, WINDOWS_OWNED)
ORDER = (ZERO_COPY, OWNED, PLAIN, *PEERS, WINDOWS_OWNED, LIMIT)  # in tables

RANK, LAYER = "rank", "layer"  # paths: rows as they came; rows grouped by expert, and weights in combine
PATHS = (RANK, LAYER)


def skipped(launch: Launch, only: set[str]) -> dict[str, str]:
    """The reasons why systems in `only` cannot run here. Called by all ranks."""
    reasons = {
        MPI: launch.no_mpi if "mpi" in only else "",
        WINDOWS: why_no_windows(launch) if "windows" in only else "",
    }
    return {name: why for name, why in reasons.items() if why}


@contextmanager
def open_systems(
    launch: Launch,
    shape: Shape,
    path: str,
    only: set[str],
    *,
    num_sms: int | None = None,
    everything: bool = True,
) -> Iterator[list[System]]:
    """Those of `CHOICES` that are in `only` and can run here, ready to be measured on a path.

    Args:
        num_sms: commlib's threads.
        everything: also plain gloo, owned y and the bare limit, which say little about small sizes; and
            gloo where there is MPI, beside which it has never been the best peer.
    """
    missing = skipped(launch, only)
    gloo = "gloo" in only and (everything or "mpi" not in only or MPI in missing)
    with ExitStack() as stack:
        systems: list[System] = []
        if "commlib" in only:
            ep = commlib.ExpertParallel(launch.ranks, device="cpu", num_sms=num_sms, **shape.sizes)
            stack.callback(ep.close)
            systems += commlib_systems(ep, path, everything)
        if gloo and path == RANK and everything:
            systems.append(Baseline(PLAIN, PlainGlooBaseline(launch.group, **shape.sizes)))
        peers: dict[str, AllToAllBaseline] = {}
        if gloo:
            peers[GLOO] = GlooBaseline(launch.group, **shape.sizes)
        if "mpi" in only and MPI not in missing:
            peers[MPI] = MpiBaseline(launch.comm, **shape.sizes)
        if "windows" in only and WINDOWS not in missing:
            systems += windows_systems(launch.comm, shape, path, everything, stack)
        yield systems + peer_systems(peers, path, shape)


def commlib_systems(ep: commlib.ExpertParallel, path: str, everything: bool) -> list[System]:
    if path == LAYER:
        return [
            CommlibGroupedZeroCopy(ep),
            *([CommlibGrouped(ep), BareLimit(ep, "expert")] if everything else []),
        ]
    return [CommlibZeroCopy(ep), *([Commlib(ep), BareLimit(ep)] if everything else [])]


def windows_systems(comm: Any, shape: Shape, path: str, everything: bool, stack: ExitStack) -> list[System]:
    """Called by all ranks; `stack` closes what they use."""
    windows = WindowsBaseline(comm, **shape.sizes)
    stack.callback(windows.close)
    owned = peer_systems({WINDOWS_OWNED: windows}, path, shape) if everything else []
    if path == RANK:
        return [Windows(WINDOWS, windows), *owned]
    direct = GroupedWindows(WINDOWS, comm, **shape.sizes)
    stack.callback(direct.close)
    return [direct, *owned]


def peer_systems(peers: dict[str, AllToAllBaseline], path: str, shape: Shape) -> list[System]:
    """Peers that find y in a tensor of the caller's own."""
    if path == LAYER:
        buffer = GroupBuffer(shape.hidden, shape.dtype)
        return [GroupedBaseline(name, transport, buffer) for name, transport in peers.items()]
    return [Baseline(name, transport) for name, transport in peers.items()]
