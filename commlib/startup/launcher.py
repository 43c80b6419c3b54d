"""Which launcher started this process: torchrun, MPI's or Slurm's; one may run inside another.

Each leaves its ranks' numbers in environment variables, which everything inside inherits. So the outer one's
variables are there too; those of the innermost were set last.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from commlib.errors import CommError

_TORCH = ("RANK", "WORLD_SIZE")
_TORCH_NEEDS = (*_TORCH, "MASTER_ADDR", "MASTER_PORT")
# Rank and size, as set by Open MPI, MVAPICH, and MPICH, Intel MPI and srun.
_MPI = (
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE"),
    ("PMI_RANK", "PMI_SIZE"),
)
_SLURM = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS")
_ADVICE = (
    "Say which ranks are meant with group=, as an mpi4py communicator or a torch.distributed process group"
)


@dataclass(frozen=True)
class Launch:
    """What a launcher says of this process."""

    by: str  # "torchrun", "MPI" or "Slurm"
    rank: int
    size: int
    names: tuple[str, ...]  # of the variables that say it

    def __str__(self) -> str:
        return f"{self.by} ({', '.join(self.names)}) says rank {self.rank} of {self.size}"


def find_launch() -> Launch | None:
    """What the innermost launcher says, or None if this is one rank by itself.

    The innermost is the one whose variables changed last among the processes that led to this one. Where that
    cannot be seen, a launcher counts if the others say the same, or one rank.

    Raises:
        CommError: launchers contradict each other, or several ranks have no way to reach each other.
    """
    chosen = _choose(_launches())
    if chosen is None or chosen.size == 1:
        return None
    if chosen.by != "torchrun":
        _check_mpi(chosen)
    return chosen


def _choose(launches: list[Launch]) -> Launch | None:
    if len(launches) < 2:
        return next(iter(launches), None)
    innermost = _innermost(launches)
    if len({(launch.rank, launch.size) for launch in launches}) == 1:
        return innermost or launches[0]
    several = [launch for launch in launches if launch.size > 1]
    if innermost is None and len(several) == 1:
        return several[0]
    # Several ranks of an outer launcher, each alone in an inner one: surely a mistake.
    if innermost is None or innermost.size == 1:
        raise CommError(f"launchers disagree: {'; '.join(map(str, launches))}. {_ADVICE}")
    return innermost


def _launches() -> list[Launch]:
    """What each launcher that left variables says; first those that can carry what ranks say."""
    found = []
    mpi = next((names for names in _MPI if all(name in os.environ for name in names)), None)
    if mpi is not None:
        found.append(_launch("MPI", mpi))
    elif "mpi4py.MPI" in sys.modules and (size := _mpi_world()[1]) > 1:
        found.append(Launch("MPI", _mpi_world()[0], size, ("MPI.COMM_WORLD",)))
    if all(name in os.environ for name in _TORCH_NEEDS):
        found.append(_launch("torchrun", _TORCH))
    if not found and all(name in os.environ for name in _SLURM):
        found.append(_launch("Slurm", _SLURM))
    return found


def _launch(by: str, names: tuple[str, str]) -> Launch:
    said = [os.environ[name] for name in names]
    try:
        rank, size = map(int, said)
    except ValueError:
        rank = size = -1
    if not 0 <= rank < size:
        raise CommError(
            f"the environment says {names[0]}={said[0]} and {names[1]}={said[1]}: no rank and size"
        )
    return Launch(by, rank, size, names)


def _mpi_world() -> tuple[int, int]:
    from mpi4py import MPI

    return MPI.COMM_WORLD.Get_rank(), MPI.COMM_WORLD.Get_size()


def _check_mpi(launch: Launch) -> None:
    """Raise CommError unless MPI knows these ranks."""
    try:
        rank, size = _mpi_world()
    except ImportError as error:
        raise CommError(
            f"{launch}, but mpi4py, by which they would find each other, cannot be imported: {error}. "
            f"pip install 'commlib-ep[mpi]', or start the ranks with torchrun"
        ) from error
    if (rank, size) != (launch.rank, launch.size):
        raise CommError(
            f"{launch}, but mpi4py's COMM_WORLD says rank {rank} of {size}: its MPI library is not "
            f"the launcher's (with srun: --mpi=pmix or pmi2). Or start the ranks with torchrun"
        )


def _innermost(launches: list[Launch]) -> Launch | None:
    """The launch whose variables are the youngest, if one is."""
    ages = [_age(launch.names) for launch in launches]
    youngest = min(ages)
    return launches[ages.index(youngest)] if ages.count(youngest) == 1 else None


def _age(names: tuple[str, ...]) -> int:
    """For how many generations of processes these variables have not changed."""
    age = 0
    for environment in _ancestors():
        if any(environment.get(name) != os.environ.get(name) for name in names):
            break
        age += 1
    return age


def _ancestors() -> Iterator[Mapping[str, str]]:
    """The environments in which this process and its ancestors began, while these are this user's."""
    pid = os.getpid()
    while pid > 0:
        try:
            with open(f"/proc/{pid}/environ", "rb") as f:
                entries = f.read().decode(errors="surrogateescape").split("\0")
            with open(f"/proc/{pid}/stat") as f:
                pid = int(f.read().rpartition(")")[2].split()[1])
        except OSError:
            return
        yield dict(entry.partition("=")[::2] for entry in entries if entry)
