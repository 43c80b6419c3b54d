"""The GPU benchmarks: their computations, on the CPU with stand-ins for CUDA's events; all of it on a GPU."""

import contextlib
import json
import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from commlib import cuda

BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture
def measuring(host_clock):
    """The module that measures, on the CPU."""
    from bench import gpu_measure

    return gpu_measure


def small_plan(measuring):
    from bench.harness.workload import Shape

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
    from bench.harness.workload import WrongResults
    from bench.systems.peer_copy import TunedPeerCopyBaseline

    right = getattr(TunedPeerCopyBaseline, part)
    monkeypatch.setattr(TunedPeerCopyBaseline, part, lambda self, *rows: right(self, *rows).fill_(torch.nan))
    with pytest.raises(WrongResults, match=f"rank 0, 1 SMs, PyTorch, tuned: {text}"):
        measuring.measure(small_plan(measuring))


def test_rates_count_each_row_received_once_and_traffic_what_must_be_read_and_written(measuring):
    from bench import gpu

    plan = small_plan(measuring)
    record = measuring.Record(copies=[2e9, 1e9, 4e9], rows=50.0)
    record.seconds["commlib owned", 2, "combine"] = [3e-6, 1e-6, 2e-6]
    record.seconds["PyTorch, tuned", None, "combine"] = [4e-6]
    ours, tuned = gpu.rows_of_table("combine", plan, record)
    row = 40 * 2
    rate, share = 50 * row / 2e-6 / 1e9, 2 * (24 + 50) * row / 2e-6 / 2e9
    assert ours[1:4] == ["commlib owned", "2", "0.00 (0.00-0.00)"]
    assert ours[4:] == ["", f"{rate:.1f}", f"{rate / 2:.1f}", "2.0x", f"{share:.0%}"]
    assert tuned[2] == tuned[6] == "" and tuned[7] == "1.0x"


def test_sm_choices_are_those_that_fit_and_all_sms(measuring):
    from bench import gpu

    args = gpu.parse_arguments([])
    assert list(gpu.plan_for(8, args, sms=132).num_sms) == [2, 4, 6, 8, 12, 16]
    assert list(gpu.plan_for(4, args, sms=132).num_sms) == [2, 4, 6, 8, 12, 16, 33]
    assert list(gpu.plan_for(8, args, sms=78).num_sms) == [2, 4, 6, 8, 9]


def test_a_communicators_memory_is_gone_before_the_next_one_is_made(measuring, monkeypatch):
    """Two heaps of 8 ranks at once would take most of a GPU's memory."""
    made, alive = [], []
    right = measuring.open_commlib

    @contextlib.contextmanager
    def watched(*arguments):
        alive.append(sum(core() is not None for core in made))
        measuring.resolve_group().barrier()  # all have looked
        with right(*arguments) as systems:
            made.append(weakref.ref(systems[0]._ep))
            yield systems

    monkeypatch.setattr(measuring, "open_commlib", watched)
    plan = replace(small_plan(measuring), profile_iters=1)
    measuring.watch(plan, measuring.measure(plan))
    assert len(made) == 2 * 4  # ranks * (measured and watched, with two numbers of SMs)
    assert alive == [0] * len(made)


class Event(SimpleNamespace):
    """One of the profiler's."""

    @staticmethod
    def of(name, begin, end, device="CUDA"):
        where = getattr(torch.autograd.DeviceType, device)
        return Event(name=name, device_type=where, time_range=SimpleNamespace(start=begin, end=end))


FRESH, KNOWN = ("commlib owned", 4, "dispatch"), ("commlib owned", 4, "dispatch again")
PLAN = "commlib::cuda::plan_kernel(commlib::cuda::PlanOp)"
ROWS = "void commlib::cuda::rows_kernel<commlib::cuda::WarpWorker>(commlib::cuda::RowsOp)"
EVENTS = [
    Event.of("commlib bench 0", 0, 100, "CPU"),
    Event.of("commlib bench 0", 10, 99),  # the same label as the GPU has it
    Event.of(ROWS, 40, 70),
    Event.of(PLAN, 10, 20),
    Event.of(PLAN, 12, 24),
    Event.of(ROWS, 30, 101),  # the clocks differ by a little
    Event.of("void at::native::elementwise_kernel<commlib::cuda::Fake>(int)", 0, 5),
    Event.of("commlib bench 1", 100.5, 200, "CPU"),
    Event.of(ROWS, 120, 140),
    Event.of(ROWS, 120, 150),
    Event.of("commlib bench 2", 200, 300, "CPU"),  # the second fresh dispatch: two plans, one row kernel
    Event.of(PLAN, 210, 212),
    Event.of(PLAN, 210, 214),
    Event.of(ROWS, 250, 260),
    Event.of(ROWS, 400, 500),  # in no operation's window
]


def test_kernels_belong_to_the_operation_in_whose_window_they_begin(measuring):
    from bench.harness import kernels as gpu_kernels

    profile = gpu_kernels.KernelProfile()
    profile._events, profile._keys = EVENTS, [FRESH, KNOWN, FRESH]
    found = {(s.system, s.num_sms, s.operation, s.kernel): s for s in profile.series(ranks=2)}
    assert profile.why_not == ""
    plan, rows, whole = (found.pop((*FRESH, name)) for name in ("plan_kernel", "rows_kernel", "all"))
    assert plan.seconds == pytest.approx([10e-6, 12e-6, 2e-6, 4e-6]) and plan.launches == 1
    assert plan.per_operation == pytest.approx([11e-6, 3e-6])
    assert rows.seconds == pytest.approx([71e-6, 30e-6, 10e-6])
    assert rows.per_operation == pytest.approx([50.5e-6, 5e-6])
    assert whole.seconds == whole.per_operation == pytest.approx([91e-6, 50e-6])
    assert found.pop((*KNOWN, "rows_kernel")).per_operation == pytest.approx([25e-6])
    assert found.pop((*KNOWN, "all")).seconds == pytest.approx([30e-6])
    assert not found


def test_kernel_times_stand_beside_wall_times(measuring):
    from bench import gpu
    from bench.harness import kernels as gpu_kernels

    plan = replace(small_plan(measuring), profile_iters=2)
    record = measuring.Record(copies=[1e9], rows=50.0)
    record.seconds[FRESH] = record.seconds["commlib owned", 8, "dispatch"] = [0.5e-3]
    windows, kernels = gpu_kernels._sort(EVENTS, [FRESH, KNOWN, FRESH])
    record.kernels = gpu_kernels.kernel_series(windows, kernels, 2)
    four, eight = gpu.rows_of_table("dispatch", plan, record)
    place = gpu.COLUMNS.index("kernels")
    assert gpu.kernel_seconds(record)[FRESH] == pytest.approx((61.5e-6 + 8e-6) / 2)
    assert four[place] == "0.03" and eight[place] == ""
    _, columns, (fresh, known, combine) = gpu.kernel_table(plan, record)
    assert {len(row) for row in fresh + known} == {len(columns)} and combine == []
    assert fresh[0] == ["dispatch", "commlib owned", "4", "plan_kernel", "1", "7 (2-12)", "7"]


def test_without_a_profiler_there_is_a_reason_and_everything_else(measuring, monkeypatch):
    from bench.harness import kernels as gpu_kernels

    def refuse(**options):
        raise RuntimeError("CUPTI_ERROR_INSUFFICIENT_PRIVILEGES\nand more")

    plan = replace(small_plan(measuring), profile_iters=1)
    measured = measuring.measure(plan)
    seen_nothing = measuring.watch(plan, measured)  # a CPU has no kernels
    assert seen_nothing.kernels == [] and "saw no kernel" in seen_nothing.no_kernels
    monkeypatch.setattr(gpu_kernels, "profile", refuse)
    refused = measuring.watch(plan, measured)
    assert refused.kernels == []
    assert refused.no_kernels == (
        "the profiler cannot start: RuntimeError: CUPTI_ERROR_INSUFFICIENT_PRIVILEGES"
    )
    assert refused.seconds is measured.seconds and refused.rows == measured.rows


def test_what_does_not_fit_before_the_deadline_is_left_out_and_named(measuring, monkeypatch):
    plan = replace(small_plan(measuring), num_sms=[1, 2, 3], profile_iters=1)
    now = SimpleNamespace(seconds=0.0, monotonic=lambda: now.seconds)
    monkeypatch.setattr(measuring, "time", now)
    right = measuring._Timer._measure

    def slow(self, num_sms, *rest):
        right(self, num_sms, *rest)
        self._group.barrier()
        if self._group.rank == 0:
            now.seconds += 10
        self._group.barrier()

    monkeypatch.setattr(measuring._Timer, "_measure", slow)
    record = measuring.measure(replace(plan, deadline=25.0))  # the third would begin at 20 and end at 30
    assert {key[1] for key in record.seconds} == {1, 2, None}
    assert record.left_out == ["3 SMs a rank"]
    watched = measuring.watch(replace(plan, deadline=-1.0), record)
    assert watched.left_out == ["3 SMs a rank", *(f"kernel times, {n} SMs a rank" for n in (1, 2))]
    late = measuring.measure(replace(plan, deadline=5.0))
    assert not late.seconds
    assert late.left_out == ["1 SMs a rank", "2 SMs a rank", "3 SMs a rank"]


@pytest.fixture
def findings(measuring, tmp_path):
    from bench import gpu

    args = gpu.parse_arguments(["--quick", "--ranks", "1", "2", "4", "--budget", "60"])
    names = ("gpu", "sms", "commit", "torch", "cuda_of_torch", "driver", "cpu")
    facts = {name: f"the {name}" for name in names} | {"sms": 8}
    return gpu.Findings(args, facts, tmp_path / "found.json")


def test_results_are_written_after_each_number_of_ranks(measuring, findings, monkeypatch):
    from bench import gpu

    def measured(plan):
        if plan.ranks == 4:
            raise KeyboardInterrupt
        record = measuring.Record(copies=[1e9], rows=50.0, left_out=["8 SMs a rank"])
        record.seconds["commlib owned", 1, "combine"] = [1e-3 * plan.ranks]
        return record

    monkeypatch.setattr(gpu, "measure", measured)
    with pytest.raises(KeyboardInterrupt):
        gpu.measure_all(findings, deadline=None)
    written = json.loads(findings.path.read_text())
    assert [s["seconds"] for s in written["series"]] == [[1e-3], [2e-3]]
    assert written["left_out"] == ["1 ranks, 8 SMs a rank", "2 ranks, 8 SMs a rank"]
    text = findings.path.with_suffix(".md").read_text()
    assert "2 ranks on one the gpu" in text and "2.00 (2.00-2.00)" in text
    assert "left out, --budget 60: 1 ranks, 8 SMs a rank; 2 ranks, 8 SMs a rank." in text
    assert "kernel times, 1 ranks: none, not asked for." in text
    assert [path.name for path in findings.path.parent.iterdir() if path.name.startswith(".")] == []


def test_kernels_are_watched_after_all_that_is_timed_is_written(measuring, findings, monkeypatch, capsys):
    from bench import gpu
    from bench.harness import kernels as gpu_kernels

    timed = []

    def measured(plan):
        timed.append(plan.ranks)
        return measuring.Record({FRESH: [0.5e-3]}, copies=[1e9], rows=50.0)

    def watched(plan, record):
        written = json.loads(findings.path.read_text())
        assert timed == [1, 2, 4] and set(written["ranks"]) == {"1", "2", "4"}
        windows, kernels = gpu_kernels._sort(EVENTS, [FRESH, KNOWN, FRESH])
        series = gpu_kernels.kernel_series(windows, kernels, plan.ranks) if plan.ranks == 2 else []
        return replace(record, kernels=series, no_kernels="forbidden", left_out=[f"some of {plan.ranks}"])

    monkeypatch.setattr(gpu, "measure", measured)
    monkeypatch.setattr(gpu, "watch", watched)
    gpu.measure_all(findings, deadline=None)
    written = json.loads(findings.path.read_text())
    assert {s["kernel"] for s in written["kernels"]} == {"plan_kernel", "rows_kernel", "all"}
    assert written["left_out"] == [f"{ranks} ranks, some of {ranks}" for ranks in (1, 2, 4)]
    assert "rows_kernel" in capsys.readouterr().out
    heads = [
        line for line in findings.path.with_suffix(".md").read_text().splitlines() if "| system |" in line
    ]
    assert ["kernels" in head for head in heads] == [False, True, False, False]
    assert heads[2].startswith("|  | system | SMs | kernel | launches |")
    assert findings.notes()[1:3] == [f"kernel times, {n} ranks: none, forbidden" for n in (1, 4)]


@pytest.mark.parametrize(
    ("gpus", "deadline", "ends", "said"),
    [
        (1, None, None, "not run, they need a GPU for each rank, and there is 1"),
        (8, 0.0, None, "not run, --budget is spent"),
        (8, None, 3, "ended with status 3"),
        (8, float("inf"), None, "cut, --budget is spent"),
    ],
)
def test_several_gpus_are_compared_in_a_process_each(
    measuring, findings, monkeypatch, gpus, deadline, ends, said
):
    from bench import gpu

    class Launcher:
        asked = False

        def __init__(self, command):
            assert command[command.index("--nproc-per-node") + 1] == "8"
            assert command[command.index("--device") + 1] == "cuda"
            assert command[command.index("--tokens") + 1] == "64"

        def wait(self, timeout=None):
            if ends is None and not self.asked:
                raise subprocess.TimeoutExpired("torchrun", timeout)
            return ends

        def terminate(self):
            self.asked = True

    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(gpu.subprocess, "Popen", Launcher)
    assert said in gpu.run_processes(findings.args, findings.path, deadline)


def test_a_number_of_ranks_without_time_has_no_table(measuring, findings, monkeypatch, capsys):
    from bench import gpu

    monkeypatch.setattr(gpu, "measure", lambda plan: measuring.Record(left_out=["1 SMs a rank"]))
    gpu.measure_all(findings, deadline=0.0)
    assert capsys.readouterr().out == ""
    assert json.loads(findings.path.read_text())["left_out"][2] == "4 ranks, 1 SMs a rank"


@pytest.mark.skipif(cuda.is_available(), reason="a GPU can be used here")
def test_without_a_gpu_there_is_one_line_and_status_2(measuring, capsys):
    from bench import gpu

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
