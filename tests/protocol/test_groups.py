"""Ways in which ranks find each other: launchers, process groups, communicators."""

import re
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from commlib import ExpertParallel
from commlib.startup.group import MPIGroup, SingleGroup, TorchGroup, resolve_group

PROGRAMS = Path(__file__).parents[1] / "programs"


def said(stdout):
    """What the ranks printed. Their lines may run together: they share one pipe."""
    return re.findall(r"ok rank \d of \d", stdout)


@pytest.mark.parametrize("launcher", ["mpirun", "torchrun"])
def test_launched_ranks_need_no_configuration(launch, launcher):
    done = launch(str(PROGRAMS / "round_trip.py"), 3, launcher, KIND="default")
    assert done.returncode == 0, done.stderr
    assert sorted(said(done.stdout)) == [f"ok rank {r} of 3" for r in range(3)]


@pytest.mark.parametrize(
    ("launcher", "kind"),
    [
        ("torchrun", "process group"),
        ("torchrun", "subgroup"),
        ("torchrun", "device mesh"),
        ("mpirun", "communicator"),
        ("mpirun", "split communicator"),
    ],
)
def test_groups_of_users(launch, launcher, kind):
    done = launch(str(PROGRAMS / "round_trip.py"), 4, launcher, KIND=kind)
    assert done.returncode == 0, done.stderr
    size = 2 if kind in ("subgroup", "split communicator") else 4
    lines = said(done.stdout)
    assert len(lines) == 4 and all(line.endswith(f"of {size}") for line in lines), done.stdout


@pytest.mark.parametrize("launcher", ["mpirun", "torchrun"])
def test_launched_ranks_can_try_again_when_one_was_missing(launch, launcher, tmp_path):
    done = launch(str(PROGRAMS / "late_rank.py"), 3, launcher, arguments=[str(tmp_path)])
    assert done.returncode == 0, done.stderr
    assert sorted(said(done.stdout)) == [f"ok rank {r} of 3" for r in range(3)]


def test_without_a_launcher_there_is_one_rank():
    assert isinstance(resolve_group(None), SingleGroup) or "mpi4py.MPI" in sys.modules


def test_an_mpi_communicator_is_taken_as_it_is():
    class Comm:
        def Get_rank(self):
            return 0

        def Get_size(self):
            return 1

        def allgather(self, obj):
            return [obj]

    assert isinstance(resolve_group(Comm()), MPIGroup)


def test_the_default_process_group_is_used(tmp_path):
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "s"), 1), rank=0, world_size=1)
    try:
        assert isinstance(resolve_group(None), TorchGroup)
        mesh = dist.init_device_mesh("cpu", (1, 1), mesh_dim_names=("a", "b"))
        with pytest.raises(ValueError, match="one dimension, got 2"):
            resolve_group(mesh)
        assert resolve_group(mesh["a"]).size == 1
    finally:
        dist.destroy_process_group()


def test_a_group_whose_process_group_was_destroyed_says_so(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    group = resolve_group(None)
    dist.destroy_process_group()
    with pytest.raises(ValueError, match=r"a torch\.distributed process group that has been destroyed"):
        ExpertParallel(group, num_experts=4, hidden=8, topk=1, max_tokens=4, device="cpu")


def test_importing_commlib_starts_neither_mpi_nor_cuda(launch):
    import subprocess

    code = (
        "import sys, commlib; print('mpi4py.MPI' in sys.modules, __import__('torch').cuda.is_initialized())"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.split() == ["False", "False"]
    assert torch is not None
