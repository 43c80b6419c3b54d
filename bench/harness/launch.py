"""The ranks of a run that mpirun or torchrun began: a fence, a clock, and values from one to another."""

from __future__ import annotations

import os
import socket
import sys
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from commlib.cli.measuring import Interval, timed, usable_cores
from commlib.startup.group import let_go

SETTLE_SECONDS = 0.02  # more than ranks leave an all-reduce apart (8 ranks on 2 cores: up to 10 ms)


@dataclass(frozen=True)
class Launch:
    """The ranks of this run. There is always a gloo process group; `comm` only where MPI is."""

    rank: int
    size: int
    comm: Any | None  # mpi4py communicator
    no_mpi: str  # why `comm` is None
    group: dist.ProcessGroup | None = None  # None: torch's default group

    @staticmethod
    @contextmanager
    def session() -> Iterator[Launch]:
        """Join the run that mpirun or torchrun began; started by neither, be a run of one rank.

        A rank that fails ends all others, rather than leave them waiting for it. At the end the
        gloo threads are stopped, since Python cannot exit cleanly under them.
        """
        launch = Launch._join()
        try:
            with torch.no_grad():
                yield launch
            launch.fence()  # then gloo's threads hold no tensors, which they could not drop at Python's end
        except Exception:
            traceback.print_exc()
            sys.stderr.flush()
            if launch.comm is not None:
                launch.comm.Abort(1)
            os._exit(1)  # torchrun sees it and ends the other ranks
        finally:
            dist.destroy_process_group()

    def share_cores(self) -> None:
        """PyTorch's threads of all ranks together are as many as the cores."""
        torch.set_num_threads(max(1, usable_cores() // self.size))

    @staticmethod
    def _join() -> Launch:
        if "TORCHELASTIC_RUN_ID" in os.environ or {"RANK", "MASTER_ADDR"} <= os.environ.keys():
            dist.init_process_group("gloo")
            return Launch(dist.get_rank(), dist.get_world_size(), None, "started without mpirun")
        # Of Open MPI's ways to open windows, UCX's complains on stderr where it finds no network.
        os.environ.setdefault("OMPI_MCA_osc", "^ucx")
        try:
            from mpi4py import MPI
        except (ImportError, RuntimeError) as error:  # RuntimeError: mpi4py found no MPI library
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
            return Launch(0, 1, None, f"mpi4py: {error}")
        comm = MPI.COMM_WORLD
        _join_gloo(comm)
        return Launch(comm.rank, comm.size, comm, "")

    @property
    def ranks(self) -> Any:
        """What ExpertParallel takes as its group."""
        return self.group if self.comm is None else self.comm

    def fence(self) -> None:
        """Return on all ranks at one agreed moment, after all have slept.

        With more ranks than cores, ranks leave any barrier up to milliseconds apart, since the
        barrier's own last work competes for the cores. So agree on a moment a little later and
        sleep until then: nothing of the fence is still running when the clock starts.
        """
        moment = torch.tensor([time.monotonic() + SETTLE_SECONDS], dtype=torch.float64)
        with let_go(moment):
            dist.all_reduce(moment, dist.ReduceOp.MAX, group=self.group)
        left = moment.item() - time.monotonic()
        time.sleep(min(max(left, 0.0), SETTLE_SECONDS))  # ranks on another host have other clocks

    def fenced(self, operation: Callable[[], Any]) -> tuple[Interval, Any]:
        """Time an operation of all ranks while nothing else of this benchmark competes with it.

        The second fence matters as much as the first: a rank that is done would go on to untimed
        work, on a core that another rank needs to end the operation.
        """
        self.fence()
        interval, result = timed(operation)
        self.fence()
        return interval, result

    def gather(self, value: Any) -> list[Any]:
        """The value of every rank, on every rank, by rank."""
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def agreed(self, why: str) -> str:
        """The reason of the first rank that has one; empty if none has."""
        reasons = self.gather(why)
        found = [(rank, reason) for rank, reason in enumerate(reasons) if reason]
        if not found:
            return ""
        rank, reason = found[0]
        return reason if len({*reasons}) == 1 else f"rank {rank}: {reason}"

    def spans(self, intervals: Sequence[Interval]) -> list[float]:
        """For each of a list of operations, seconds from the first rank's begin to the last one's end.

        Not the longest time of one rank: with more ranks than cores a rank may begin after another has
        ended, and its wait for a core is part of the job. Only ranks of one host share a clock; with several
        hosts this is the longest of the hosts' spans.
        """
        of_clock: dict[str, list[list[Interval]]] = defaultdict(list)
        for clock, mine in self.gather((clock_id(), list(intervals))):
            of_clock[clock].append(mine)
        spans = [[_span(ranks) for ranks in zip(*host, strict=True)] for host in of_clock.values()]
        return [max(hosts) for hosts in zip(*spans, strict=True)]

    def first(self, size: int) -> Launch | None:
        """A launch of ranks 0..size-1 alone; None on the others. Called by all ranks."""
        inside = self.rank < size
        group = dist.new_group(list(range(size)), backend="gloo")
        comm = self.comm
        if comm is not None:
            from mpi4py import MPI

            comm = comm.Split(0 if inside else MPI.UNDEFINED, self.rank)
        return Launch(self.rank, size, comm, self.no_mpi, group) if inside else None


def clock_id() -> str:
    """Equal in processes that share a monotonic clock: one boot of one host."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return boot.read_text().strip() if boot.exists() else socket.gethostname()


def _span(ranks: Sequence[Interval]) -> float:
    """From the first begin to the last end."""
    return max(end for _, end in ranks) - min(begin for begin, _ in ranks)


def _join_gloo(comm: Any) -> None:
    """Form a gloo group of an MPI communicator's ranks: on one host, a rig's nodes, several hosts.

    On several hosts gloo takes the interface that the host's name resolves to, or GLOO_SOCKET_IFNAME.
    """
    address = "127.0.0.1"
    if len(set(comm.allgather(clock_id()))) == 1:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    else:
        address = comm.bcast(socket.gethostname())
    host, store = os.environ.get("PET_MASTER_ADDR", address), None
    if comm.rank == 0:  # port 0: the system picks a free one, so that simultaneous runs do not meet
        store = dist.TCPStore(host, 0, comm.size, is_master=True, wait_for_workers=False)
    port = comm.bcast(store.port if store else None)
    if store is None:
        store = dist.TCPStore(host, port, comm.size, is_master=False)
    dist.init_process_group("gloo", store=store, rank=comm.rank, world_size=comm.size)
