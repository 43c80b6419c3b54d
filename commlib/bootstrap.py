"""Start-up: ranks compare their settings and map each other's memory."""

from __future__ import annotations

import os
from typing import Any

from commlib import _core
from commlib.errors import CommError, ConfigMismatch
from commlib.group import Group
from commlib.settings import CORE_DTYPES, Settings

# With a core for each thread, a peer answers within microseconds. With more threads than cores it may need
# the very core that a spinning thread holds, so yield soon, then sleep. See docs/decisions.md.
_SPIN_OWN_CORE = _core.SpinPolicy(pauses=4000, yields=50)
_SPIN_SHARED_CORE = _core.SpinPolicy(pauses=50, yields=5)


def connect(group: Group, settings: Settings) -> _core.Communicator:
    """A connected communicator for this rank. Every rank calls it; a failure on one is raised on all."""
    error: Exception | None = None
    try:
        settings.check(group.size)
    except (TypeError, ValueError, RuntimeError) as e:
        error = e
    cpus = sorted(os.sched_getaffinity(0))
    infos = _gather(group, error, {"shared": settings.shared(), "host": _host(), "cpus": cpus})
    _compare([info["shared"] for info in infos])
    _check_one_host([info["host"] for info in infos])
    cores = len(set().union(*(info["cpus"] for info in infos)))
    workers = settings.num_sms or max(1, cores // (2 * group.size))
    threads = sum(_gather(group, None, workers))

    core = addresses = None
    try:
        core = _core.Communicator(_config(group, settings, workers, threads > cores))
        addresses = core.address()
    except (RuntimeError, MemoryError) as e:
        error = e
    all_addresses = _gather(group, error, addresses)
    assert core is not None
    try:
        core.connect(all_addresses)
    except RuntimeError as e:
        error = e
    _gather(group, error, None)
    return core


def _config(group: Group, settings: Settings, workers: int, crowded: bool) -> _core.Config:
    config = _core.Config()
    config.rank, config.size = group.rank, group.size
    config.experts, config.hidden, config.topk = (
        settings.num_experts,
        settings.hidden,
        settings.topk,
    )
    config.max_tokens, config.capacity = settings.max_tokens, settings.capacity_on(group.size)
    config.dtype = CORE_DTYPES[settings.dtype]
    config.slots, config.workers, config.timeout = settings.slots, workers, settings.timeout
    config.spin = _SPIN_SHARED_CORE if crowded else _SPIN_OWN_CORE
    return config


def _gather(group: Group, error: Exception | None, value: Any) -> list[Any]:
    """Everyone's value; where one rank failed, an error on every rank, so that none waits for it."""
    gathered = group.allgather((None if error is None else f"{type(error).__name__}: {error}", value))
    if error is not None:
        raise error
    for rank, (failed, _) in enumerate(gathered):
        if failed is not None:
            raise CommError(f"rank {rank} could not start: {failed}")
    return [value for _, value in gathered]


def _compare(shared: list[dict[str, Any]]) -> None:
    differences = []
    for name in shared[0]:
        values: dict[Any, list[int]] = {}
        for rank, settings in enumerate(shared):
            values.setdefault(settings[name], []).append(rank)
        if len(values) > 1:
            said = ", ".join(f"{value} on rank {_ranks(ranks)}" for value, ranks in values.items())
            differences.append(f"{name} is {said}")
    if differences:
        raise ConfigMismatch("ranks disagree: " + "; ".join(differences))


def _ranks(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:4]))
    return shown if len(ranks) <= 4 else f"{shown} and {len(ranks) - 4} more"


def _host() -> tuple[str, str]:
    """What two processes have in common when they can open each other's memory through /proc."""
    with open("/proc/sys/kernel/random/boot_id") as f:
        return f.read().strip(), os.readlink("/proc/self/ns/pid")


def _check_one_host(hosts: list[tuple[str, str]]) -> None:
    for rank, host in enumerate(hosts):
        if host != hosts[0]:
            what = "another host" if host[0] != hosts[0][0] else "another PID namespace (container)"
            raise CommError(
                f"rank {rank} runs on {what} than rank 0; rows move through shared memory only, so far"
            )
