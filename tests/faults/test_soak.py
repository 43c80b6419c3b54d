"""The soak (tests/soak): some of its runs, and that it finds what it looks for. `make soak` does many."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from soak.faults import End, Fault, blamed, judge
from soak.plan import draw
from whole_files import write_whole

import commlib

SOAK = Path(__file__).parents[1] / "soak"
KILLED = Fault("kill", victim=1, step=0, middle=False, delay=0.0, choice=0)
STOPPED = Fault("stop", victim=1, step=0, middle=False, delay=0.0, choice=0)


def soak(*arguments):
    command = [sys.executable, str(SOAK), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=280, env=os.environ)


def test_every_rank_of_runs_with_faults_ends_as_it_should():
    done = soak("--runs", 24, "--seed", 1)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "24 runs" in done.stdout and "0 failed" in done.stdout


@pytest.mark.parametrize(
    ("plant", "what"), [("wrong_value", "AssertionError: Tensor-likes"), ("hang", "hang (5.00 s)")]
)
def test_what_goes_wrong_is_reported_with_its_seed(plant, what):
    done = soak("--runs", 2, "--seed", 5, "--plant", plant, "--limit", 5)
    assert done.returncode == 1, done.stdout + done.stderr
    for seed in (5, 6):
        assert f"FAILED seed {seed}: rank " in done.stdout
        assert f"{plant} rank" in done.stdout  # the plan
    assert what in done.stdout and "2 failed" in done.stdout
    assert "python tests/soak --runs 1 --seed N, where N is one of 5 6" in done.stdout


def test_a_plan_is_its_seeds():
    assert all(draw(seed, ["kill", "drop"]) == draw(seed, ["kill", "drop"]) for seed in range(50))


def test_what_a_killed_rank_had_to_say_is_there_whole_or_not_at_all(tmp_path):
    end = tmp_path / "end.0"
    for number in range(40):
        writer = os.fork()
        if writer == 0:
            while True:
                write_whole(end, json.dumps({"text": "x" * 300_000}).encode())
                end.unlink()
        time.sleep(0.002 + 0.0003 * number)
        os.kill(writer, signal.SIGKILL)
        os.waitpid(writer, 0)
        assert not end.exists() or len(json.loads(end.read_bytes())["text"]) == 300_000
        end.unlink(missing_ok=True)


def ends_of_three(fault, end_of_1, end_of_2):
    """What is wrong with a run of three ranks, the first of which ended right."""
    plan = next(p for p in (draw(seed, ["kill"]) for seed in range(100)) if p.ranks == 3)
    return judge(type(plan)(**{**vars(plan), "faults": (fault,)}), [End("right"), end_of_1, end_of_2])


def error(peers, name="PeerTimeout"):
    return End(name, errors=(name, "CommError", "RuntimeError"), peers=peers)


def test_a_rank_may_end_right_or_by_an_error_that_names_the_rank_at_fault():
    killed = End("signal 9")
    assert not ends_of_three(KILLED, killed, End("right"))
    assert not ends_of_three(KILLED, killed, error((1,)))
    for wrong in (
        error((0,)),
        error(()),
        error((0, 1)),
        End("hang"),
        End("signal 11"),
        End("AssertionError", errors=("AssertionError",)),
        End("right", trouble="it said so"),
    ):
        assert ends_of_three(KILLED, killed, wrong), wrong
    assert ends_of_three(KILLED, End("signal 11"), error((1,)))
    assert not ends_of_three(STOPPED, error((0,)), error((1,)))


def test_errors_say_which_ranks_they_blame():
    first = commlib.PeerTimeout("a text", 0, [3, 4], "combine", "arrival", 2)
    assert blamed(first) == (3, 4)
    for text, ranks in {
        "rank 0 cannot use it: rank 0 waited 1.0 s in combine for ranks 2, 3; rank 2 last": (2, 3),
        "rank 1 is in combine, but rank 5 called dispatch where rank 1 called combine": (5,),
        "rank 7 could not start: KeyboardInterrupt": (7,),
        "something else": (),
    }.items():
        assert blamed(commlib.CommError(text)) == ranks
