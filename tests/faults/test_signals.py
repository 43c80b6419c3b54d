"""Ctrl-C, signal handlers, and a stopped process: waits end where they should, and only there."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

import commlib
from commlib import ExpertParallel

TESTS = Path(__file__).parents[1]
CONFIG = {"num_experts": 8, "hidden": 64, "topk": 2, "max_tokens": 8, "dtype": torch.float32, "device": "cpu"}
CONFIG_TEXT = "dict(num_experts=8, hidden=64, topk=2, max_tokens=8, dtype=torch.float32, device='cpu')"
X, IDX = torch.ones(4, 64), torch.tensor([[0, 7]] * 4)
DEADLINE = 40.0  # of operations; nothing here waits for it
SOON = 15.0  # on a machine that does other things too


def after(seconds, number):
    """Send this process a signal after ``seconds``, as the shell does on Ctrl-C."""
    threading.Timer(seconds, lambda: os.kill(os.getpid(), number)).start()


def interrupted(in_processes, rank_0, num_sms=2):
    """Ctrl-C comes to rank 0 in ``rank_0(ep, d)``, while that waits for rank 1, which does nothing."""

    def main(group):
        signal.signal(signal.SIGINT, signal.default_int_handler)
        ep = ExpertParallel(group, timeout=DEADLINE, num_sms=num_sms, **CONFIG)
        d = ep.dispatch(X, IDX)
        if group.rank == 1:
            group.barrier()
            return None
        after(0.3, signal.SIGINT)
        began = time.monotonic()
        try:
            rank_0(ep, d)
            raised = "nothing"
        except BaseException as error:
            raised = type(error).__name__
        took = time.monotonic() - began
        group.barrier()
        return raised, took < SOON

    assert in_processes(main, 2)[0] == ("KeyboardInterrupt", True)


def in_combine(ep, d):
    ep.combine(d.x, d.handle)


def in_synchronize(ep, d):
    ep.combine(d.x, d.handle, async_op=True)
    ep.synchronize()


def behind_an_operation(ep, d):
    ep.combine(d.x, d.handle, async_op=True)
    ep.combine(d.x, d.handle)


def in_close(ep, d):
    ep.combine(d.x, d.handle, async_op=True)
    ep.close()


def at_the_end_of_a_block(ep, d):
    with ep:
        ep.combine(d.x, d.handle, async_op=True)[1].wait()


def behind_another_thread(ep, d):
    def wait_for_rank_1():
        with pytest.raises(commlib.CommError):
            ep.combine(d.x, d.handle)

    other = threading.Thread(target=wait_for_rank_1)
    other.start()
    time.sleep(0.1)
    try:
        ep.combine(d.x, d.handle)
    finally:
        ep._comm.core.give_up("the test is over")
        other.join()


@pytest.mark.parametrize(
    "where",
    [in_combine, in_synchronize, behind_an_operation, in_close, at_the_end_of_a_block, behind_another_thread],
)
def test_ctrl_c_ends_a_wait(in_processes, where):
    interrupted(in_processes, where)


@pytest.mark.parametrize("use", ["combine", "wait"])
def test_ctrl_c_is_handled_when_what_is_awaited_comes_at_that_moment(in_processes, use):
    def main(group):
        ep = ExpertParallel(group, timeout=DEADLINE, num_sms=1, **CONFIG)
        d = ep.dispatch(X, IDX)

        def handler(number, frame):
            group.barrier()
            time.sleep(1)  # for rank 1, which must not move before
            raise KeyboardInterrupt

        if group.rank == 1:
            group.barrier()
            ep.combine(d.x, d.handle)
        else:
            signal.signal(signal.SIGINT, handler)
            after(0.3, signal.SIGINT)
            with pytest.raises(KeyboardInterrupt):
                if use == "combine":
                    ep.combine(d.x, d.handle)
                else:
                    ep.combine(d.x, d.handle, async_op=True)[1].wait()
            signal.signal(signal.SIGINT, signal.default_int_handler)
        d = ep.dispatch(X, IDX)  # works, because the operation itself was done
        back = ep.combine(d.x, d.handle)
        ep.close()
        return torch.equal(back, 2 * X)

    assert in_processes(main, 2) == [True, True]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_a_signal_is_handled_while_an_unclosed_communicator_goes(in_processes, error):
    """Python drops errors raised while it lets go of an object."""

    def handler(number, frame):
        raise error

    def main(group):
        ep = ExpertParallel(group, timeout=DEADLINE, num_sms=2, **CONFIG)
        d = ep.dispatch(X, IDX)
        if group.rank == 1:
            group.barrier()
            with pytest.raises(commlib.CommError, match="rank 0"):
                ep.combine(d.x, d.handle)
            return None
        dropped = []
        sys.unraisablehook = lambda it: dropped.append(it.exc_type)
        signal.signal(signal.SIGINT, handler)
        ep.combine(d.x, d.handle, async_op=True)
        after(0.3, signal.SIGINT)
        began = time.monotonic()
        try:
            del d, ep
            for _ in range(2):  # Python handles pending signals when a loop goes on
                pass
            raised = None
        except error:
            raised = error
        took = time.monotonic() - began
        group.barrier()
        return raised, dropped, took < SOON

    assert in_processes(main, 2)[0] == (error, [], True)


def test_ctrl_c_ends_a_wait_for_an_expert(in_processes):
    def main(group):
        signal.signal(signal.SIGINT, signal.default_int_handler)
        row = X.shape[1] * X.element_size()
        link = row / 3.0 / 1e9 if group.rank == 1 else None  # its one row is on its way for 3 s
        ep = ExpertParallel(group, timeout=DEADLINE, num_sms=1, link_gbps=link, **CONFIG)
        d = ep.dispatch(X[:1], IDX[:1], layout="expert", async_op=True, in_waves=True)
        try:
            if group.rank == 0:
                after(0.3, signal.SIGINT)
                d.wait_expert(3)
        except KeyboardInterrupt:
            return "interrupted"
        finally:
            group.barrier()
            d.event.wait()

    assert in_processes(main, 2)[0] == "interrupted"


def test_a_signal_handler_may_close(in_processes):
    def main(group):
        ep = ExpertParallel(group, timeout=DEADLINE, num_sms=2, **CONFIG)
        d = ep.dispatch(X, IDX)
        if group.rank == 1:
            group.barrier()
            with pytest.raises(commlib.CommError, match="rank 0"):
                ep.combine(d.x, d.handle)
            return None
        signal.signal(signal.SIGTERM, lambda *_: ep.close())
        after(0.3, signal.SIGTERM)
        began = time.monotonic()
        with pytest.raises(commlib.CommError, match="a signal handler closed it"):
            ep.combine(d.x, d.handle)
        ep.close()
        group.barrier()
        return time.monotonic() - began < SOON

    assert in_processes(main, 2) == [True, None]


USES = {
    "dispatch": lambda ep, d: ep.dispatch(X, IDX),
    "synchronize": lambda ep, d: ep.synchronize(),
    "an event": lambda ep, d: d.event.wait(),
}


@pytest.mark.parametrize("use", USES)
def test_a_signal_handler_may_not_use_it_in_the_middle_of_an_operation(in_processes, use):
    """It would wait for the operation that it interrupts, which goes on after it."""

    def main(group):
        with ExpertParallel(group, timeout=DEADLINE, num_sms=2, **CONFIG) as ep:
            d = ep.dispatch(X, IDX, async_op=True)
            d.event.wait()
            if group.rank == 1:
                group.barrier()
                return torch.equal(ep.combine(d.x, d.handle), 2 * X)
            said = []

            def handler(*_):
                try:
                    USES[use](ep, d)
                except commlib.CommError as error:
                    said.append(str(error))
                group.barrier()

            signal.signal(signal.SIGUSR1, handler)
            after(0.3, signal.SIGUSR1)
            out = ep.combine(d.x, d.handle)
            return "in the middle of one of its operations" in said[0] and torch.equal(out, 2 * X)

    assert in_processes(main, 2) == [True, True]


def test_time_in_which_this_process_stood_still_does_not_count(in_processes):
    """Rank 0 is stopped for longer than its deadline while it waits; when it goes on, rank 1 comes."""

    def main(group):
        with ExpertParallel(group, timeout=DEADLINE, num_sms=1, **CONFIG) as ep:
            d = ep.dispatch(X, IDX)
            pids = [int(p) for p in group.allgather(b"%d" % os.getpid())]
            ep.timeout = 1.5 if group.rank == 0 else DEADLINE
            if group.rank == 1:
                time.sleep(0.3)  # rank 0 waits by now
                os.kill(pids[0], signal.SIGSTOP)
                time.sleep(3)
                os.kill(pids[0], signal.SIGCONT)
                time.sleep(0.2)
            return torch.equal(ep.combine(d.x, d.handle), 2 * X)

    assert in_processes(main, 2) == [True, True]


def test_communication_goes_on_while_a_program_keeps_the_gil(in_processes):
    """Rank 0's threads serve its asynchronous operations while Python computes one large number."""

    def main(group):
        with ExpertParallel(group, timeout=DEADLINE, num_sms=1, **CONFIG) as ep:
            d = ep.dispatch(X, IDX)
            if group.rank == 1:
                group.barrier()
                time.sleep(0.1)  # rank 0's thread naps by now
                out = [ep.combine(d.x, d.handle) for _ in range(2)]
                (group.place / "done").touch()
                return all(torch.equal(o, 2 * X) for o in out)
            events = [ep.combine(d.x, d.handle, async_op=True)[1] for _ in range(2)]
            group.barrier()
            n, done = 100_000, False
            while not done and n < 30_000_000:
                done = keep_the_gil(n, group.place / "done")
                n *= 3
            for event in events:
                event.wait()
            return done

    assert in_processes(main, 2) == [True, True]


def keep_the_gil(n, file):
    """Compute 3 ** n, in one piece; whether the file was there at the end, and not at the beginning."""
    if file.exists():
        return True
    _ = 3**n
    return file.exists()


def test_programs_that_tests_start_get_signals_however_the_tests_were_started(tmp_path):
    """In a shell's background, or under nohup, these are ignored; executed programs inherit that."""
    test = "import os, signal, subprocess, sys\n\n\ndef test_they_end_it():\n" + "".join(
        f"    code = 'import os; os.kill(os.getpid(), {number}); os._exit(9)'\n"
        f"    done = subprocess.run([sys.executable, '-c', code], stderr=subprocess.DEVNULL)\n"
        f"    assert done.returncode == -{number}\n"
        for number in map(int, (signal.SIGINT, signal.SIGHUP))
    )
    (tmp_path / "test_it.py").write_text(test)
    shutil.copy(TESTS / "conftest.py", tmp_path)
    code = (
        "import os, signal, sys\n"
        "for number in (signal.SIGINT, signal.SIGHUP):\n"
        "    signal.signal(number, signal.SIG_IGN)\n"
        "os.execv(sys.executable, [sys.executable, '-m', 'pytest', '-q', '--rootdir=.'])\n"
    )
    path = os.pathsep.join([str(TESTS / "support"), str(TESTS.parent)])
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stdout + done.stderr


ENDS = {
    "it returns": ("", 0, 1.0),
    "sys.exit": ("sys.exit(3)", 3, 1.0),
    "an exception": ("raise ValueError('the program failed')", 1, DEADLINE),
    "Ctrl-C": ("os.kill(os.getpid(), signal.SIGINT); time.sleep(9)", -signal.SIGINT, DEADLINE),
}


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("operation", ["dispatch", "combine", "an event"])
def test_a_program_may_end_while_a_thread_waits(operation, end):
    """A daemon thread that waits when the interpreter ends neither aborts it nor holds it up."""
    statement, status, deadline = ENDS[end]
    program = f"""
import os, signal, sys, threading, time, torch, commlib
from commlib.startup.group import ThreadGroup
x, idx, there = torch.ones(4, 64), torch.tensor([[0, 7]] * 4), threading.Barrier(3)
def rank_main(group):
    ep = commlib.ExpertParallel(group, timeout={deadline}, startup_timeout=60.0, num_sms=2, **{CONFIG_TEXT})
    d = ep.dispatch(x, idx)
    there.wait()
    if group.rank == 1:
        time.sleep(60)
    elif {operation == "dispatch"}:
        ep.dispatch(x, idx)
    elif {operation == "combine"}:
        ep.combine(d.x, d.handle)
    else:
        ep.combine(d.x, d.handle, async_op=True)[1].wait()
for group in ThreadGroup.world(2):
    threading.Thread(target=rank_main, args=(group,), daemon=True).start()
signal.signal(signal.SIGINT, signal.default_int_handler)
there.wait()
time.sleep(0.2)
{statement}
"""
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=100)
    assert done.returncode == status, done.stderr
    assert time.monotonic() - began < 2 * SOON  # including the time to import PyTorch


def test_another_thread_may_look_at_slots_while_a_dispatch_waits(in_processes):
    """It must not keep the interpreter from the main thread, which wants to look for Ctrl-C."""

    def main(group):
        with ExpertParallel(group, timeout=DEADLINE, **CONFIG) as ep:
            seen = []
            look = threading.Timer(0.2, lambda: seen.append(ep.memory_report().slots_in_use))
            if group.rank == 0:
                look.start()
            else:
                time.sleep(2.5)  # more than the second between two looks for Ctrl-C
            d = ep.dispatch(X, IDX)
            if group.rank == 0:
                look.join()
            return len(d.x), len(seen)

    assert in_processes(main, 2) == [(8, 1), (8, 0)]
