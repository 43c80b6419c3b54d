"""Ranks with a GPU each: which rank has which GPU, and what is compared, with stand-ins for GPUs and NCCL."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench.harness import seats
from bench.harness.launch import Launch
from commlib import cuda

BENCH = Path(__file__).parents[2] / "bench"
PROGRAM = str(Path(__file__).parents[1] / "programs" / "gpu_comparison.py")
SMALL = ["--tokens", "37", "--hidden", "48", "--experts", "8", "--topk", "3", "--iters", "3", "--warmup", "1"]
OURS = ["commlib zero-copy", "commlib owned"]
NCCL = ["NCCL, plain", "NCCL, tuned"]


# -- seats ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environment", "place"),
    [
        ({}, None),
        ({"LOCAL_RANK": "3"}, 3),
        ({"OMPI_COMM_WORLD_LOCAL_RANK": "2", "OMPI_COMM_WORLD_RANK": "10"}, 2),
        ({"MPI_LOCALRANKID": "5", "PMI_RANK": "13"}, 5),
        ({"SLURM_LOCALID": "1", "SLURM_PROCID": "9"}, 1),
        ({"LOCAL_RANK": "4", "SLURM_LOCALID": "0"}, 4),  # torchrun inside srun
        ({"OMPI_COMM_WORLD_LOCAL_RANK": "4", "SLURM_LOCALID": "0"}, 4),  # mpirun inside an allocation
        ({"LOCAL_RANK": "", "SLURM_LOCALID": "6"}, 6),
    ],
)
def test_the_launchers_local_rank_is_found(environment, place):
    assert seats.local_rank(environment) == place


def test_a_rank_takes_the_gpu_of_its_local_rank_on_each_host():
    first, second = ("a0", "a1"), ("b0", "b1", "b2")
    ranks = [seats.Seat("a/1", 1, first), seats.Seat("b/2", 0, second), seats.Seat("a/1", 0, first)]
    assert seats.gpu_numbers([*ranks, seats.Seat("b/2", 2, second)]) == [1, 0, 0, 2]


@pytest.mark.parametrize("places", [[None, None, None], [0, None, 2], [0, 0, 0]])
def test_where_the_launcher_does_not_say_ranks_are_counted_on_their_host(places):
    gpus = ("g0", "g1", "g2")
    ranks = [seats.Seat("a/1", place, gpus) for place in places]
    assert seats.gpu_numbers([ranks[0], seats.Seat("b/2", None, ("h",)), *ranks[1:]]) == [0, 0, 1, 2]


def test_gpus_that_the_launcher_dealt_out_are_taken_as_they_are():
    assert seats.gpu_numbers([seats.Seat("a/1", place, (f"g{place}",)) for place in range(3)]) == [0, 0, 0]


def test_a_host_with_fewer_gpus_than_ranks_is_named():
    ranks = [seats.Seat(f"node{r // 3}/x", r % 3, (f"g{r // 3}0", f"g{r // 3}1")) for r in range(6)]
    with pytest.raises(seats.NoSeat, match="host node0 has 3 ranks, and rank 2, number 2 there, sees 2 GPUs"):
        seats.gpu_numbers(ranks)
    one = [seats.Seat("alone/x", r, ("g",)) for r in range(2)]
    with pytest.raises(
        seats.NoSeat, match=r"host alone has 2 ranks, and rank 1, number 1 there, sees 1 GPU$"
    ):
        seats.gpu_numbers(one)


def test_two_ranks_never_share_a_gpu():
    ranks = [seats.Seat("a/1", 0, ("g1", "g0")), seats.Seat("a/1", 1, ("g0", "g1"))]
    with pytest.raises(seats.NoSeat, match="ranks 0 and 1 on host a would share GPU g1"):
        seats.gpu_numbers(ranks)


def test_spans_of_hosts_with_clocks_of_their_own_are_not_mixed(monkeypatch):
    ranks = [
        ("one", [(10.0, 11.0), (20.0, 21.0)]),
        ("other", [(5010.0, 5012.5), (5020.0, 5020.5)]),
        ("one", [(10.5, 12.0), (20.5, 22.0)]),
    ]
    monkeypatch.setattr(Launch, "gather", lambda self, value: ranks)
    assert Launch(0, 3, None, "").spans([]) == [2.5, 2.0]


# -- the comparison ------------------------------------------------------------------------------------------


@pytest.fixture
def compare(launch, tmp_path):
    """Run it on processes; the finished process, and what was written."""

    def run(fault, ranks=2, launcher="torchrun", arguments=()):
        path = tmp_path / "found.json"
        done = launch(PROGRAM, ranks, launcher, arguments=[fault, *SMALL, *on_gpus(path), *arguments])
        assert path.exists(), done.stdout + done.stderr
        return done, json.loads(path.read_text())

    return run


def on_gpus(path):
    return ["--device", "cuda", "--json", str(path)]


def test_all_that_is_installed_is_compared_in_one_run(compare):
    done, found = compare("nothing", 4, "mpirun")
    assert done.returncode == 0, done.stdout + done.stderr
    names = [*OURS, *NCCL, "symmetric memory", "DeepEP"]
    assert sorted(found["samples_s"]) == sorted(names)
    for times in found["samples_s"].values():
        assert {operation: len(seconds) for operation, seconds in times.items()} == {
            "dispatch": 3,
            "combine": 3,
        }
    assert set(found["missing"]) == {"CuPy's NCCL"}
    assert found["missing"]["CuPy's NCCL"].startswith("ModuleNotFoundError: No module named 'cupy")
    rows = [line for line in done.stdout.splitlines() if "not timed" in line and "│" in line]
    assert len(rows) == 1 and "CuPy's NCCL" in rows[0] and "ModuleNotFoundError" in rows[0]
    assert done.stdout.count("destroyed") == 4


@pytest.mark.parametrize(
    ("faults", "reasons"),
    [
        (
            "no-deep-ep,no-nvshmem",
            {
                "DeepEP": "ModuleNotFoundError: import of deep_ep",
                "symmetric memory": f"torch {torch.__version__} was built without NVSHMEM",
            },
        ),
        (
            "deep-ep-does-not-start,vdev-fails-on-rank-1",
            {
                "DeepEP": "AssertionError: No NVLink between GPUs 0 and 1",
                "symmetric memory": "rank 1: RuntimeError: nvshmem: out of memory",
            },
        ),
    ],
)
def test_what_is_missing_or_fails_has_one_line_and_the_others_run(compare, faults, reasons):
    done, found = compare(faults)
    assert done.returncode == 0, done.stdout + done.stderr
    assert set(found["samples_s"]) == {*OURS, *NCCL}
    table = done.stdout.partition("└")[0].splitlines()
    for name, why in reasons.items():
        assert found["missing"][name].startswith(why)
        (line,) = [line for line in table if name in line]
        assert why[:35] in line  # on one line, however long the reason
        assert (
            len([line for line in done.stdout.splitlines() if line.startswith(f"{name}: not timed: ")]) == 1
        )


def test_one_rank_is_compared_with_what_was_asked_for(compare):
    """DeepEP does not know this number of ranks."""
    done, found = compare("nothing", ranks=1, arguments=["--only", "nccl,deep_ep"])
    assert done.returncode == 0, done.stdout + done.stderr
    assert set(found["samples_s"]) == set(NCCL)
    assert found["missing"] == {"DeepEP": "Unsupported number of EP ranks: 1"}
    tuned = [line for line in done.stdout.splitlines() if "NCCL, tuned" in line]
    assert len(tuned) == 2 and all(line.rstrip(" │").endswith("1.0x") for line in tuned)


def test_a_system_that_answers_wrongly_is_not_timed_and_the_status_says_so(compare):
    done, found = compare("deep-ep-is-wrong")
    assert done.returncode != 0
    assert "DeepEP" not in found["samples_s"] and "NCCL, tuned" in found["samples_s"]
    assert found["missing"]["DeepEP"].startswith("WRONG, rank 0: rows: 1 of ")
    assert "WRONG RESULTS" in done.stderr and "DeepEP, rank 1: rows: 1 of" in done.stderr


@pytest.mark.skipif(cuda.is_available(), reason="a GPU can be used here")
def test_without_gpus_one_rank_says_why(launch):
    done = launch(str(BENCH / "dispatch_combine.py"), 2, arguments=["--device", "cuda"])
    assert done.returncode == 2
    said = [line for line in done.stderr.splitlines() if "needs a GPU for each rank" in line]
    assert len(said) == 1 and cuda.why_not() in said[0]


@pytest.mark.parametrize("arguments", [["--device", "cuda:1"], ["--device", "cuda", "--only", "gloo"]])
def test_arguments_that_make_no_sense_are_refused(arguments):
    command = [sys.executable, str(BENCH / "dispatch_combine.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "error: --" in done.stderr


@pytest.mark.gpu
def test_one_rank_on_a_gpu_compares_with_nccl(launch, tmp_path):
    path = tmp_path / "found.json"
    done = launch(str(BENCH / "dispatch_combine.py"), 1, "torchrun", arguments=[*SMALL, *on_gpus(path)])
    assert done.returncode == 0, done.stdout + done.stderr
    assert {*OURS, *NCCL} <= set(json.loads(path.read_text())["samples_s"])


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() > 1, reason="there is a GPU for each rank")
def test_two_ranks_on_one_gpu_are_told_that_each_needs_its_own(launch):
    done = launch(str(BENCH / "dispatch_combine.py"), 2, "torchrun", arguments=["--device", "cuda"])
    assert done.returncode != 0
    assert "each rank needs a GPU of its own" in done.stderr
