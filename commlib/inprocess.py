"""Ranks as threads of one process: for tests, notebooks, and several ranks on one device."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from commlib.errors import CommError
from commlib.group import ThreadGroup, set_current_group


def run_ranks(fn: Callable[..., Any], world_size: int, *args: Any, device: Any = None) -> list[Any]:
    """Run ``fn(rank, *args)`` on ``world_size`` threads that are ranks of one group.

    Inside ``fn``, ``ExpertParallel()`` without a group finds that group.

    Args:
        fn: what each rank does.
        world_size: how many ranks, at least 1.
        device: "cpu" (or None).

    Returns:
        What each rank returned, by rank.

    Raises:
        ValueError: world_size < 1, or another device.
        The error of the rank that failed first; the other ranks are told, and do not wait for it.
    """
    if world_size < 1:
        raise ValueError(f"world_size must be at least 1, got {world_size}")
    if device not in (None, "cpu"):
        raise ValueError(f'device must be "cpu" (there is no CUDA backend yet), got {device!r}')
    groups = ThreadGroup.world(world_size)
    results: list[Any] = [None] * world_size
    failures: list[tuple[int, BaseException]] = []

    def rank_main(rank: int) -> None:
        set_current_group(groups[rank])
        try:
            results[rank] = fn(rank, *args)
        except BaseException as error:
            failures.append((rank, error))
            groups[rank].abort(f"rank {rank} raised {type(error).__name__}: {error}")

    threads = [
        threading.Thread(target=rank_main, args=(r,), name=f"commlib-rank-{r}", daemon=True)
        for r in range(world_size)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise _root(failures)
    return results


def _root(failures: list[tuple[int, BaseException]]) -> BaseException:
    """The failure that caused the others: the first that is not about another rank."""
    for _, error in failures:
        if not isinstance(error, CommError | threading.BrokenBarrierError):
            return error
    return failures[0][1]
