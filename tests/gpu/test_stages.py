"""The runner of `make gpu`, on stand-ins for steps that hang, crash, fail, and leave processes behind."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

GPU = Path(__file__).parent
ABOUT_STEPS = {"test_stages", "test_hygiene"}  # need no GPU, but name tests that do
STAND_INS = """
import sys
sys.path.insert(0, {gpu!r})
import stages
from steps import Step

def python(name, code, limit=60, stage=1, needs=None):
    return Step(name, stage, limit, ("{{python}}", "-c", code), needs=needs)

sys.exit(stages.main(steps=[{steps}]))
"""
HANG = "'import time; time.sleep(600)'"


@pytest.fixture
def run(tmp_path):
    """Run steps, given as Python, in a process of their own; returns it, and its results, by step."""

    def run(steps, *options, **env):
        program = tmp_path / "steps.py"
        program.write_text(STAND_INS.format(gpu=str(GPU), steps=steps))
        command = [sys.executable, str(program), "--results", str(tmp_path / "results"), *options]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=120, check=False, env={**os.environ, **env}
        )
        return done, written(tmp_path)

    return run


def written(directory):
    found = list((directory / "results").glob("*.json"))
    assert len(found) == 1, found
    return {step["step"]: step for step in json.loads(found[0].read_text())["steps"]}


def is_alive(pid):
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def test_what_fails_crashes_or_cannot_start_costs_the_others_nothing(run):
    done, steps = run(
        "python('fails', 'print(1); raise SystemExit(3)'),"
        "python('crashes', 'import os, signal; os.kill(os.getpid(), signal.SIGSEGV)'),"
        "Step('missing', 1, 60, ('/no/such/program',), needs=None),"
        "python('passes', 'print(\"fine\")')"
    )
    assert done.returncode == 1
    assert [s["result"] for s in steps.values()] == ["failed", "failed", "failed", "passed"]
    assert steps["fails"]["why"] == "exit status 3"
    assert steps["crashes"]["why"] == "SIGSEGV"
    assert "cannot be started" in steps["missing"]["why"]
    assert "Fatal Python error: Segmentation fault" in "\n".join(steps["crashes"]["tail"])
    table = done.stdout.splitlines()[-6:]
    assert table[0].split() == ["step", "stage", "result", "seconds", "limit", "why"]
    assert [line.split()[0] for line in table[1:5]] == ["fails", "crashes", "missing", "passes"]
    assert table[5].startswith("4 steps: 1 passed, 3 failed; ")


def test_all_passed_is_status_0(run):
    done, steps = run("python('a', ''), python('b', '')")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1].startswith("2 steps: 2 passed; ")
    assert [s["result"] for s in steps.values()] == ["passed", "passed"]


def test_one_that_hangs_is_cut_and_leaves_the_stacks_of_its_threads(run):
    code = (
        "'import threading, time\\n"
        "def stuck(): time.sleep(600)\\n"
        "threading.Thread(target=stuck, daemon=True).start()\\n"
        "stuck()'"
    )
    done, steps = run(f"python('hangs', {code}, limit=6), python('next', '')")
    assert done.returncode == 1
    assert (steps["hangs"]["result"], steps["next"]["result"]) == ("cut", "passed")
    assert steps["hangs"]["why"] == "after 6 s"
    tail = "\n".join(steps["hangs"]["tail"])
    assert "time is up for: " in tail and "Fatal Python error: Aborted" in tail
    assert tail.count("in stuck") >= 2


def test_one_that_ignores_signals_is_killed_with_its_children(run, tmp_path):
    code = (
        "'import os, signal, time\\n"
        "for s in (signal.SIGTERM, signal.SIGABRT, signal.SIGINT): signal.signal(s, signal.SIG_IGN)\\n"
        f'open("{tmp_path}/pids", "a").write(f"{{os.getpid()}} ")\\n'
        "if os.fork() == 0:\\n"
        "    os.setsid()\\n"
        f'    open("{tmp_path}/pids", "a").write(f"{{os.getpid()}} ")\\n'
        "time.sleep(600)'"
    )
    _, steps = run(f"python('stubborn', {code}, limit=6), python('next', '')")
    assert (steps["stubborn"]["result"], steps["next"]["result"]) == ("cut", "passed")
    pids = (tmp_path / "pids").read_text().split()
    assert len(pids) == 2 and not any(map(is_alive, pids))


@pytest.mark.parametrize("apart", ["", "os.setsid()"])
def test_a_child_that_outlives_its_parent_holds_up_nothing(run, tmp_path, apart):
    code = (
        "'import os, time\\n"
        "if os.fork() == 0:\\n"
        f"    {apart or 'pass'}\\n"
        f'    open("{tmp_path}/pid", "w").write(str(os.getpid()))\\n'
        "    time.sleep(600)\\n"
        f'while not (os.path.exists("{tmp_path}/pid") and open("{tmp_path}/pid").read()): time.sleep(0.01)\\n'
        'print("done")\''
    )
    done, steps = run(f"python('parent', {code})")
    assert done.returncode == 0, done.stdout
    assert steps["parent"]["result"] == "passed"
    assert "it left behind: " in done.stdout
    assert not is_alive((tmp_path / "pid").read_text())


def test_whatever_is_printed_arrives_and_is_in_the_log(run, tmp_path):
    done, steps = run(
        'python(\'prints\', \'for i in range(200_000): print(i, "x" * 20)\\nprint("the end", end="")\')'
    )
    assert steps["prints"]["result"] == "passed"
    log = next((tmp_path / "results").glob("*.log")).read_text()
    for text in (done.stdout, log):
        assert "\n199999 xxxxxxxxxxxxxxxxxxxx\nthe end" in text
        assert len(re.findall(r"^\d+ x{20}$", text, re.MULTILINE)) == 200_000
    assert steps["prints"]["tail"][-1] == "the end"


def test_what_the_budget_leaves_no_time_for_is_not_run_and_not_passed(run):
    done, steps = run(f"python('first', ''), python('long', {HANG}), python('last', '')", "--budget", "22")
    assert done.returncode == 1
    assert [s["result"] for s in steps.values()] == ["passed", "cut", "not run"]
    assert steps["last"]["why"] == "of 22 s too few are left"
    assert done.stdout.splitlines()[-1].startswith("3 steps: 1 passed, 1 cut, 1 not run; ")


def test_a_step_whose_need_failed_is_not_run(run):
    steps = "python('need', 'raise SystemExit(1)'), python('other', ''), python('user', '', 60, 2, 'need')"
    done, found = run(steps, "--stage", "2")
    assert done.returncode == 1
    assert {name: step["result"] for name, step in found.items()} == {"need": "failed", "user": "not run"}
    assert found["user"]["why"] == "needs need"


def test_results_are_written_after_each_step_and_when_the_runner_is_told_to_end(tmp_path):
    program = tmp_path / "steps.py"
    program.write_text(
        STAND_INS.format(gpu=str(GPU), steps=f"python('a', ''), python('b', {HANG}), python('c', '')")
    )
    command = [sys.executable, str(program), "--results", str(tmp_path / "results")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as runner:
        for line in runner.stdout:
            if line.startswith("== b (stage 1"):
                break
        assert {n: s["result"] for n, s in written(tmp_path).items()} == {
            "a": "passed",
            "b": "not run",
            "c": "not run",
        }
        time.sleep(0.5)
        runner.send_signal(signal.SIGTERM)
        rest = runner.stdout.read()
    assert runner.returncode == 1
    assert {n: s["result"] for n, s in written(tmp_path).items()} == {
        "a": "passed",
        "b": "cut",
        "c": "not run",
    }
    assert rest.splitlines()[-1].startswith("3 steps: 1 passed, 1 cut, 1 not run; ")


def test_the_table_names_gpu_driver_and_commit(run, tmp_path):
    smi = tmp_path / "nvidia-smi"
    smi.write_text('#!/bin/sh\ncase "$1" in *driver*) echo 580.1;; *) echo "NVIDIA H100 80GB HBM3";; esac\n')
    git = tmp_path / "git"
    git.write_text("#!/bin/sh\nexit 1\n")
    for program in (smi, git):
        program.chmod(0o755)
    path = os.pathsep.join([str(tmp_path), os.environ["PATH"]])
    run("python('a', '')", "--stage", "1", PATH=path, COMMLIB_COMMIT="abc123")
    found = next((tmp_path / "results").glob("nvidia-h100-80gb-hbm3-*-stage1.md")).read_text()
    title = found.splitlines()[0]
    for fact in ("GPU NVIDIA H100 80GB HBM3", "driver 580.1", "commit abc123"):
        assert fact in title
    assert "| a | 1 | passed |" in found


def test_an_unknown_step_is_an_error_that_runs_nothing(tmp_path):
    command = [sys.executable, str(GPU / "stages.py"), "--results", str(tmp_path), "--steps", "modul"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "no such step: modul" in done.stderr and not list(tmp_path.iterdir())


@pytest.fixture
def listed(monkeypatch):
    monkeypatch.syspath_prepend(str(GPU))
    import steps

    return steps.STEPS


def test_steps_have_names_of_their_own_and_needs_that_come_before(listed):
    names = [step.name for step in listed]
    assert len(set(names)) == len(names)
    for step in listed:
        assert step.needs is None or names.index(step.needs) < names.index(step.name)


def test_every_file_with_a_test_for_the_gpu_is_a_step(listed):
    wanted = {
        path.stem
        for path in GPU.parent.glob("*/test_*.py")
        if re.search(r"mark\.gpu|def test_\w+\([^)]*\bdevice\b", path.read_text())
    }
    assert "test_cuda" in wanted and "test_combine" in wanted
    assert wanted - ABOUT_STEPS <= {step.name for step in listed}


def test_the_files_that_steps_run_are_there(listed):
    root = GPU.parent.parent
    for step in listed:
        for part in step.command:
            if part.endswith(".py"):
                assert (root / part).exists(), part


@pytest.fixture
def probe(monkeypatch):
    monkeypatch.syspath_prepend(str(GPU.parent / "programs"))
    import gpu_probe

    return gpu_probe


class Kernel:
    """A kernel that runs until told to end."""

    def __init__(self, over):
        self.over = over

    def query(self):
        return self.over


def test_the_probe_tells_a_call_that_waits_from_one_that_goes_on(probe):
    kernel, soon, long_ago = Kernel(over=False), time.perf_counter() + 60, time.perf_counter() - 60

    def wait():
        kernel.over = True

    assert probe.timed(lambda: None, kernel, soon, 1)[0] == "ok"
    assert probe.timed(wait, kernel, soon, 1)[0] == "WAITS"
    word, _, note = probe.timed(lambda: None, kernel, long_ago, 1)
    assert word == "late?" and "over before" in note


def test_the_probe_goes_on_after_a_call_that_fails(probe):
    def fail():
        probe.check("cudaMalloc", 2)

    word, _, note = probe.timed(fail, Kernel(over=False), time.perf_counter() + 60, 1)
    assert word == "ok" and note == "; RuntimeError: cudaMalloc: error 2"


def test_the_probe_without_a_gpu_says_so():
    command = [sys.executable, str(GPU.parent / "programs/gpu_probe.py")]
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1 and done.stderr == "gpu_probe.py needs a GPU that PyTorch can use\n"
