"""The benchmark of a whole layer: all systems in one run, and none that differs is timed."""

import json
import sys
from pathlib import Path

import pytest

from bench import moe_layer
from bench.rig import namespaces

BENCH = Path(__file__).parents[2] / "bench"

PROGRAM = str(BENCH / "moe_layer.py")
WITH_FAULT = str(Path(__file__).parents[1] / "programs" / "moe_layer.py")
SMALL = ["--tokens", "24", "--hidden", "32", "--ffn-hidden", "16", "--experts", "4", "--topk", "2"]
SMALL += ["--iters", "2", "--warmup", "1"]
ALL = ["commlib", "gloo all-to-all", "MPI all-to-all"]
WHY_NOT = namespaces.why_not()


@pytest.fixture
def measure(launch, tmp_path):
    """Run it on processes; the finished process, and what was written, if anything was."""

    def run(program, ranks, *arguments, launcher="mpirun", options=SMALL):
        path = tmp_path / "found.json"
        words = [*arguments, *options, "--json", str(path)]
        done = launch(program, ranks, launcher, arguments=words)
        return done, json.loads(path.read_text()) if path.exists() else None

    return run


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_all_systems_have_their_turns_in_one_run(measure, dtype):
    done, found = measure(PROGRAM, 2, "--dtype", dtype)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {name: len(seconds) for name, seconds in found["samples_s"].items()} == dict.fromkeys(ALL, 2)
    assert found["skipped"] == {} and found["machine"]["ranks"] == 2
    assert all(len(peaks) == 2 and min(peaks) > 0 for peaks in found["peak_bytes"].values())
    for name in ALL:
        assert name in done.stdout
    assert "top-2 of 4" in done.stdout


def test_bytes_are_those_of_rows_for_each_rank_and_for_each_expert(measure):
    """The same where each rank has one expert; commlib sends one row for two experts of a rank."""
    each, counts = 32 * 4, 4 * 4 * 8  # bytes of a row; of the counts that a rank sends, at most
    _, one = measure(PROGRAM, 4)
    _, two = measure(PROGRAM, 2)
    for found in (one, two):
        assert found["sent_bytes"]["gloo all-to-all"] == found["sent_bytes"]["MPI all-to-all"]
    for ours, theirs in zip(*(one["sent_bytes"][name] for name in ALL[:2]), strict=True):
        assert ours % each == 0 and 0 < theirs - ours <= counts
    # Two ranks: a token has both experts on the other rank with a chance of 1 in 6, one of them in 4 of 6.
    ours, theirs = (sum(two["sent_bytes"][name]) for name in ALL[:2])
    assert ours < theirs - 2 * counts


def test_experts_and_ranks_may_get_no_tokens(measure):
    few = ["--tokens", "1", "--topk", "1", "--experts", "8"]
    done, found = measure(PROGRAM, 4, options=[*SMALL, *few])
    assert done.returncode == 0, done.stdout + done.stderr
    assert sorted(found["samples_s"]) == sorted(ALL)


def test_what_cannot_run_is_named(measure):
    done, found = measure(PROGRAM, 2, launcher="torchrun")
    assert done.returncode == 0, done.stdout + done.stderr
    assert sorted(found["samples_s"]) == sorted(ALL[:2])
    assert found["skipped"] == {"MPI all-to-all": "started without mpirun"}
    assert "started without" in done.stdout


def test_on_gpus_nccl_takes_the_place_of_the_others(measure):
    done, found = measure(WITH_FAULT, 2, "nccl-is-gloo")
    assert done.returncode == 0, done.stdout + done.stderr
    assert list(found["samples_s"]) == ["commlib", "NCCL all-to-all"]


@pytest.mark.parametrize(
    ("fault", "text"),
    [
        ("mpi-loses-a-row", "MPI all-to-all, rank 1: output is"),
        ("half-the-gradient", "gloo all-to-all, rank 0: gradient of x is"),
    ],
)
def test_a_system_that_differs_ends_the_run_untimed(measure, fault, text):
    done, found = measure(WITH_FAULT, 2, fault)
    assert done.returncode != 0 and found is None
    assert "WrongResults" in done.stderr and text in done.stderr
    assert "commlib, rank" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--experts", "3"], "--experts 3 do not divide by 2 ranks"),
        (["--link-gbps", "0.1"], "run it without mpirun or torchrun"),
    ],
)
def test_what_cannot_be_measured_is_refused(measure, arguments, text):
    done, found = measure(PROGRAM, 2, options=[*SMALL, *arguments])
    assert done.returncode != 0 and found is None and text in done.stderr


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--only", "commlib,ucc"], "--only takes commlib, gloo, mpi, nccl"),
        (["--topk", "5"], "--topk at most --experts"),
        (["--iters", "0"], "sizes must be at least 1"),
        (["--link-gbps", "0"], "--link-gbps takes a number above 0"),
        (["--link-gbps", "1", "--device", "cuda"], "--link-gbps takes a number above 0, on the CPU"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(capsys, arguments, text):
    with pytest.raises(SystemExit):
        moe_layer.parse_arguments([*SMALL, *arguments])
    assert text in capsys.readouterr().err


@pytest.mark.skipif(WHY_NOT is not None, reason=f"no rig here: {WHY_NOT}")
def test_links_limit_all_systems_alike(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}", prepend=":")
    monkeypatch.setenv("PYTHONPATH", str(BENCH.parent))
    path = tmp_path / "limited.json"
    moe_layer.main([*SMALL, "--link-gbps", "0.1", "--json", str(path)])
    found = json.loads(path.read_text())
    assert sorted(found["samples_s"]) == sorted(ALL)
    rows_each_way = 32 * 4 * 4  # the fewest bytes of rows, forward and backward
    for per_node in found["traffic"].values():
        assert len(per_node) == 2 and all(len(turns) == 2 for turns in per_node)
        assert min(min(turn) for turns in per_node for turn in turns) > rows_each_way
    said = " ".join(capsys.readouterr().out.split())
    assert "2 nodes with links of 0.1 GB/s" in said and "MB on link" in said
