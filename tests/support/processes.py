"""Ranks that are forked processes: for start-up without a launcher, and with ranks that die during it."""

import contextlib
import gc
import os
import pickle
import resource
import signal
import time
import traceback
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist
from whole_files import write_whole

from commlib.startup.group import Group
from commlib.startup.inprocess import remake_torch_threads

HANG_SECONDS = 60  # a rank that is still there then is killed


class FileGroup(Group):
    """Processes that gather through files. A rank that is gone is an error, as with MPI and gloo."""

    def __init__(self, place, rank, size):
        self.place, self.rank, self.size, self.round = Path(place), rank, size, 0

    def allgather(self, obj):
        self.round += 1
        write_whole(self.place / f"{self.round}.{self.rank}", pickle.dumps(obj))
        return [self._of(rank) for rank in range(self.size)]

    def _of(self, rank):
        file = self.place / f"{self.round}.{rank}"
        while not file.exists():
            if (self.place / f"left.{rank}").exists():
                raise ConnectionError(f"the group has lost rank {rank}")
            time.sleep(0.001)
        return pickle.loads(file.read_bytes())

    def leave(self):
        """Like a rank that dies: at once, and in the middle of whatever it does."""
        (self.place / f"left.{self.rank}").touch()
        os.kill(os.getpid(), signal.SIGKILL)


def run_processes(main, size, place):
    """``main(group)`` in a process for each rank; what each returned or raised, None where it was killed."""
    pids = []
    # Earlier tests' leftovers are the parent's: a child that collected them would change its descriptors, or
    # close communicators whose threads it lacks.
    gc.collect()
    gc.freeze()
    for rank in range(size):
        pids.append(os.fork())
        if pids[-1] == 0:
            signal.alarm(HANG_SECONDS)
            _be_rank(main, FileGroup(place, rank, size))
    gc.unfreeze()
    for pid in pids:
        os.waitpid(pid, 0)
    files = [Path(place) / f"result.{rank}" for rank in range(size)]
    return [pickle.loads(file.read_bytes()) if file.exists() else None for file in files]


def with_torch(main, backend="gloo"):
    """``main`` of a rank, within torch.distributed's default group of the same ranks."""

    def rank_main(group):
        dist.init_process_group(
            backend,
            store=dist.FileStore(str(group.place / "store"), group.size),
            rank=group.rank,
            world_size=group.size,
            timeout=timedelta(seconds=HANG_SECONDS),
        )
        return main(group)

    return rank_main


def _be_rank(main, group):
    remake_torch_threads()
    try:
        said = main(group)
    except BaseException as error:
        said = f"{type(error).__name__}: {error}"
        traceback.print_exc()  # pytest shows it where the test fails
    write_whole(group.place / f"result.{group.rank}", pickle.dumps(said))
    os._exit(0)


def descriptors():
    """How many this process has."""
    return len(os.listdir("/proc/self/fd"))


def memory_of(rank):
    """A descriptor of memory that holds its rank."""
    fd = os.memfd_create(f"heap {rank}")
    os.write(fd, b"heap of rank %d" % rank)
    return fd


@contextlib.contextmanager
def no_more_descriptors(but=0):
    """Inside, this process can open ``but`` more files, and no more."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    top = max(map(int, os.listdir("/proc/self/fd")))
    filled = [os.dup(0)]  # those below the limit, which is on numbers
    while filled[-1] < top:
        filled.append(os.dup(0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (filled[-1] + 1 + but, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
        for fd in filled:
            os.close(fd)
