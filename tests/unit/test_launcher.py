"""Which of several launchers counts."""

import os
import subprocess
import sys

import pytest

from commlib.errors import CommError
from commlib.startup import launcher
from commlib.startup.launcher import find_launch

TORCH = {"RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
ALONE = TORCH | {"RANK": "0", "WORLD_SIZE": "1"}
OMPI = {"OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_SIZE": "3"}
OMPI_ALONE = {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1"}
PMI = {"PMI_RANK": "1", "PMI_SIZE": "2"}
PMI_ALONE = {"PMI_RANK": "0", "PMI_SIZE": "1"}
SLURM = {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2"}


@pytest.fixture
def found(monkeypatch):
    """What is found in a process whose launchers set these variables, the outermost first."""

    def find(*launchers, mpi=(0, 1), seen=True):
        for name in [*TORCH, *OMPI, *PMI, *SLURM, "MV2_COMM_WORLD_RANK"]:
            monkeypatch.delenv(name, raising=False)
        environments = [{}]
        for variables in launchers:
            environments.append(environments[-1] | variables)
        for name, value in environments[-1].items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(launcher, "_ancestors", lambda: iter(environments[::-1] if seen else []))
        monkeypatch.setattr(launcher, "_mpi_world", lambda: mpi)
        launch = find_launch()
        return launch and (launch.by, launch.rank, launch.size)

    return find


def test_the_launcher_that_is_there_counts(found):
    assert found() is None
    assert found(TORCH) == ("torchrun", 1, 4)
    assert found(OMPI, mpi=(2, 3)) == ("MPI", 2, 3)
    assert found(PMI, mpi=(1, 2)) == ("MPI", 1, 2)
    assert found(SLURM, mpi=(1, 2)) == ("Slurm", 1, 2)  # found by MPI
    for alone in (ALONE, OMPI_ALONE, PMI_ALONE):
        assert found(alone) is None


def test_the_innermost_counts(found):
    assert found(OMPI, TORCH) == found(PMI_ALONE, TORCH) == found(SLURM, OMPI, TORCH) == ("torchrun", 1, 4)
    assert found(TORCH, OMPI, mpi=(2, 3)) == found(ALONE, OMPI, mpi=(2, 3)) == ("MPI", 2, 3)
    assert found(SLURM, PMI_ALONE, OMPI, mpi=(2, 3)) == ("MPI", 2, 3)
    assert found(TORCH | {"WORLD_SIZE": "2", "RANK": "0"}, TORCH) == ("torchrun", 1, 4)


def test_where_it_cannot_be_seen_one_rank_says_nothing(found):
    assert found(PMI_ALONE, TORCH, seen=False) == ("torchrun", 1, 4)
    assert found(OMPI, ALONE, mpi=(2, 3), seen=False) == ("MPI", 2, 3)
    with pytest.raises(CommError, match=r"MPI .* says rank 2 of 3; torchrun .* says rank 1 of 4"):
        found(OMPI, TORCH, seen=False)


def test_ranks_that_would_each_be_alone_are_an_error(found):
    with pytest.raises(CommError, match=r"says rank 2 of 3; .* says rank 0 of 1"):
        found(OMPI, ALONE)
    with pytest.raises(CommError, match=r"says rank 1 of 2, but mpi4py's COMM_WORLD says rank 0 of 1"):
        found(PMI)
    with pytest.raises(CommError, match=r"Slurm .* says rank 1 of 2, but"):
        found(SLURM)


def test_numbers_that_are_none_are_an_error(found):
    for rank, size in (("4", "4"), ("-1", "2"), ("x", "2"), ("0", "")):
        with pytest.raises(CommError, match=f"RANK={rank} and WORLD_SIZE={size}"):
            found(TORCH | {"RANK": rank, "WORLD_SIZE": size})


def test_ancestors_are_this_process_and_those_that_started_it():
    """Seen in a child: the process that started pytest may have ended."""
    code = "from commlib.startup import launcher\nfor began in launcher._ancestors(): print(began.get('AGE'))"
    began = os.environ | {"AGE": "child"}
    said = subprocess.run([sys.executable, "-c", code], env=began, capture_output=True, text=True).stdout
    ages = said.split()
    assert ages[:2] == ["child", "None"] and len(ages) == 1 + len(list(launcher._ancestors()))
