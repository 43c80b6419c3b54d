"""Groups: which ranks belong together, and how they find each other at start-up.

A group only bootstraps: it gathers small Python objects once. Rows never travel through it.
"""

from __future__ import annotations

import os
import pickle
import sys
import threading
import weakref
from abc import ABC, abstractmethod
from typing import Any

import torch.distributed as dist


class Group(ABC):
    """Ranks that communicate. Subclass it to bootstrap over something else."""

    rank: int
    size: int
    device: str | None = None  # that ExpertParallel uses unless told otherwise; None: it chooses

    @abstractmethod
    def allgather(self, obj: Any) -> list[Any]:
        """Gather one picklable object from each rank, by rank. Every rank calls it."""

    def barrier(self) -> None:
        """Return when every rank has called it."""
        self.allgather(None)


class SingleGroup(Group):
    """One rank by itself."""

    rank, size = 0, 1

    def allgather(self, obj: Any) -> list[Any]:
        return [obj]


class TorchGroup(Group):
    """A ``torch.distributed`` process group."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self._group = group
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)
        if self.rank < 0:
            raise ValueError("this process is not a member of the process group")

    def allgather(self, obj: Any) -> list[Any]:
        out: list[Any] = [None] * self.size
        dist.all_gather_object(out, obj, group=self._group)
        return out


class StoreGroup(Group):
    """Ranks that share a ``torch.distributed`` store: what torchrun's environment offers by itself."""

    _made = 0  # every rank makes its groups in the same order, so the prefix is the same everywhere

    def __init__(self, store: dist.Store, rank: int, size: int) -> None:
        self._store = dist.PrefixStore(f"commlib/{StoreGroup._made}", store)
        StoreGroup._made += 1
        self._round = 0
        self.rank, self.size = rank, size

    def allgather(self, obj: Any) -> list[Any]:
        self._round += 1
        self._store.set(f"{self._round}/{self.rank}", pickle.dumps(obj))  # type: ignore[arg-type]  # bytes serve as well
        return [pickle.loads(self._store.get(f"{self._round}/{r}")) for r in range(self.size)]


class MPIGroup(Group):
    """An mpi4py communicator."""

    def __init__(self, comm: Any) -> None:
        self._comm = comm
        self.rank = comm.Get_rank()
        self.size = comm.Get_size()

    def allgather(self, obj: Any) -> list[Any]:
        return self._comm.allgather(obj)


class _Meeting:
    """Where the threads of one world gather objects."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.barrier = threading.Barrier(size)
        self.places: list[Any] = [None] * size


class ThreadGroup(Group):
    """One rank of several that are threads of this process; made by :func:`commlib.run_ranks`."""

    def __init__(self, meeting: _Meeting, rank: int, device: str, run_ahead: bool) -> None:
        self._meeting = meeting
        self.run_ahead = run_ahead  # see run_ranks
        self.rank, self.size, self.device = rank, meeting.size, device
        self.communicators: weakref.WeakSet[Any] = weakref.WeakSet()  # of this rank

    @staticmethod
    def world(size: int, device: str = "cpu", run_ahead: bool = False) -> list[ThreadGroup]:
        """The groups of ``size`` in-process ranks, one for each thread."""
        meeting = _Meeting(size)
        return [ThreadGroup(meeting, r, device, run_ahead) for r in range(size)]

    def allgather(self, obj: Any) -> list[Any]:
        self._meeting.places[self.rank] = obj
        self._meeting.barrier.wait()
        out = list(self._meeting.places)
        self._meeting.barrier.wait()  # nobody overwrites a place before all have read it
        return out

    def abort(self, why: str) -> None:
        """This rank failed: let the others' waits for it fail at once."""
        self._meeting.barrier.abort()
        for communicator in list(self.communicators):
            communicator.core.give_up(why)


_current = threading.local()


def set_current_group(group: ThreadGroup | None) -> None:
    """Make ``group`` the default group of this thread."""
    _current.group = group


def resolve_group(group: Any = None) -> Group:
    """The Group for what a user passes as ``group``.

    Args:
        group: a Group, a torch.distributed ProcessGroup or 1-D DeviceMesh, or an mpi4py communicator.
            None: the in-process rank of this thread, else torch.distributed's default group, else
            MPI.COMM_WORLD under mpirun, else torchrun's environment, else one rank.

    Raises:
        TypeError: it is none of these.
        ValueError: a DeviceMesh with more than one dimension.
    """
    if group is None:
        return _default_group()
    if isinstance(group, Group):
        return group
    if isinstance(group, dist.ProcessGroup):
        return TorchGroup(group)
    if isinstance(group, dist.DeviceMesh):
        if group.ndim != 1:
            raise ValueError(f"a DeviceMesh must have one dimension, got {group.ndim}: slice it")
        return TorchGroup(group.get_group())
    if hasattr(group, "Get_rank") and hasattr(group, "allgather"):
        return MPIGroup(group)
    raise TypeError(
        "group must be a commlib.Group, a torch.distributed ProcessGroup or DeviceMesh, or an mpi4py "
        f"communicator, got {type(group).__name__}"
    )


# Set by the launchers of Open MPI, MPICH and Intel MPI, MVAPICH.
_MPI_LAUNCHERS = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")


def _default_group() -> Group:
    in_process = getattr(_current, "group", None)
    if in_process is not None:
        return in_process
    if dist.is_available() and dist.is_initialized():
        return TorchGroup(None)
    if "mpi4py.MPI" in sys.modules or any(name in os.environ for name in _MPI_LAUNCHERS):
        try:
            from mpi4py import MPI
        except ImportError as error:
            raise ImportError(
                "started by an MPI launcher, but mpi4py is not installed: pip install 'commlib[mpi]'"
            ) from error
        return MPIGroup(MPI.COMM_WORLD)
    if all(name in os.environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")):
        store, rank, size = next(iter(dist.rendezvous("env://")))
        return StoreGroup(store, rank, size)
    return SingleGroup()
