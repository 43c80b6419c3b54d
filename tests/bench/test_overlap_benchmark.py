"""The benchmarks of overlap and of limited links: their computations, and that they check what they time."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import commlib
from commlib import cuda

BENCH = Path(__file__).parents[2] / "bench"
SMALL = ["--tokens", "24", "--hidden", "64", "--experts", "4", "--topk", "2", "--iters", "2"]
SMALL_OVERLAP = [*SMALL, *["--ffn-hidden", "32", "--matmul", "16", "--chunks", "2", "3"]]
GPU = SimpleNamespace(name="GPU of a test", sms=8)


@pytest.fixture
def overlap(host_clock, monkeypatch):
    """bench/overlap.py, with in-process ranks as on a GPU, on the CPU."""
    from bench import overlap
    from bench.harness import ranks

    monkeypatch.setattr(cuda, "properties", lambda device: GPU)
    monkeypatch.setattr(ranks, "gpu", lambda: {"gpu": GPU.name, "sms": GPU.sms})
    return overlap


def measured(overlap, ranks, *arguments):
    from bench.harness.ranks import DeviceRanks

    args = overlap.parse_arguments([*SMALL_OVERLAP, *arguments])

    def rank_main(rank):
        with torch.no_grad():
            return overlap.measure(DeviceRanks("cpu"), args)

    return args, commlib.run_ranks(rank_main, ranks)[0]


def test_ranks_have_the_layer_in_every_way_on_one_link(overlap):
    _, found = measured(overlap, 2, "--num-sms", "1", "9")
    assert [r.num_sms for r in found.matmul] == [1]  # 2 * 9 SMs are more than there are
    assert found.link_gbps > 0 and found.layer.link_gbps == found.link_gbps
    ways = ["communication alone", "experts alone", "in sequence", "2 chunks", "3 chunks", "two batches"]
    assert {name: len(s) for name, s in found.layer.samples_s.items()} == dict.fromkeys(ways, 2)


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core cannot be shared out")
def test_a_partition_is_measured_and_reported(overlap, tmp_path, capsys):
    args, found = measured(overlap, 1)
    (result,) = found.matmul
    assert result.partition["asked"] == result.partition["comm"] == 1
    assert found.layer is None and found.link_gbps is None
    parted = {f"{name}, partition" for name in ("communication", "compute, its share", "both")}
    assert set(result.samples_s) == parted | {"communication", "compute, everything", "both"}
    args.json = tmp_path / "overlap.json"
    overlap.publish(args, found)
    assert "partition: 1 asked, 1 given" in " ".join(capsys.readouterr().out.split())
    assert json.loads(args.json.read_text())["matmul"][0]["partition"] == result.partition
    assert args.json.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_a_layer_that_answers_wrongly_is_not_timed(overlap, monkeypatch):
    from bench.harness.workload import WrongResults

    right = commlib.nn.moe.run_dispatched

    def wrong(*inputs, **options):
        out, extra = right(*inputs, **options)
        return out * 1.01, extra

    monkeypatch.setattr(commlib.nn.moe, "run_dispatched", wrong)
    with pytest.raises(WrongResults, match=r"2 chunks: output is .*e-03 off"):
        measured(overlap, 2)


def test_a_matmul_that_was_not_done_is_not_timed(overlap, monkeypatch):
    from bench.harness.workload import WrongResults
    from bench.overlap_matmul import Matmul

    monkeypatch.setattr(Matmul, "run", lambda self: None)
    with pytest.raises(WrongResults, match="the matmul differs"):
        measured(overlap, 1)


def test_efficiency_is_the_longer_of_both_alone_over_both(overlap):
    from bench.overlap_layer import efficiency as of_layer
    from bench.overlap_layer import speed_ups
    from bench.overlap_matmul import efficiency

    samples = {"communication": [2.0], "compute, everything": [1.0], "both": [4.0]}
    assert efficiency(samples, "") == 0.5 and efficiency(samples, ", partition") is None
    parted = {"communication, partition": [2.0], "compute, its share, partition": [3.0]}
    samples |= parted | {"both, partition": [4.0]}
    assert efficiency(samples, "") == efficiency(samples, ", partition") == 0.75
    layer = {"communication alone": [3.0, 5.0, 4.0], "experts alone": [2.0] * 3, "in sequence": [6.0] * 3}
    layer["2 chunks"] = [5.0, 4.0, 8.0]
    assert of_layer(layer, "2 chunks") == 0.8
    assert speed_ups(layer, "2 chunks") == [1.2, 1.5, 0.75]


def test_an_efficiency_above_100_percent_is_explained(overlap, capsys):
    """By the spread of its samples, by work that is quicker in parts, or by SMs that the baseline lacked."""
    from bench.overlap import Measured, notes
    from bench.overlap_layer import LayerResult
    from bench.overlap_matmul import MatmulResult

    noisy = {"communication": [2.0, 2.0], "compute, its share": [4.0, 9.0], "both": [4.5, 5.0]}
    right = {"communication": [2.0, 2.0], "compute, its share": [4.0, 5.0], "both": [4.5, 4.5]}
    gpu = {"communication": [2.0], "compute, everything": [2.0], "both": [3.0]}
    gpu |= {f"{name}, partition": [5.0] for name in ("communication", "compute, its share", "both")}
    layer = {"communication alone": [1.0], "experts alone": [3.0], "in sequence": [4.0], "2 chunks": [2.5]}
    matmul = [MatmulResult(n, None, 1, None, s) for n, s in enumerate((noisy, right, gpu), 1)]
    said = notes(Measured({"ranks": 2}, None, matmul, LayerResult(1, 1.0, layer)))
    assert len(said) == 3
    assert said[0].startswith("1 threads, both: above 100 %, though it contains compute, its share: 4750.0 (")
    assert said[0].endswith(
        "Of the fastest samples it is 89%: times vary too much, as beside other work on the machine"
    )
    assert said[1].startswith(
        "3 threads, both: above 100 %, for compute is held against its share of a partition"
    )
    assert said[2].startswith("2 chunks: above 100 %") and "fit a cache" in said[2]


def test_the_smallest_number_of_sms_that_fills_the_link_is_found(host_clock):
    from bench.limited_link import filling

    assert filling({1: 0.5, 2: 0.96, 4: 0.99}) == 2
    assert filling({1: 0.5, 2: 0.8, 4: 0.7}) == 2


def test_rows_on_the_link_are_those_of_other_ranks(host_clock):
    from bench.harness.workload import LinkRows

    topk_idx = torch.tensor([[0, 1, 5], [2, 3, 4], [0, 1, 1]])  # two experts a rank
    assert LinkRows.of(topk_idx, 2, rank=0) == LinkRows(unique=3, each=4)
    assert LinkRows.of(topk_idx, 2, rank=3) == LinkRows(unique=5, each=9)
    assert LinkRows.busiest([LinkRows(3, 4), LinkRows(2, 9)]) == LinkRows(3, 9)


def test_what_is_saved_is_held_against_the_closed_form(host_clock):
    from bench import limited_link
    from bench.harness.workload import LinkRows
    from commlib.model import Config

    names = ("dispatch", "combine", "matmul", "dispatch beside matmul")
    once = {name: [2.0] for name in names}
    each = {name + limited_link.EACH: [3.0] for name in names[:2]}
    sweep = {4: {"dispatch": [2.0], "combine": [2.0]}}
    found = limited_link.Measured({"ranks": 8}, 1.0, 1, LinkRows(2, 3), 10**9, sweep, 4, once | each)
    filled, saved, beside = limited_link.findings(found, Config(8, 64, 7168, 8, 64))
    assert filled.startswith("4 threads of a rank: 100.0% of the link, which is the smallest number")
    assert "1.50 times fewer bytes on the link, dispatch 1.50 times faster, combine 1.50" in saved
    assert "K / U = 8 / 5.43 = 1.47" in saved
    assert "2.00 times faster beside each other than in sequence, 100%" in beside


def test_the_overlap_benchmark_runs_on_processes(launch, tmp_path):
    path = tmp_path / "overlap.json"
    done = launch(str(BENCH / "overlap.py"), 2, arguments=[*SMALL_OVERLAP, "--json", str(path)])
    assert done.returncode == 0, done.stdout + done.stderr
    written = json.loads(path.read_text())
    assert len(written["layer"]["samples_s"]["2 chunks"]) == 2
    assert "2 chunks" in done.stdout and path.with_suffix(".png").exists()


def test_a_preset_shows_sweep_savings_and_overlap(launch, tmp_path):
    path = tmp_path / "link.json"
    arguments = [*SMALL, "--link-gbps", "0.01", "--sweep", "1", "2", "--json", str(path)]
    done = launch(str(BENCH / "dispatch_combine.py"), 2, arguments=arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    written = json.loads(path.read_text())
    assert set(written["sweep_s"]) == {"1", "2"} and written["num_sms"] in (1, 2)
    assert written["rows_on_link"]["each"] > written["rows_on_link"]["unique"] > 0
    for text in ("of the link", "fewer bytes on the link", "beside each other"):
        assert text in " ".join(done.stdout.split())


@pytest.mark.skipif(cuda.is_available(), reason="a GPU can be used here")
@pytest.mark.parametrize("program", ["overlap", "dispatch_combine"])
def test_without_a_gpu_there_is_one_line_and_status_2(host_clock, monkeypatch, capsys, program):
    arguments = ["--device", "cuda"] + (["--preset", "h800"] if program == "dispatch_combine" else [])
    monkeypatch.setattr(sys, "argv", [program, *arguments])
    with pytest.raises(SystemExit) as exit:
        importlib.import_module(f"bench.{program}").main()
    assert exit.value.code == 2
    assert cuda.why_not() in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("program", "arguments"),
    [
        ("overlap.py", SMALL_OVERLAP),
        ("dispatch_combine.py", [*SMALL, "--preset", "h800", "--sweep", "1", "2"]),
    ],
)
def test_on_a_gpu_they_run_on_threads(tmp_path, program, arguments):
    path = tmp_path / "found.json"
    options = ["--device", "cuda", "--ranks", "2", "--json", str(path)]
    command = [sys.executable, str(BENCH / program), *arguments, *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(path.read_text())["machine"]["gpu"] == torch.cuda.get_device_name()
