"""Faults of real links between real processes: cut, slow, ranks that die. As root; see bench/rig/netns.py."""

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench.rig import netns

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(netns.why_not() is not None, reason=f"no rig: {netns.why_not()}")
PROGRAM = ROOT / "tests/programs/across_nodes.py"
NODES, RANKS = 2, 2  # ranks of a node


def start(rig, *arguments, routing="auto"):
    """The ranks' processes, their output to be read."""
    ranks = []
    for rank in range(NODES * RANKS):
        env = {
            "RANK": str(rank),
            "WORLD_SIZE": str(NODES * RANKS),
            "MASTER_ADDR": rig.nodes[0].address,
            "MASTER_PORT": "29533",
            "COMMLIB_NODE_SIZE": str(RANKS),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
        }
        command = [sys.executable, str(PROGRAM), *map(str, arguments)]
        ranks.append(
            rig.popen(
                rank // RANKS, command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
        )
    return ranks


def await_line(process, text):
    for line in process.stdout:
        if text in line:
            return
    pytest.fail(f"{text!r} was not printed")


def outputs(ranks, seconds=60):
    return [rank.communicate(timeout=seconds)[0] for rank in ranks]


def test_a_cut_that_is_mended_in_time_loses_nothing():
    with netns.Rig(NODES, 1.0) as rig:
        ranks = start(rig, 60, 30)
        await_line(ranks[0], "round 3")
        with rig.link_cut(1):
            time.sleep(1.0)
        for said in outputs(ranks):
            assert "ok" in said, said


def test_a_cut_past_the_deadline_is_an_error_that_names_the_ranks_behind_it():
    with netns.Rig(NODES, 1.0) as rig:
        ranks = start(rig, 100_000, 2)
        await_line(ranks[0], "round 3")
        rig.cut(1)
        for rank, said in enumerate(outputs(ranks)):
            error = re.search(r"PeerTimeout: .*", said)
            assert error, said
            far = {0, 1} if rank >= RANKS else {2, 3}
            named = {int(n) for n in re.findall(r"\d+", re.search(r"for ranks? ([\d, ]+)", error[0])[1])}
            # Another rank may have given up on one of this node first, before this rank's own deadline.
            assert named & far or "gave up" in error[0], error[0]
            assert "phase" in error[0] and "epoch" in error[0]


def test_a_rank_that_is_killed_is_named_at_once():
    with netns.Rig(NODES, 1.0) as rig:
        ranks = start(rig, 100_000, 50)
        await_line(ranks[0], "round 3")
        # The process started has become the rank's, by exec.
        ranks[3].send_signal(signal.SIGKILL)
        started = time.monotonic()
        said = outputs(ranks, 40)
        assert time.monotonic() - started < 40  # well before the deadline
        for rank in range(3):
            assert re.search(r"PeerTimeout: .*rank 3", said[rank]), said[rank]


def test_a_slow_node_holds_back_the_others_and_their_memory_is_bounded():
    """A node must not queue more than another's link takes: 130 MB go to it in each round, rings hold 64."""
    with netns.Rig(NODES, 4.0) as rig:
        ranks = start(rig, 4, 60, 12_000)
        await_line(ranks[0], "round 2")
        rig.set_rate(1, 1.0)
        for said in outputs(ranks, 100):
            more = re.search(r"ok, (\d+) bytes more", said)
            assert more and int(more[1]) < 64e6, said
