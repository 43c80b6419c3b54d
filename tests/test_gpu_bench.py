"""The GPU benchmarks: what they compute, on the CPU with stand-ins for CUDA's events; all of it on a GPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from commlib import cuda

BENCH = Path(__file__).parent.parent / "bench"


@pytest.fixture
def measuring(host_clock):
    """The module that measures, on the CPU."""
    import gpu_measure

    return gpu_measure


def small_plan(measuring):
    from workload import Shape

    shape = Shape(tokens=24, hidden=40, experts=8, topk=3, dtype=torch.bfloat16, seed=0)
    return measuring.Plan(shape, 2, num_sms=[1, 2], iters=2, warmup=1, copy_bytes=1 << 16, device="cpu")


def test_every_system_answers_rightly_and_has_its_turns(measuring):
    record = measuring.measure(small_plan(measuring))
    turns = {(s.system, s.num_sms, s.operation): len(s.seconds) for s in record.series(2)}
    ours = [("commlib zero-copy", n) for n in (1, 2)] + [("commlib owned", n) for n in (1, 2)]
    for system, num_sms in [*ours, ("commlib by expert", 1)]:
        for operation in ("dispatch", "dispatch again", "combine"):
            assert turns.pop((system, num_sms, operation)) == 2
    for system in ("PyTorch, plain", "PyTorch, tuned"):  # beside either number of SMs
        for operation in ("dispatch", "combine"):
            assert turns.pop((system, None, operation)) == 4
    assert not turns
    assert len(record.copies) == 2 * 3


@pytest.mark.parametrize(("part", "text"), [("_sum", "sum: "), ("_received_rows", "rows: ")])
def test_a_system_that_answers_wrongly_is_not_timed(measuring, monkeypatch, part, text):
    from gpu_baselines import TunedPeerCopyBaseline
    from workload import WrongResults

    right = getattr(TunedPeerCopyBaseline, part)
    monkeypatch.setattr(TunedPeerCopyBaseline, part, lambda self, *rows: right(self, *rows).fill_(torch.nan))
    with pytest.raises(WrongResults, match=f"rank 0, 1 SMs, PyTorch, tuned: {text}"):
        measuring.measure(small_plan(measuring))


def test_rates_count_each_row_received_once_and_traffic_what_must_be_read_and_written(measuring):
    import gpu

    plan = small_plan(measuring)
    record = measuring.Record(copies=[2e9, 1e9, 4e9], rows=50.0)
    record.seconds["commlib owned", 2, "combine"] = [3e-6, 1e-6, 2e-6]
    record.seconds["PyTorch, tuned", None, "combine"] = [4e-6]
    ours, tuned = gpu.rows_of_table("combine", plan, record)
    row = 40 * 2
    rate, share = 50 * row / 2e-6 / 1e9, 2 * (24 + 50) * row / 2e-6 / 2e9
    assert ours[1:4] == ["commlib owned", "2", "0.00 (0.00-0.00)"]
    assert ours[4:] == [f"{rate:.1f}", f"{rate / 2:.1f}", "2.0x", f"{share:.0%}"]
    assert tuned[2] == tuned[5] == "" and tuned[6] == "1.0x"


def test_sm_choices_are_those_that_fit_and_all_sms(measuring):
    import gpu

    args = gpu.parse_arguments([])
    assert list(gpu.plan_for(8, args, sms=132).num_sms) == [2, 4, 6, 8, 12, 16]
    assert list(gpu.plan_for(4, args, sms=132).num_sms) == [2, 4, 6, 8, 12, 16, 33]
    assert list(gpu.plan_for(8, args, sms=78).num_sms) == [2, 4, 6, 8, 9]


@pytest.mark.skipif(cuda.is_available(), reason="a GPU can be used here")
def test_without_a_gpu_there_is_one_line_and_status_2(measuring, capsys):
    import gpu

    with pytest.raises(SystemExit) as exit:
        gpu.main([])
    assert exit.value.code == 2
    out, err = capsys.readouterr()
    assert out == "" and err == f"bench/gpu.py needs a GPU: {cuda.why_not()}\n"


@pytest.mark.gpu
def test_the_gpu_benchmark_runs_and_writes_every_sample(tmp_path):
    path = tmp_path / "gpu.json"
    command = [sys.executable, str(BENCH / "gpu.py"), "--quick", "--json", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    written = json.loads(path.read_text())
    assert written["machine"]["gpu"] == torch.cuda.get_device_name()
    assert {s["operation"] for s in written["series"]} == {"dispatch", "dispatch again", "combine"}
    table = path.with_suffix(".md").read_text()
    for system in ("commlib zero-copy", "commlib owned", "commlib by expert", "PyTorch, tuned", "NCCL"):
        assert system in table and system in done.stdout


@pytest.mark.gpu
def test_the_nccl_benchmark_runs_with_one_rank(launch, tmp_path):
    arguments = ["--quick", "--json", str(tmp_path / "nccl.json")]
    done = launch(str(BENCH / "gpu_nccl.py"), 1, "torchrun", arguments=arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "NCCL" in json.loads((tmp_path / "nccl.json").read_text())["samples_s"]


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() > 1, reason="there is a GPU for each rank")
def test_the_nccl_benchmark_says_why_it_cannot_run(launch):
    done = launch(str(BENCH / "gpu_nccl.py"), 2, "torchrun")
    assert done.returncode != 0
    assert "NCCL needs a GPU for each rank: 2 ranks, 1 here" in done.stderr
