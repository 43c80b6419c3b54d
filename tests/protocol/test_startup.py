"""Start-up of ranks that are processes.

With a GPU each, on stand-ins for the CUDA backend's cores; with too few open files.
"""

import contextlib
import os
from types import SimpleNamespace

import pytest
from processes import descriptors, memory_of, no_more_descriptors

from commlib import ExpertParallel, cuda
from commlib.devices import platform_of
from commlib.startup import connect as start
from commlib.startup.conversation import gather

CONFIG = SimpleNamespace(device=0)


class Core:
    """Maps nothing, but reads what it is sent."""

    def __init__(self, rank, fails):
        self.rank, self.fails, self.fd = rank, fails, memory_of(rank)

    def address(self):
        return os.getpid(), self.fd, 16, b"handle", b""

    def connect(self, addresses):
        self.read = [os.pread(address[1], 99, 0) for address in addresses]
        if self.fails:
            raise RuntimeError("cannot map")


@pytest.fixture
def connect(monkeypatch):
    """The core of this rank, connected. The rank ``failing`` fails in ``step``."""

    def run(group, step=None, failing=1):
        def make(_):
            return Core(group.rank, step == "connect" and group.rank == failing)

        def require_peer_access(device, uuid):
            if step == "access" and (group.rank, uuid) == (failing, "gpu 0"):
                raise RuntimeError("GPU 1 cannot reach GPU 0")

        stand_in = SimpleNamespace(make_communicator=make, require_peer_access=require_peer_access)
        monkeypatch.setattr(cuda, "_cuda", stand_in)
        infos = [{"uuid": f"gpu {rank}", "host": "here", "shares_fds": True} for rank in range(group.size)]
        with group.converse(60.0) as talk:
            core = start._make_and_connect(talk, platform_of("cuda"), CONFIG, infos, list(range(group.size)))
            gather(talk, "ready", None)
        return core

    return run


def test_processes_open_each_others_memory_and_keep_no_descriptor_of_it(in_processes, connect):
    def main(group):
        before = descriptors()
        core = connect(group)
        return core.read, descriptors() - before

    heaps = [b"heap of rank %d" % rank for rank in range(3)]
    assert in_processes(main, 3) == [(heaps, 1)] * 3  # its own


@pytest.mark.parametrize(
    ("step", "kind", "why"),
    [("connect", "CommError", "cannot map"), ("access", "RuntimeError", "GPU 1 cannot reach GPU 0")],
)
def test_a_rank_that_cannot_open_anothers_memory_is_an_error_on_all(in_processes, connect, step, kind, why):
    def main(group):
        before = descriptors()
        with pytest.raises(RuntimeError) as caught:
            connect(group, step)
        return str(caught.value), descriptors() - before

    texts, left = zip(*in_processes(main, 3), strict=True)
    assert texts[1] == why
    assert texts[0] == texts[2] == f"rank 1 could not start: {kind}: {why}"
    assert max(left) <= 1  # its own


# -- open files


@pytest.mark.parametrize("left", range(6))
def test_a_rank_that_runs_out_of_files_says_so_to_all(in_processes, left):
    def main(group):
        few = no_more_descriptors(left) if group.rank == 1 else contextlib.nullcontext()
        with few:
            ep = ExpertParallel(
                group, num_experts=4, hidden=8, topk=1, max_tokens=4, device="cpu", timeout=60.0
            )
        group.barrier()
        ep.close()

    said = in_processes(main, 3)
    if left > 0 and said == [None] * 3:  # it was enough
        return
    assert "ulimit -n" in said[1]
    for other in (said[0], said[2]):
        assert other.startswith("CommError: rank 1 could not start: ") and "ulimit -n" in other
