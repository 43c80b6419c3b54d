"""Ranks on CPUs: all systems answer as they must on both paths, and what tables make of their times."""

import argparse
import json
import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from bench import cpu_paths, dispatch_combine
from bench.cpu_paths import Versus
from bench.harness.layer_job import ALIGN, LayerJob, expert
from bench.harness.workload import Job, Received, Shape
from bench.systems.cpus import GLOO, LAYER, MPI, PLAIN, RANK, WINDOWS, WINDOWS_OWNED
from bench.systems.grouped import Groups

PROGRAMS = Path(__file__).parents[1] / "programs"
BENCHMARK = str(Path(__file__).parents[2] / "bench" / "dispatch_combine.py")
SMALL = ["--hidden", "32", "--experts", "8", "--topk", "3", "--iters", "2", "--warmup", "1"]
ZERO_COPY, OWNED, LIMIT = "commlib zero-copy", "commlib owned", "bare limit"
ON_PATH = {
    RANK: {ZERO_COPY, OWNED, PLAIN, GLOO, MPI, WINDOWS, WINDOWS_OWNED},
    LAYER: {ZERO_COPY, OWNED, GLOO, MPI, WINDOWS, WINDOWS_OWNED},
}


# -- right and wrong answers ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_all_systems_are_right_on_both_paths_whatever_each_rank_sends(launch, dtype):
    cases = ["5,0,3", "0,0,1", "1,1,1", "64,7,33"]
    done = launch(str(PROGRAMS / "uneven_tokens.py"), 3, arguments=[dtype, *cases])
    assert done.returncode == 0, done.stdout + done.stderr
    said = re.findall(r"^(\S+) (\w+): (.*); wrong: (.*)$", done.stdout, re.MULTILINE)
    assert [(case, path) for case, path, _, _ in said] == [(c, p) for c in cases for p in ON_PATH]
    for _, path, right, wrong in said:
        assert wrong == "[]"
        assert right == ", ".join(f"{name} 6" for name in sorted(ON_PATH[path]))  # 3 ranks, twice


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("windows-dispatch", r"rank path, T=6: MPI windows, rank 1: rows: 1 of \d+ rows differ"),
        ("windows-combine", r"layer path, T=6: MPI windows owned, rank 1: sum: 1 of 192 values differ"),
        ("grouped-combine", r"layer path, T=6: MPI windows, rank 1: sum: 1 of 192 values differ"),
        ("commlib-combine", r"layer path, T=6: commlib owned, rank 0: sum: 1 of 192 values differ"),
        ("weights", r"layer path, T=6: gloo, tuned, rank 0: topk_weights: \d+ of \d+ rows differ"),
    ],
)
def test_a_wrong_answer_ends_the_benchmark_and_is_named(launch, tmp_path, fault, said):
    arguments = [fault, *SMALL, "--tokens", "6", "--json", str(tmp_path / "found.json")]
    done = launch(str(PROGRAMS / "cpu_paths.py"), 2, arguments=arguments)
    assert done.returncode == 1 and "WRONG RESULTS" in done.stderr
    assert re.search(said, done.stderr), done.stderr


def test_without_mpi_the_reason_stands_in_its_rows_and_gloo_is_the_best_peer(launch, tmp_path):
    path = tmp_path / "found.json"
    arguments = [*SMALL, "--tokens", "1", "6", "--json", str(path)]
    done = launch(BENCHMARK, 2, "torchrun", arguments=arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(path.read_text())
    assert found["skipped"] == dict.fromkeys([MPI, WINDOWS], "started without mpirun")
    assert [set(m["samples_s"]) - {LIMIT} for m in found["measured"]] == [
        {ZERO_COPY, GLOO},
        {ZERO_COPY, GLOO},
        ON_PATH[RANK] - {MPI, WINDOWS, WINDOWS_OWNED},
        ON_PATH[LAYER] - {MPI, WINDOWS, WINDOWS_OWNED},
    ]
    assert len(re.findall(r"\d gloo, tuned +│", done.stdout)) == 8
    assert len(re.findall(r"MPI windows +│ +started without", done.stdout)) == 4


def test_every_sample_of_each_path_and_size_is_written(launch, tmp_path):
    path = tmp_path / "found.json"
    done = launch(BENCHMARK, 2, arguments=[*SMALL, "--tokens", "6", "1", "--json", str(path)])
    assert done.returncode == 0, done.stdout + done.stderr
    measured = json.loads(path.read_text())["measured"]
    assert [(m["tokens"], m["path"]) for m in measured] == [(6, RANK), (6, LAYER), (1, RANK), (1, LAYER)]
    assert [set(m["samples_s"]) - {LIMIT} for m in measured] == [
        *ON_PATH.values(),
        {ZERO_COPY, MPI, WINDOWS},
        {ZERO_COPY, MPI, WINDOWS},
    ]
    times = [times for m in measured for system in m["samples_s"].values() for times in system.values()]
    assert all(len(seconds) == 2 and min(seconds) > 0 for seconds in times)


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--tokens", "1", "0"], "sizes must be at least 1"),
        (["--iters", "0"], "sizes must be at least 1"),
        (["--tokens", "1", "8", "--preset", "h800"], "several sizes only on CPUs"),
        (["--only", "mpi,window"], "--only takes commlib, gloo, mpi, windows"),
    ],
)
def test_options_that_make_no_sense_are_refused(monkeypatch, capsys, arguments, why):
    monkeypatch.setattr("sys.argv", ["dispatch_combine", *arguments])
    with pytest.raises(SystemExit):
        dispatch_combine.parse_arguments()
    assert why in capsys.readouterr().err


# -- the job of the layer path -------------------------------------------------------------------------------


@pytest.fixture
def jobs():
    """Rank 1 of 2: four experts each."""
    shape = Shape(9, 16, 8, 3, torch.bfloat16, seed=2)
    job = Job.build(shape, 1, 2)
    return job, LayerJob.of(job, shape, 1, 2)


def test_grouped_rows_are_those_that_came_expert_by_expert_and_padded(jobs):
    job, layer = jobs
    offsets = layer.expected.offsets.tolist()
    assert offsets[0] == 0 and offsets[-1] == len(layer.expected.rows) == len(layer.y)
    for local, (begin, end) in enumerate(pairwise(offsets)):
        mine = (job.expected.topk_idx == local).any(1)
        count = int(mine.sum())
        assert (end - begin) % ALIGN == 0 and 0 <= end - begin - count < ALIGN
        assert torch.equal(layer.expected.rows[begin : begin + count], job.expected.rows[mine])
        assert not layer.expected.rows[begin + count : end].any()
        assert not layer.expected.topk_weights[begin + count : end].any()
        assert torch.equal(layer.y[begin : begin + count], expert(job.expected.rows[mine], 4 + local))


def test_a_sum_may_be_off_by_roundings_and_by_nothing_else(jobs):
    _, layer = jobs
    exact = layer.expected_sum
    assert layer.wrong_sum(exact.bfloat16()) == []
    assert layer.wrong_sum(-exact.bfloat16()) != []
    off = exact.bfloat16()
    off[3, 2] = float("nan")
    assert layer.wrong_sum(off) == ["sum: 1 of 144 values differ"]
    assert layer.wrong_sum(off[:-1]) == ["sum [8, 16], not [9, 16]"]
    others = dict(topk_idx=layer.topk_idx.roll(1, 1), topk_weights=layer.topk_weights)
    shape = Shape(9, 16, 8, 3, torch.bfloat16, seed=2)
    received = Received(torch.empty(0, 16), torch.empty(0, 3), torch.empty(0, 3))
    mixed = Job(layer.x, **others, expected=received, y=layer.y, output=layer.y, expected_sum=exact)
    assert layer.wrong_sum(LayerJob.of(mixed, shape, 1, 2).expected_sum.bfloat16()) != []


def test_rows_weights_and_offsets_are_each_checked(jobs):
    _, layer = jobs
    right = layer.expected
    assert layer.wrong_rows(right) == []
    assert layer.wrong_rows(replace(right, rows=right.rows[1:]))[0].startswith("rows [")
    swapped = right.rows.clone()
    swapped[:2] = right.rows[:2].flip(0)
    assert layer.wrong_rows(replace(right, rows=swapped)) == [f"rows: 2 of {len(swapped)} rows differ"]
    assert "topk_weights" in layer.wrong_rows(replace(right, topk_weights=right.topk_weights + 1))[0]
    assert "offsets" in layer.wrong_rows(replace(right, offsets=right.offsets + 1))[0]


def test_large_sums_are_taken_in_chunks_that_give_the_same(jobs, monkeypatch):
    job, layer = jobs
    groups = Groups.of(job.expected.topk_idx, job.expected.topk_weights, 4)
    sums = torch.full((2, *job.expected.rows.shape), float("nan"), dtype=torch.bfloat16)
    groups.sum_into(sums[0], layer.y)
    monkeypatch.setattr("bench.systems.grouped.CHUNK_BYTES", 3 * 16 * 2)  # three rows
    groups.sum_into(sums[1], layer.y)
    assert len(job.expected.rows) > 6 and torch.equal(sums[0], sums[1])


# -- tables --------------------------------------------------------------------------------------------------


def times(dispatch_ms, combine_ms):
    """Samples with these medians."""
    return {
        "dispatch": [factor * dispatch_ms * 1e-3 for factor in (3, 1, 0.5)],
        "combine": [factor * combine_ms * 1e-3 for factor in (0.5, 1, 3)],
    }


FOUND = {
    "machine": {"ranks": 4, "cores": 2, "cpu": "a CPU"},
    "skipped": {},
    "measured": [
        {
            "path": RANK,
            "tokens": 8,
            "rows_received": [4, 8],
            "samples_s": {ZERO_COPY: times(2, 1.5), MPI: times(5, 4), WINDOWS: times(6, 1.2)},
        },
        {
            "path": LAYER,
            "tokens": 8,
            "rows_received": [4, 8],
            "samples_s": {
                ZERO_COPY: times(4, 2),
                OWNED: times(5, 3),
                PLAIN: times(1, 1),  # never a peer
                GLOO: times(8, 9),
                LIMIT: times(1, 1),
            },
        },
    ],
}
ARGS = argparse.Namespace(hidden=1000, dtype="bf16", topk=2, experts=8)


def test_the_best_peer_is_another_one_for_each_operation():
    samples = FOUND["measured"][0]["samples_s"]
    assert Versus.of(samples, ZERO_COPY, "dispatch") == Versus(0.002, 0.005, MPI)
    assert Versus.of(samples, ZERO_COPY, "combine") == Versus(0.0015, 0.0012, WINDOWS)
    assert Versus.of(samples, ZERO_COPY, "combine").ratio == pytest.approx(0.8)
    assert Versus.of(samples, OWNED, "dispatch") is None
    owned = {OWNED: times(1, 2), WINDOWS_OWNED: times(9, 6), WINDOWS: times(9, 1)}
    assert Versus.of(owned, OWNED, "combine") == Versus(0.002, 0.006, WINDOWS_OWNED)
    assert Versus.of(owned | {ZERO_COPY: times(1, 1)}, ZERO_COPY, "combine") == Versus(0.001, 0.001, WINDOWS)
    assert Versus.of({ZERO_COPY: times(1, 1), PLAIN: times(2, 2)}, ZERO_COPY, "dispatch") is None


def test_the_summary_has_a_line_for_each_path_and_size():
    title, columns, sections = cpu_paths.summary_table(ARGS, FOUND)
    assert title.startswith("4 ranks on 2 cores (a CPU), H=1000 bf16, top-2 of 8 experts")
    assert len(columns) == 8
    assert sections == [
        [[RANK, "8", "2.00", "5.00 MPI", "2.5x", "1.50", "1.20 MPI windows", "0.8x"]],
        [[LAYER, "8", "4.00", "8.00 gloo, tuned", "2.0x", "2.00", "9.00 gloo, tuned", "4.5x"]],
    ]


def test_ratios_of_a_path_are_by_size():
    slower = FOUND["measured"][0] | {"tokens": 64, "samples_s": {ZERO_COPY: times(10, 1), MPI: times(5, 4)}}
    found = FOUND | {"measured": [*FOUND["measured"], slower]}
    assert cpu_paths.ratios(found, RANK, ZERO_COPY, "dispatch") == ["2.5x", "0.5x"]
    assert cpu_paths.ratios(found, LAYER, OWNED, "combine") == ["3.0x"]
    assert cpu_paths.ratios(found, RANK, OWNED, "combine") == ["", ""]


def test_without_a_peer_the_summary_has_no_ratio():
    alone = {"path": RANK, "tokens": 8, "rows_received": [1], "samples_s": {ZERO_COPY: times(2, 1)}}
    _, _, sections = cpu_paths.summary_table(ARGS, FOUND | {"measured": [alone]})
    assert sections == [[[RANK, "8", *[""] * 6]], []]


def test_the_detail_compares_each_system_with_the_best_peer_plain_gloo_and_the_limit():
    found = FOUND | {"skipped": {MPI: "no MPI"}}
    title, _, (dispatch, _) = cpu_paths.detail_table(ARGS, found, FOUND["measured"][1])
    assert title == "layer path, T=8 H=1000 bf16, top-2 of 8 experts, median of 3"
    assert dispatch == [
        ["dispatch", ZERO_COPY, "4.0 (2.0-12.0)", "0.00", "0.2x", "2.0x", "25%"],
        ["dispatch", OWNED, "5.0 (2.5-15.0)", "0.00", "0.2x", "1.6x", "20%"],
        ["dispatch", PLAIN, "1.0 (0.5-3.0)", "0.01", "1.0x", "8.0x", "100%"],
        ["dispatch", GLOO, "8.0 (4.0-24.0)", "0.00", "0.1x", "1.0x", "12%"],
        ["dispatch", MPI, "no MPI"],
        ["dispatch", LIMIT, "1.0 (0.5-3.0)", "0.01", "1.0x", "8.0x", "100%"],
    ]


def test_the_largest_size_is_shown_in_detail():
    larger = [m | {"tokens": 64} for m in FOUND["measured"]]
    titles = [t for t, _, _ in cpu_paths.tables(ARGS, FOUND | {"measured": larger + FOUND["measured"]})]
    assert [title.partition(" H=")[0] for title in titles[1:]] == ["rank path, T=64", "layer path, T=64"]
