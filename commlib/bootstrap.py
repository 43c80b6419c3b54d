"""Start-up: ranks compare their settings and map each other's memory."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from typing import Any

import torch

from commlib import _core, cuda, ucx
from commlib.backend import Backend, CpuBackend, CudaBackend
from commlib.errors import CommError, ConfigMismatch
from commlib.fd_exchange import close_fds, exchange_fds
from commlib.group import Group, ThreadGroup
from commlib.model import default_num_sms
from commlib.partition import SMPartition
from commlib.residency import of_this_process
from commlib.settings import CORE_DTYPES, Settings
from commlib.topology import Topology, find_topology, node_size

# With a core for each thread, a peer answers within microseconds. With more threads than cores it may need
# the very core that a spinning thread holds, so yield soon, then sleep. See docs/decisions.md.
_SPIN_OWN_CORE = _core.SpinPolicy(pauses=4000, yields=50)
_SPIN_SHARED_CORE = _core.SpinPolicy(pauses=50, yields=5)
# For a kernel: a sleep costs 50 µs and more, and what the host waits for comes within milliseconds.
_SPIN_GPU = _core.SpinPolicy(pauses=2000, yields=50_000)
_USER = 5  # of whom a warning is: frames from _count_blocks to the caller of ExpertParallel
_LEAST_START = 10.0  # seconds: processes start further apart than their operations later are


def resolve_device(device: Any, group: Group) -> torch.device:
    """The device that ``ExpertParallel(device=...)`` means: with an index where it is a CUDA device."""
    if device is None:
        device = group.device or ("cuda" if cuda.is_available() else "cpu")
    resolved = torch.device(device)
    if resolved.type == "cpu":
        return torch.device("cpu")
    if resolved.type != "cuda" or resolved.index is not None or not cuda.is_available():
        return resolved
    return torch.device("cuda", cuda.device_index())


def connect(group: Group, settings: Settings) -> tuple[Backend, Topology]:
    """The connected backend of this rank, and where all ranks are.

    Every rank calls it; a failure on one is raised on all.
    """
    error: Exception | None = None
    facts: dict[str, Any] = {}
    try:
        settings.check(group.size)
        facts = _facts(settings)
    except (TypeError, ValueError, RuntimeError) as e:
        error = e
    infos = _gather(
        group,
        error,
        facts | own_place() | {"pid": os.getpid(), "secret": os.urandom(32).hex()} | _shared(settings, error),
    )
    _compare([info["shared"] for info in infos])
    topology = _topology(infos, settings)
    several = len(topology.hosts) > 1
    if several:
        _gather(group, _why_unreachable(settings), None)
    prepare = _prepare_cuda if settings.device.type == "cuda" else _prepare_cpu
    config, stream = prepare(group, settings, infos)
    near = topology.near(group.rank)
    if stream is not None:
        config.share = _share([infos[rank] for rank in near])
    if several:
        config.node_of = list(topology.node_of)
        config.hierarchical = (
            topology.choose(settings.routing, settings.num_experts, settings.topk) == "hierarchical"
        )
        networks = {tuple(info["network"]) for info in infos}
        keys = ucx.message_keys(infos[0]["secret"], group.rank, group.size)
        config.use_ucx(keys, loopback=len(networks) == 1)
    core = _make_and_connect(group, config, infos, near)
    if isinstance(core, _core.CpuCommunicator):
        return CpuBackend(core), topology
    assert stream is not None
    blocks = config.num_sms + (config.plan_stream != 0)
    free_sms = _count_blocks(settings, infos[group.rank], blocks)
    in_step = isinstance(group, ThreadGroup) and not group.run_ahead
    return CudaBackend(core, stream, free_sms, in_step), topology


def _make_and_connect(
    group: Group, config: _core.Config, infos: list[dict[str, Any]], near: list[int]
) -> _core.Communicator:
    on_gpu = "uuid" in infos[group.rank]
    error: Exception | None = None
    core: _core.Communicator | None = None
    address = None
    try:
        if on_gpu:
            for uuid in {infos[rank]["uuid"] for rank in near}:
                cuda._cuda.require_peer_access(config.device, uuid)
            core = cuda._cuda.make_communicator(config)
        else:
            core = _core.CpuCommunicator(config)
        address = core.address()
    except (RuntimeError, MemoryError) as e:
        error = e
    addresses = _gather(group, error, address)
    assert core is not None
    try:
        if on_gpu:
            addresses = exchange_fds(group, addresses, near, max(config.timeout, _LEAST_START))
            try:
                core.connect(addresses)
            finally:
                close_fds(addresses, near)  # what is mapped stays
        else:
            core.connect(addresses)
    except (RuntimeError, OSError) as e:
        error = e
    _gather(group, error, None)
    return core


def _count_blocks(settings: Settings, facts: dict[str, Any], blocks: int) -> Callable[[], None]:
    """Warn if all communicators of this process do not fit on the GPU; returns what to call at the end."""
    if settings.partition is not None:
        return lambda: None
    return of_this_process.add(facts["uuid"], str(settings.device), blocks, facts["sms"], stacklevel=_USER)


def _prepare_cpu(
    group: Group, settings: Settings, infos: list[dict[str, Any]]
) -> tuple[_core.Config, torch.cuda.Stream | None]:
    beside = [rank for rank, info in enumerate(infos) if info["host"] == infos[group.rank]["host"]]
    cores = len(set().union(*(infos[rank]["cpus"] for rank in beside)))
    partition = settings.partition
    share = cores // (2 * len(beside)) if partition is None else partition.comm // len(beside)
    workers = settings.num_sms or max(1, share)
    everyones = _gather(group, None, workers)
    threads = sum(everyones[rank] for rank in beside)
    config = _config(group, settings, workers, threads > cores)
    if partition is not None:
        config.cores = partition.comm_cores
    return config, None


def _prepare_cuda(
    group: Group, settings: Settings, infos: list[dict[str, Any]]
) -> tuple[_core.Config, torch.cuda.Stream | None]:
    mine = infos[group.rank]
    beside = [
        i for i in infos if (i["pid"], i["host"], i["uuid"]) == (mine["pid"], mine["host"], mine["uuid"])
    ]
    partition = settings.partition
    there_are = mine["sms"] if partition is None else partition.comm
    blocks = settings.num_sms or _default_blocks(group, settings, mine, len(beside))
    wanted = _gather(group, None, (mine["pid"], mine["uuid"], blocks))
    together = sum(n for pid, uuid, n in wanted if (pid, uuid) == (mine["pid"], mine["uuid"]))
    error: Exception | None = None
    config = _config(group, settings, blocks, crowded=False)
    config.device, config.spin = settings.device.index, _SPIN_GPU
    if together > there_are:
        place = "it has" if partition is None else "its partition has for communication"
        error = ValueError(
            f"num_sms of the {len(beside)} ranks on this GPU add up to {together}, but {place} {there_are} "
            "SMs, and all blocks must run at once"
        )
    else:
        try:
            _give_streams(config, partition)
        except RuntimeError as e:
            error = e
    if together + len(beside) > there_are:
        config.plan_stream = 0  # no SM is left for plans beside rows: see csrc/cuda/plan.cuh
    _gather(group, error, None)
    return config, torch.cuda.ExternalStream(config.stream, settings.device)


def _give_streams(config: _core.Config, partition: SMPartition | None) -> None:
    """Streams that the communicator has to itself, on the partition's SMs for communication."""
    if partition is None:
        cuda._cuda.give_streams(config, None)
    else:
        partition.give_streams(config)


def _default_blocks(group: Group, settings: Settings, facts: dict[str, Any], ranks_on_device: int) -> int:
    """What the performance model proposes; in a partition all of it, shared by the ranks on the GPU."""
    if settings.partition is not None:
        return max(1, settings.partition.comm // ranks_on_device)
    return default_num_sms(
        name=facts["name"],
        sms=facts["sms"],
        ranks=group.size,
        max_tokens=settings.max_tokens,
        hidden=settings.hidden,
        itemsize=settings.dtype.itemsize,
        topk=settings.topk,
        experts=settings.num_experts,
        ranks_on_device=ranks_on_device,
    )


def _share(infos: list[dict[str, Any]]) -> str:
    """How device memory goes from process to process on a node: what all its ranks can do."""
    if any(info["host"] != infos[0]["host"] for info in infos):
        return "fabric"
    return "fd" if all(info["shares_fds"] for info in infos) else "none"


def _facts(settings: Settings) -> dict[str, Any]:
    """What the others must know of this rank's device."""
    if settings.device.type == "cpu":
        return {"cpus": sorted(os.sched_getaffinity(0))}
    p = cuda.properties(settings.device)
    return {
        "name": p.name,
        "uuid": p.uuid,
        "sms": p.sms,
        "shares_fds": p.shares_fds,
        "domain": p.domain,
    }


def _config(group: Group, settings: Settings, num_sms: int, crowded: bool) -> _core.Config:
    config = _core.Config()
    config.rank, config.size = group.rank, group.size
    config.experts, config.hidden, config.topk = (
        settings.num_experts,
        settings.hidden,
        settings.topk,
    )
    config.max_tokens, config.capacity = settings.max_tokens, settings.capacity_on(group.size)
    config.dtype = CORE_DTYPES[settings.dtype]
    config.slots, config.num_sms, config.timeout = settings.slots, num_sms, settings.timeout
    config.link_gbps = settings.link_gbps or 0.0
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


def own_place() -> dict[str, Any]:
    """Of this process: "host" has in common who can open each other's memory through /proc, "network" who has
    the same interfaces; and the host's name."""
    with open("/proc/sys/kernel/random/boot_id") as f:
        boot = f.read().strip()
    return {
        "host": (boot, os.readlink("/proc/self/ns/pid")),
        "network": (boot, os.readlink("/proc/self/ns/net")),
        "host_name": socket.gethostname(),
    }


def _shared(settings: Settings, error: Exception | None) -> dict[str, Any]:
    return {"shared": {} if error else settings.shared()}


def _topology(infos: list[dict[str, Any]], settings: Settings) -> Topology:
    # GPUs of one NVLink domain map each other's memory across hosts. All of them or none: a rank outside has
    # only the network to reach the others, and those of its host should stay together then.
    domains = {info.get("domain", "") for info in infos}
    one = len(domains) == 1 and "" not in domains
    hosts = ["domain" if one else info["host"] for info in infos]
    return find_topology(hosts, [info["host_name"] for info in infos], node_size(settings.ranks_per_node))


def _why_unreachable(settings: Settings) -> Exception | None:
    """Why this rank cannot reach other nodes."""
    if settings.link_gbps is not None:
        return ValueError(
            "link_gbps limits the memory that ranks of one node share, and these are several nodes"
        )
    try:
        ucx.load()
    except CommError as error:
        return error
    return None
