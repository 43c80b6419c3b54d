"""Which GPU each rank of a launch takes: one of its own, by its place among the ranks of its host."""

from __future__ import annotations

import os
import socket
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from bench.harness.launch import Launch, clock_id
from commlib import cuda

# Of torchrun, Open MPI, MPICH and Intel MPI, MVAPICH, Cray's PALS, and Slurm. torchrun's first, since mpirun
# or srun may have started it; Slurm's last, since any of the others may run inside an allocation.
LOCAL_RANK = (
    "LOCAL_RANK",
    "OMPI_COMM_WORLD_LOCAL_RANK",
    "MPI_LOCALRANKID",
    "MV2_COMM_WORLD_LOCAL_RANK",
    "PALS_LOCAL_RANKID",
    "SLURM_LOCALID",
)


class NoSeat(Exception):
    """Some rank has no GPU of its own."""


@dataclass(frozen=True)
class Seat:
    """The facts that decide which GPU a rank takes.

    Attributes:
        host: equal for the ranks that share GPUs; its name is the part before the slash.
        local_rank: the rank's number there, by the launcher; None: it does not say.
        gpus: ids of the GPUs that this rank sees, in the order of their numbers.
    """

    host: str
    local_rank: int | None
    gpus: tuple[str, ...]

    @staticmethod
    def here() -> Seat:
        """This process's."""
        gpus = range(torch.cuda.device_count())
        return Seat(
            f"{socket.gethostname()}/{clock_id()}",
            local_rank(os.environ),
            tuple(cuda.properties(index).uuid for index in gpus),
        )


def local_rank(environment: Mapping[str, str]) -> int | None:
    """The place among the ranks of one host, as this process's launcher says; None: it does not."""
    for name in LOCAL_RANK:
        if environment.get(name, "").isdecimal():
            return int(environment[name])
    return None


def gpu_numbers(seats: Sequence[Seat]) -> list[int]:
    """The number of each rank's GPU, as that rank counts those it sees. The same on all ranks.

    Raises:
        NoSeat: a host has fewer GPUs than ranks, or two ranks would share one.
    """
    of_host: dict[str, list[int]] = defaultdict(list)
    for rank, seat in enumerate(seats):
        of_host[seat.host].append(rank)
    numbers = [0] * len(seats)
    for ranks in of_host.values():
        for rank, number in zip(ranks, _of_one_host(ranks, [seats[r] for r in ranks]), strict=True):
            numbers[rank] = number
    return numbers


def _of_one_host(ranks: Sequence[int], seats: Sequence[Seat]) -> list[int]:
    """The number of each of these ranks' GPU."""
    name = seats[0].host.partition("/")[0]
    if all(len(seat.gpus) == 1 for seat in seats) and len({seat.gpus for seat in seats}) == len(seats):
        return [0] * len(seats)  # the launcher has already assigned them
    places = [seat.local_rank for seat in seats]
    if None in places or len(set(places)) < len(places):
        places = list(range(len(seats)))
    numbers = []
    for rank, place, seat in zip(ranks, places, seats, strict=True):
        assert place is not None
        if place >= len(seat.gpus):
            raise NoSeat(
                f"each rank needs a GPU of its own: host {name} has {len(seats)} ranks, and rank {rank}, "
                f"number {place} there, sees {_count(len(seat.gpus))}"
            )
        numbers.append(place)
    taken: dict[str, int] = {}
    for rank, number, seat in zip(ranks, numbers, seats, strict=True):
        other = taken.setdefault(seat.gpus[number], rank)
        if other != rank:
            raise NoSeat(f"ranks {other} and {rank} on host {name} would share GPU {seat.gpus[number]}")
    return numbers


def _count(gpus: int) -> str:
    return "1 GPU" if gpus == 1 else f"{gpus} GPUs"


def take_gpu(launch: Launch) -> tuple[torch.device, int]:
    """This rank's GPU, from now on the current one, and the number of hosts. Called by all ranks.

    Raises:
        NoSeat: some rank has no GPU to itself.
    """
    if why := launch.agreed(cuda.why_not()):
        raise NoSeat(f"needs a GPU for each rank: {why}")
    seats = launch.gather(Seat.here())
    device = torch.device("cuda", gpu_numbers(seats)[launch.rank])
    torch.cuda.set_device(device)
    return device, len({seat.host for seat in seats})
