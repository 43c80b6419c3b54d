"""A forked process may not use its parent's communicator, and does not end it."""

import gc
import os
import pickle
import sys
import threading
import time

import pytest
import torch
from moe_models import Model, batch, connect
from torch.distributed.device_mesh import init_device_mesh

import commlib
from commlib import ExpertParallel
from commlib.nn import clip_grad_norm_, full_state_dict, fully_shard_experts, sync_gradients
from commlib.startup.group import SingleGroup

CONFIG = {"num_experts": 8, "hidden": 64, "topk": 2, "max_tokens": 8, "dtype": torch.float32}
X, IDX = torch.ones(4, 64), torch.tensor([[0, 7]] * 4)
AT_ONCE = 5.0  # seconds; the deadline of operations is far beyond
USES = {
    "dispatch": lambda ep, d: ep.dispatch(X, IDX),
    "asynchronous dispatch": lambda ep, d: ep.dispatch(X, IDX, async_op=True),
    "dispatch with a handle": lambda ep, d: ep.dispatch(X, handle=d.handle),
    "combine": lambda ep, d: ep.combine(d.x, d.handle),
    "combine_buffer": lambda ep, d: ep.combine_buffer(d.handle),
    "an event": lambda ep, d: d.event.wait(),
    "synchronize": lambda ep, d: ep.synchronize(),
}
ENDS = {
    "close": lambda ep: ep.close(),
    "with": lambda ep: ep.__exit__(None, None, None),
    "destroy": lambda ep: vars(ep).clear(),
    "give up": lambda ep: ep._comm.core.give_up("not for a child to say"),
}


def in_child(call):
    """What ``call()`` raised in a forked process, or its result; and how long it took."""
    reading, writing = os.pipe()
    began = time.monotonic()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        try:
            said = call()
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"
        os.write(writing, pickle.dumps(said))
        os._exit(0)
    os.close(writing)
    while not os.waitpid(pid, os.WNOHANG)[0]:
        if time.monotonic() - began > AT_ONCE:
            os.kill(pid, 9)
        time.sleep(0.001)
    with os.fdopen(reading, "rb") as pipe:
        said = pipe.read()
    assert said, "the forked process hung or died"
    return pickle.loads(said)


def step(ep):
    d = ep.dispatch(X, IDX, zero_copy=True)
    return torch.equal(ep.combine(d.x, d.handle), 2 * X)


def two_ranks(in_processes, rank_main):
    """``rank_main(ep)`` on rank 0 of two processes; operations are right on both before and after it."""

    def main(group):
        with ExpertParallel(group, device="cpu", timeout=30.0, num_sms=2, **CONFIG) as ep:
            right = [step(ep)]
            said = rank_main(ep) if group.rank == 0 else None
            group.barrier()
            right.append(step(ep))
            return right, said

    (right, said), other = in_processes(main, 2)
    assert right == [True, True] and other == ([True, True], None)
    return said


@pytest.mark.parametrize("use", USES)
def test_using_the_parents_is_an_error(in_processes, use):
    def rank_main(ep):
        with ExpertParallel(SingleGroup(), device="cpu", **CONFIG) as own:
            d = own.dispatch(X, IDX, async_op=True)
            return in_child(lambda: USES[use](own, d))

    said = two_ranks(in_processes, rank_main)
    assert said.startswith("CommError: rank 0 cannot use this communicator"), said
    assert "of which this is a fork" in said and "spawn" in said


@pytest.mark.parametrize("end", ENDS)
def test_ending_the_parents_is_silent_and_quick(in_processes, end):
    assert two_ranks(in_processes, lambda ep: in_child(lambda: ENDS[end](ep))) is None


def test_results_in_the_heap_may_go_in_a_child(in_processes):
    def main(group):
        with ExpertParallel(group, device="cpu", timeout=30.0, **CONFIG) as ep:
            d = ep.dispatch(X, IDX, zero_copy=True)

            def drop():
                nonlocal d
                rows = d.x.clone()
                d = None
                gc.collect()
                return torch.equal(rows, torch.ones_like(rows))

            said = in_child(drop)
            used = ep._comm.core.slots_in_use
            return said, used, torch.equal(ep.combine(d.x, d.handle), 2 * X)

    assert in_processes(main, 2) == [(True, 1, True)] * 2


def test_a_child_that_exits_by_itself_ends_nothing(in_processes):
    """Like a data loader's worker forked by a script: its interpreter ends, with atexit and all."""

    def main(group):
        ep = ExpertParallel(group, device="cpu", timeout=30.0, num_sms=2, **CONFIG)
        right = [step(ep)]
        if group.rank == 0:
            pid = os.fork()
            if pid == 0:
                signal_free_exit()
            right.append(os.waitpid(pid, 0)[1] == 0)
        group.barrier()
        right.append(step(ep))
        ep.close()
        return right

    assert in_processes(main, 2) == [[True] * 3, [True] * 2]


def signal_free_exit():
    import atexit

    atexit._run_exitfuncs()
    threading._shutdown()
    sys.stdout.flush()
    os._exit(0)


def test_ranks_that_are_threads_of_a_child_use_torch_at_once():
    """Without remake_torch_threads three of four such children fail."""
    x, ranks = torch.ones(1000, 1000), 8
    threads = torch.get_num_threads()
    torch.set_num_threads(2)  # unlike torch's default, with which new threads do not care

    def child():
        together = threading.Barrier(ranks)
        return commlib.run_ranks(lambda rank: (together.wait(), (x + rank).mean().item())[1], ranks)

    try:
        for _ in range(10):
            assert in_child(child) == [1.0 + rank for rank in range(ranks)]
    finally:
        torch.set_num_threads(threads)


def test_a_child_may_make_its_own(in_processes):
    def rank_main(ep):
        def own():
            with ExpertParallel(SingleGroup(), device="cpu", num_sms=2, **CONFIG) as mine:
                d = mine.dispatch(X, IDX)
                return torch.equal(mine.combine(d.x, d.handle), X)

        return in_child(own)

    assert two_ranks(in_processes, rank_main) is True


def test_operations_under_way_at_the_fork_go_on(in_processes):
    def main(group):
        with ExpertParallel(group, device="cpu", timeout=30.0, num_sms=2, **CONFIG) as ep:
            d = ep.dispatch(X, IDX)
            if group.rank == 1:
                group.barrier()  # rank 0 has forked in the middle of its combine
                return torch.equal(ep.combine(d.x, d.handle), 2 * X)
            out, event = ep.combine(d.x, d.handle, async_op=True)
            said = in_child(event.wait)
            group.barrier()
            event.wait()
            return "of which this is a fork" in said and torch.equal(out, 2 * X)

    assert in_processes(main, 2) == [True, True]


def test_a_forked_child_gathers_nothing_over_its_parents_process_group(torch_ranks):
    """It has none of the group's threads, and would wait past the group's timeout."""

    def main(rank):
        mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("ep", "dp"))
        model = Model(8, connect(8))
        model(batch(rank, 0)).backward()
        for call in (
            lambda: sync_gradients(model),
            lambda: clip_grad_norm_(model, 1.0),
            lambda: torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0),
            lambda: len(full_state_dict(model)),
            lambda: fully_shard_experts(model, mesh["dp"]),
        ):
            said = in_child(call)
            assert said.startswith("RuntimeError: this process was forked from a rank"), said
        sync_gradients(model)

    torch_ranks(main, 2)
