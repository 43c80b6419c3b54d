"""Ranks as threads of one process: for tests, notebooks, and several ranks on one device."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from commlib.arguments import as_int, shown
from commlib.devices import platform_of
from commlib.errors import CommError
from commlib.startup.group import ThreadGroup, set_current_group

T = TypeVar("T")
_STOP_SECONDS = 2.0  # within which ranks have to notice an interrupt


def run_ranks(
    fn: Callable[..., T],
    world_size: int,
    *args: Any,
    device: torch.device | str | None = None,
    run_ahead: bool = False,
) -> list[T]:
    """Run ``fn(rank, *args)`` on ``world_size`` threads that are ranks of one group.

    Inside ``fn``, ``ExpertParallel()`` without a group finds that group, and its device. On a GPU each thread
    has a current stream of its own, which begins after the caller's work; what ``fn`` returned is complete on
    the device.

    Before it goes on, a rank's thread also waits until each of its operations is done, and each event that
    it waits for. Otherwise the operation only queues, as it does for a process that has a GPU to itself, and
    what comes next may hold up all ranks: a copy from the device to ordinary memory (``.cpu()``,
    ``.tolist()``, ``print``) keeps other threads out of the driver until the stream reaches it, and the
    stream may be waiting for a rank whose thread needs the driver. ``run_ahead`` omits the wait, for
    programs that measure and avoid such copies.

    cuBLAS is loaded before the ranks start. Other libraries, ``torch.compile`` and Triton among them, load
    their kernels at first use, which waits until the GPU is idle: use them once before.

    On a GPU set ``CUDA_MODULE_LOADING=EAGER`` and ``CUDA_DEVICE_MAX_CONNECTIONS=32`` in the environment: a
    kernel of one rank that is loaded, or queued, behind a waiting kernel of another rank holds up both.

    Args:
        fn: what each rank does.
        world_size: how many ranks, at least 1.
        device: "cpu" (or None), or "cuda" or "cuda:i", which all ranks then share.
        run_ahead: on a GPU, operations that are not asynchronous only queue.

    Returns:
        What each rank returned, by rank.

    Raises:
        TypeError: ``fn`` cannot be called, or ``world_size`` is no int.
        ValueError: world_size < 1, or another device.
        RuntimeError: no CUDA device can be used; the text says why.
        KeyboardInterrupt: on Ctrl-C. Ranks that are in a gather or an operation are ended.
        Exception: that of the rank that failed first; the other ranks are told, and do not wait for it. At
            start-up they do not wait for a rank that has returned, either.
    """
    if not callable(fn):
        raise TypeError(
            f"run_ranks takes a function and the number of ranks, got {shown(fn)} as the function"
        )
    world_size = as_int("world_size", world_size, 1)
    platform = platform_of("cpu" if device is None else device)
    platform.require()
    where = platform.resolve(torch.device("cpu" if device is None else device))
    groups = ThreadGroup.world(world_size, str(where), run_ahead)
    thread_of_rank = platform.rank_thread(where)
    results: list[Any] = [None] * world_size
    failures: list[tuple[int, BaseException]] = []
    remake_torch_threads()

    def rank_main(rank: int) -> None:
        set_current_group(groups[rank])
        try:
            with thread_of_rank():
                results[rank] = fn(rank, *args)
            groups[rank].leave(f"rank {rank} has returned from its function, so it takes no part in this")
        except BaseException as error:
            failures.append((rank, error))
            groups[rank].abort(f"rank {rank} raised {type(error).__name__}: {error}")

    threads = [
        threading.Thread(target=rank_main, args=(r,), name=f"commlib-rank-{r}", daemon=True)
        for r in range(world_size)
    ]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    except BaseException as error:  # Ctrl-C, or there are no more threads
        _stop(groups, threads, f"run_ranks was ended by {type(error).__name__}")
        raise
    if failures:
        raise _root(failures)
    return results


def remake_torch_threads() -> None:
    """Let torch make its pool of threads again where a fork has lost it.

    By itself it does so when a thread first needs the pool, and if several need it at once, some find none:
    "pool INTERNAL ASSERT FAILED at ATen/ParallelOpenMP.cpp" (torch 2.13).
    """
    torch.set_num_threads(torch.get_num_threads())


def _stop(groups: list[ThreadGroup], threads: list[threading.Thread], why: str) -> None:
    """End the ranks' waits in commlib, so that none is inside when the interpreter ends.

    A rank that does something else goes on: its thread is a daemon.
    """
    for group in groups:
        group.abort(why)
    end = time.monotonic() + _STOP_SECONDS
    for thread in threads:
        if thread.ident is not None:  # it has been started
            thread.join(max(0.0, end - time.monotonic()))


def _root(failures: list[tuple[int, BaseException]]) -> BaseException:
    """The failure that caused the others: the first that is not about another rank."""
    for _, error in failures:
        if not isinstance(error, CommError):
            return error
    return failures[0][1]
