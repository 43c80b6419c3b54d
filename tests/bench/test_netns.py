"""The rig that limits links: bench/rig/netns.py. Counts decide here, not clocks, but for one upper bound that
no slow machine can break: how much came through a limited link in the time it took.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench.rig import namespaces, netns

BENCH = Path(__file__).parents[2] / "bench"

WHY_NOT = namespaces.why_not()
pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=f"no rig here: {WHY_NOT}")

PAYLOAD = 4_000_000
# Sends a number of bytes in one connection, and waits for the receiver to say that it has them all.
RECEIVE = """
import socket
server = socket.create_server(("", 4000))
connection, left = server.accept()[0], {payload}
print("connected", flush=True)
while left:
    left -= len(connection.recv(min(left, 1 << 20)))
connection.sendall(b"k")
print("received", flush=True)
"""
SEND = """
import socket, time
while True:
    try:
        connection = socket.create_connection(("{address}", 4000), 1)
        break
    except OSError:
        time.sleep(0.02)
connection.settimeout(None)
for _ in range({payload} // 4000):
    connection.sendall(bytes(4000))
    time.sleep({pause})
assert connection.recv(1) == b"k"
"""


def start_transfer(rig, payload=PAYLOAD, pause=0.0):
    """From node 0 to node 1; the two processes."""
    receiver = rig.popen(1, [sys.executable, "-c", RECEIVE.format(payload=payload)], stdout=-1, text=True)
    program = SEND.format(payload=payload, pause=pause, address=rig.nodes[1].address)
    return rig.popen(0, [sys.executable, "-c", program]), receiver


def finish(transfer):
    for process in transfer:
        assert process.wait(60) == 0


def ours():
    return [name for name in namespaces.existing() if f".{os.getpid()}." in name]


def test_a_transfer_is_held_to_the_rate_and_counted_at_both_ends():
    rate = 0.05
    with netns.Rig(2, rate) as rig:
        before, begin = rig.counts(), time.monotonic()
        finish(start_transfer(rig))
        seconds, held = time.monotonic() - begin, rig.held_back(0)
        sender, receiver = (b - a for a, b in zip(before, rig.counts(), strict=True))

    assert held > 0
    limited = PAYLOAD - 256 * 1024  # except two full buckets
    assert limited * 8 <= rate * 1e9 * seconds * 1.1
    for count in (sender.sent, sender.switch_received, receiver.switch_sent, receiver.received):
        assert PAYLOAD < count < 1.05 * PAYLOAD
    for back in (receiver.sent, receiver.switch_received, sender.switch_sent, sender.received):
        assert 0 < back < 0.1 * PAYLOAD


def test_nothing_crosses_a_link_by_itself():
    with netns.Rig(2, 1.0) as rig:
        time.sleep(0.2)
        assert rig.counts() == [netns.LinkCount(0, 0, 0, 0)] * 2


def test_a_connection_outlives_a_cut_and_a_slower_link():
    with netns.Rig(2, 1.0) as rig:
        sender, receiver = start_transfer(rig, payload=400_000, pause=0.002)
        assert receiver.stdout.readline() == "connected\n"
        rig.set_rate(1, 0.1)
        with rig.link_cut(1):
            time.sleep(0.1)  # packets that the switch had queued for the node arrive
            before = rig.counts()[1]
            time.sleep(0.3)
            through = rig.counts()[1] - before
            assert (through.received, through.switch_sent) == (0, 0)
            assert receiver.poll() is None
        finish((sender, receiver))
        assert rig.counts()[1].received > 400_000


def test_a_rank_reads_the_counters_of_its_own_link():
    setup = f"import sys; sys.path.insert(0, {str(BENCH)!r})"
    program = f"{setup}; from bench.rig import netns; print(*netns.own_link())"
    with netns.Rig(2, 1.0) as rig:
        finish(start_transfer(rig))
        counted = rig.counts()[1]
        reader = rig.popen(1, [sys.executable, "-c", program], stdout=-1, text=True)
        assert reader.communicate(timeout=60)[0].split() == [str(counted.sent), str(counted.received)]


def test_teardown_leaves_nothing_also_after_an_exception():
    with pytest.raises(ZeroDivisionError), netns.Rig(2, 1.0) as rig:
        assert len(ours()) == 3
        running = rig.popen(0, ["sleep", "1000"])
        raise ZeroDivisionError
    assert ours() == []
    assert running.poll() is not None


def test_a_failure_to_make_it_leaves_nothing():
    with pytest.raises(namespaces.RigError, match="mtu"), netns.Rig(2, 1.0, mtu=10**6):
        pass
    assert ours() == []


def start_program(body="signal.pause()"):
    """A separate program with a rig; its process, once the rig is up."""
    program = (
        f"import signal, sys; sys.path.insert(0, {str(BENCH)!r}); from bench.rig import netns\n"
        f"with netns.Rig(2, 1.0) as rig:\n"
        f"    rig.popen(0, ['sleep', '1000'])\n"
        f"    print('up', flush=True)\n"
        f"    {body}\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stdout=-1, stderr=-1, text=True)
    assert process.stdout.readline() == "up\n"
    return process


def rigs_of(process):
    return {name: alive for name, alive in namespaces.existing().items() if f".{process.pid}." in name}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_teardown_leaves_nothing_after_a_signal(number):
    process = start_program()
    assert list(rigs_of(process).values()) == [True] * 3
    process.send_signal(number)
    process.wait(30)
    assert rigs_of(process) == {}


def test_clean_removes_what_a_killed_program_left_and_nothing_else():
    with netns.Rig(2, 1.0):
        process = start_program()
        process.kill()
        process.wait(30)
        assert list(rigs_of(process).values()) == [False] * 3
        removed = namespaces.clean()
        assert len([name for name in removed if f".{process.pid}." in name]) == 3
        assert rigs_of(process) == {}
        assert len(ours()) == 3


def test_what_is_missing_is_named(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    assert "install iproute2 and util-linux" in namespaces.why_not()
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert "root" in namespaces.why_not()


def test_two_rigs_at_a_time_do_not_meet():
    with netns.Rig(2, 1.0) as one, netns.Rig(2, 1.0) as other:
        assert one.nodes[0].address == other.nodes[0].address
        finish(start_transfer(one))
        assert [count.sent for count in other.counts()] == [0, 0]


def test_systems_compared_across_nodes_answer_right_and_send_what_they_should(tmp_path):
    out, bench = tmp_path / "out.json", BENCH / "nodes.py"
    done = subprocess.run(
        [sys.executable, bench, "--small", "--json", out],
        capture_output=True,
        text=True,
        timeout=200,
        env=os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    content = json.loads(out.read_text())
    (rig,) = content["rigs"]
    assert rig["wrong"] == []
    assert rig["held_back"] != [0, 0]
    for link in rig["links_whole_run"]:
        assert link["sent"] == link["switch_received"] and link["received"] == link["switch_sent"]

    row_bytes = content["config"]["hidden"] * 2
    rows = {"bare TCP, row per node": "per_node", "gloo, row per rank": "per_rank"}
    rows |= {"MPI, row per rank": "per_rank", "gloo, row per expert": "per_expert"}
    for system, kind in rows.items():
        least = rig["rows"][kind]
        for node, iterations in enumerate(rig["traffic"][system]["dispatch"]):
            for sent, received in iterations:
                assert 1 < sent / (sum(least[node]) * row_bytes) < 1.25
                assert 1 < received / (sum(line[node] for line in least) * row_bytes) < 1.25
