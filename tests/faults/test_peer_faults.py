"""Ranks that hang, die or do something else: every other rank reports it in time, and can go on to exit."""

import ctypes
import errno
import os
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from processes import with_torch

import commlib
from commlib import ExpertParallel
from commlib.startup.group import ThreadGroup

CONFIG = {"num_experts": 8, "hidden": 64, "topk": 2, "max_tokens": 8, "dtype": torch.float32}
X, IDX = torch.ones(4, 64), torch.tensor([[0, 7]] * 4)
PROGRAMS = Path(__file__).parents[1] / "programs"


def inputs(device):
    """Rows and their routing: each token to the first and the last expert."""
    return X.to(device), IDX.to(device)


def failures(rank_main, size, device="cpu"):
    """The exception each rank raised (None where it returned), letting no rank's failure reach the others."""

    def guarded(rank):
        try:
            rank_main(rank)
        except Exception as error:
            return error
        return None

    return commlib.run_ranks(guarded, size, device=device)


@pytest.mark.parametrize("operation", ["dispatch", "dispatch with a handle", "combine"])
def test_a_rank_that_never_comes_is_named(device, operation):
    x, idx = inputs(device)
    started = time.monotonic()

    def rank_main(rank):
        with ExpertParallel(timeout=1.0, startup_timeout=60.0, **CONFIG) as ep:
            d = ep.dispatch(x, idx)
            if rank == 2:
                ep.group.barrier()
                return
            try:
                if operation == "dispatch":
                    ep.dispatch(x, idx)
                elif operation == "combine":
                    ep.combine(d.x, d.handle)
                else:
                    ep.dispatch(x, handle=d.handle)
                ep.synchronize()  # where an operation only joins a stream, this waits for it
            finally:
                ep.group.barrier()

    got = failures(rank_main, 4, device)
    assert time.monotonic() - started < 10
    assert got[2] is None
    for rank in (0, 1, 3):
        error = got[rank]
        assert isinstance(error, commlib.PeerTimeout), error
        assert (error.rank, error.peers, error.op, error.epoch) == (rank, [2], operation, 2)
        text = str(error)
        assert f"rank {rank} waited" in text and "rank 2 last called dispatch (epoch 1)" in text


def test_all_missing_ranks_are_named(device):
    x, idx = inputs(device)

    def rank_main(rank):
        with ExpertParallel(timeout=0.5, startup_timeout=60.0, **CONFIG) as ep:
            try:
                if rank == 0:
                    ep.dispatch(x, idx)
            finally:
                ep.group.barrier()

    error = failures(rank_main, 4, device)[0]
    assert isinstance(error, commlib.PeerTimeout)
    assert error.peers == [1, 2, 3]
    assert error.phase in ("counts", "call")  # one warp of a GPU waits for the former, another for the latter
    assert "has not made a call yet" in str(error)


def test_a_different_order_of_calls_is_an_error_that_says_who_called_what(device):
    x, idx = inputs(device)

    def rank_main(rank):
        with ExpertParallel(timeout=20.0, **CONFIG) as ep:
            d = ep.dispatch(x, idx)
            if rank == 1:
                ep.combine(d.x, d.handle)
            else:
                ep.dispatch(x, idx)
            ep.synchronize()

    started = time.monotonic()
    got = failures(rank_main, 2, device)
    assert time.monotonic() - started < 10, "it waited for the deadline"
    assert any(isinstance(e, commlib.CallMismatch) for e in got)
    for error in got:
        assert isinstance(error, commlib.CommError)
    text = next(str(e) for e in got if isinstance(e, commlib.CallMismatch))
    assert "called dispatch" in text and "called combine" in text


def test_weights_on_some_ranks_only_is_an_error():
    def rank_main(rank):
        with ExpertParallel(timeout=20.0, **CONFIG) as ep:
            ep.dispatch(X, IDX, torch.ones(4, 2) if rank else None)

    got = failures(rank_main, 2)
    assert any(isinstance(e, commlib.CallMismatch) and "with weights" in str(e) for e in got)


def test_a_rank_that_closes_is_not_waited_for():
    def rank_main(rank):
        with ExpertParallel(timeout=60.0, **CONFIG) as ep:
            ep.dispatch(X, IDX)
            if rank != 1:
                ep.dispatch(X, IDX)

    started = time.monotonic()
    got = failures(rank_main, 3)
    assert time.monotonic() - started < 10
    for rank in (0, 2):
        assert isinstance(got[rank], commlib.PeerTimeout)
        assert got[rank].peers == [1]
        assert "closed the communicator" in str(got[rank])


def test_after_a_failure_the_communicator_says_that_it_is_broken(device):
    x, idx = inputs(device)

    def rank_main(rank):
        with ExpertParallel(timeout=0.3, startup_timeout=60.0, **CONFIG) as ep:
            if rank == 0:
                with pytest.raises(commlib.PeerTimeout):
                    ep.dispatch(x, idx)
                with pytest.raises(commlib.CommError, match=r"cannot use this communicator any more.*waited"):
                    ep.dispatch(x, idx)
            ep.group.barrier()

    commlib.run_ranks(rank_main, 2, device=device)


@pytest.mark.parametrize(
    ("device", "wait"),
    [
        ("cpu", "wait"),
        ("cpu", "synchronize"),
        pytest.param("cuda", "synchronize", marks=pytest.mark.gpu),  # wait() only orders streams
    ],
)
def test_an_asynchronous_failure_is_raised_by_waiting(device, wait):
    x, idx = inputs(device)

    def rank_main(rank):
        with ExpertParallel(timeout=0.5, startup_timeout=60.0, **CONFIG) as ep:
            d = ep.dispatch(x, idx)
            if rank == 0:
                _, event = ep.combine(d.x, d.handle, async_op=True)
                with pytest.raises(commlib.PeerTimeout):
                    getattr(event, wait)()
                assert event.query()
            ep.group.barrier()

    commlib.run_ranks(rank_main, 2, device=device)


def test_queued_operations_have_one_deadline():
    """Those behind the one that failed end with it: the communicator is of no use to them."""

    def rank_main(rank):
        ep = ExpertParallel(timeout=1.0, slots=16, num_sms=2, **CONFIG)
        d = ep.dispatch(X, IDX)
        said = []
        if rank == 0:
            events = [
                ep.combine(X.repeat(d.x.shape[0] // 4, 1), d.handle, async_op=True)[1] for _ in range(10)
            ]
            began = time.monotonic()
            for event in events:
                with pytest.raises(commlib.CommError) as caught:
                    event.wait()
                said.append(caught.value)
            ep.close()
            assert time.monotonic() - began < 5  # not ten seconds
        ep.group.barrier()
        return said

    first, *rest = commlib.run_ranks(rank_main, 2)[0]
    assert isinstance(first, commlib.PeerTimeout) and first.peers == [1]
    for error in rest:
        assert "cannot use this communicator any more: rank 0 waited" in str(error), error


def test_an_error_in_one_rank_ends_the_others_and_is_the_one_raised():
    def rank_main(rank):
        ep = ExpertParallel(timeout=60.0, **CONFIG)
        if rank == 1:
            raise KeyError("the user's own mistake")
        ep.dispatch(X, IDX)

    started = time.monotonic()
    with pytest.raises(KeyError, match="own mistake"):
        commlib.run_ranks(rank_main, 3)
    assert time.monotonic() - started < 10


def test_epochs_wrap_around(monkeypatch):
    """Words carry 32 bits of an operation's number: 2**32 operations must not be the end."""
    from commlib.startup import connect

    make = connect._config

    def near_the_end(*args):
        config = make(*args)
        config.first_epoch = 2**32 - 20
        return config

    monkeypatch.setattr(connect, "_config", near_the_end)

    def rank_main(rank):
        with ExpertParallel(timeout=20.0, **CONFIG) as ep:
            for i in range(40):
                d = ep.dispatch(X * i, IDX)
                assert torch.equal(ep.combine(d.x, d.handle), 2 * i * X)

    commlib.run_ranks(rank_main, 2)


def test_thread_groups_do_not_mix():
    first, second = ThreadGroup.world(1)[0], ThreadGroup.world(1)[0]
    config = {**CONFIG, "device": "cpu"}
    with ExpertParallel(first, **config) as a, ExpertParallel(second, **config) as b:
        assert a.dispatch(X, IDX).x.shape == b.dispatch(X, IDX).x.shape == (4, 64)


def start(program: str, ranks: int, tmp_path: Path) -> list[subprocess.Popen]:
    """Processes that find each other through a file store; each writes rank.pid when it is ready."""
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return [
        subprocess.Popen(
            [sys.executable, str(PROGRAMS / program), str(r), str(ranks), str(tmp_path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=env,
        )
        for r in range(ranks)
    ]


def wait_for(files: list[Path], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not all(f.exists() for f in files):
        assert time.monotonic() < deadline, f"never written: {files}"
        time.sleep(0.05)


def test_a_killed_rank_is_named_by_all_others_at_once_and_leaves_nothing(tmp_path):
    before = set(os.listdir("/dev/shm"))
    processes = start("dispatch_forever.py", 3, tmp_path)
    wait_for([tmp_path / f"{r}.ready" for r in range(3)])
    time.sleep(0.3)
    processes[1].send_signal(signal.SIGKILL)
    killed = time.monotonic()
    outputs = [p.communicate(timeout=60) for p in processes]
    assert time.monotonic() - killed < 30, "the deadline is 60 s: the death should be noticed long before"
    for rank in (0, 2):
        out, err = outputs[rank]
        assert processes[rank].returncode == 3, err
        assert "PeerTimeout" in out and "peers=[1]" in out, out
        assert f"rank {rank} waited" in out
    # Open MPI jobs of other tests leave segments of their own.
    left = {name for name in os.listdir("/dev/shm") if not name.startswith("sm_segment")} - before
    assert not left


def test_ctrl_c_reaches_a_rank_that_waits(tmp_path):
    processes = start("wait_for_nobody.py", 2, tmp_path)
    wait_for([tmp_path / "0.ready"])
    time.sleep(0.5)
    processes[0].send_signal(signal.SIGINT)
    _, err = processes[0].communicate(timeout=20)
    assert "KeyboardInterrupt" in err, err
    processes[1].kill()
    processes[1].communicate()


def forbid_pidfds():
    """As profiles of older containers do: pidfd_open gives EPERM in this process from now on."""
    load, jump_if_equal, give = 0x20, 0x15, 0x06
    program = b"".join(
        struct.pack("HBBI", *step)
        for step in [
            (load, 0, 0, 0),  # the number of the call
            (jump_if_equal, 0, 1, 434),  # pidfd_open's, on every architecture
            (give, 0, 0, 0x00050000 | errno.EPERM),
            (give, 0, 0, 0x7FFF0000),  # allowed
        ]
    )
    steps = ctypes.create_string_buffer(program)
    header = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(steps)))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.prctl(38, 1, 0, 0, 0) == 0 and libc.prctl(22, 2, header, 0, 0) == 0
    with pytest.raises(PermissionError):
        os.pidfd_open(os.getpid())


@pytest.mark.parametrize("pidfds", [True, False])
def test_a_dead_rank_is_noticed_at_once_with_and_without_pidfds(in_processes, pidfds):
    def main(group):
        if not pidfds:
            forbid_pidfds()
        ep = ExpertParallel(group, device="cpu", timeout=50.0, **CONFIG)
        d = ep.dispatch(X, IDX)
        group.barrier()
        if group.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        began = time.monotonic()
        with pytest.raises(commlib.PeerTimeout, match="for rank 1, whose process has exited"):
            ep.combine(d.x, d.handle)
        return time.monotonic() - began < 20

    assert in_processes(main, 2) == [True, None]


def test_a_dead_rank_is_noticed_at_once_while_another_is_only_late(in_processes):
    def main(group):
        ep = ExpertParallel(group, device="cpu", timeout=50.0, **CONFIG)
        ep.dispatch(X, IDX)
        group.barrier()
        if group.rank == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        if group.rank == 1:
            began = time.monotonic()
            with pytest.raises(commlib.PeerTimeout, match="for rank 2, whose process has exited") as raised:
                ep.dispatch(X, IDX)  # whose counts are read by rank: those of rank 0 come first
            (group.place / "noticed").touch()
            return raised.value.peers, time.monotonic() - began < 20
        while not (group.place / "noticed").exists():
            time.sleep(0.01)
        return None

    assert in_processes(main, 3) == [None, ([2], True), None]


@pytest.mark.parametrize("node", [3, 1], ids=["one_node", "three_nodes"])
def test_a_growing_rank_blames_one_that_died_not_one_that_left_because_of_it(in_processes, node):
    def main(group):
        ep = ExpertParallel(timeout=50.0, device="cpu", ranks_per_node=node, **CONFIG | {"max_tokens": None})
        ep.dispatch(X, IDX)
        group.barrier()
        if group.rank == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        began = time.monotonic()
        if group.rank == 1:
            try:
                ep.dispatch(X, IDX)
            finally:
                os._exit(0)
        while not ep._comm.core.absence_of(1, departed_too=True):
            time.sleep(0.01)
        with pytest.raises(commlib.PeerTimeout, match="rank 1 had given up on rank 2") as raised:
            ep._comm.make_room(10**4, tokens=10**4)
        return raised.value.peers, time.monotonic() - began < 20

    assert in_processes(with_torch(main), 3)[0] == ([2], True)


def test_threads_that_cannot_start_are_an_error():
    """On the rank where they fail; the interpreter goes on, and so does the next communicator."""
    program = """
import resource, torch, commlib
sizes = dict(num_experts=8, hidden=64, topk=2, max_tokens=8, device="cpu")
pages = int(open("/proc/self/statm").read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * 4096 + (400 << 20),) * 2)
try:
    commlib.ExpertParallel(num_sms=512, **sizes)
except RuntimeError as error:
    print(error)
with commlib.ExpertParallel(num_sms=2, **sizes) as ep:
    ep.dispatch(torch.ones(4, 64, dtype=torch.bfloat16), torch.tensor([[0, 7]] * 4))
    print("and goes on")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "cannot start communication thread" in done.stdout and "Lower num_sms" in done.stdout
    assert done.stdout.endswith("and goes on\n")
