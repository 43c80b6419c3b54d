"""Start-up: ranks compare their settings, and share a communicator or map each other's memory for one."""

from __future__ import annotations

import itertools
import os
import socket
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

import commlib
from commlib import _core, cuda, ucx
from commlib.backend import Backend, CpuBackend, CudaBackend
from commlib.communicator import Attachment, Communicator
from commlib.conversation import Conversation, exited, gather
from commlib.errors import CommError, ConfigMismatch, PeerTimeout
from commlib.fd_exchange import Address, close_fds, exchange_fds
from commlib.group import Group, ThreadGroup
from commlib.model import default_num_sms
from commlib.partition import SMPartition
from commlib.residency import of_this_process
from commlib.settings import CORE_DTYPES, Settings
from commlib.team import Team, find_team, keep_team
from commlib.topology import Topology, find_topology, node_size

# With a core for each thread, a peer answers within microseconds. With more threads than cores it may need
# the very core that a spinning thread holds: yield soon, then sleep. See docs/decisions/protocol.md.
_SPIN_OWN_CORE = _core.SpinPolicy(pauses=4000, yields=50)
_SPIN_SHARED_CORE = _core.SpinPolicy(pauses=50, yields=5)
# For a kernel: a sleep costs at least 50 µs, and what the host waits for comes within milliseconds.
_SPIN_GPU = _core.SpinPolicy(pauses=2000, yields=50_000)
_USER = 7  # frames from _count_blocks to the caller of ExpertParallel, where a warning points
_DEFAULT_TIMEOUT = 600.0  # seconds: a checkpoint or a compilation on one rank takes minutes


def resolve_device(device: Any, group: Group) -> torch.device:
    """The device that ``ExpertParallel(device=...)`` means: with an index where it is a CUDA device.

    Raises:
        ValueError, TypeError: it names no device.
    """
    if device is None:
        device = group.device or ("cuda" if cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f'device must be "cpu", "cuda" or "cuda:i", got {device!r}: {error}') from None
    if resolved.type == "cpu":
        return torch.device("cpu")
    if resolved.type != "cuda" or resolved.index is not None or not cuda.is_available():
        return resolved
    return torch.device("cuda", cuda.device_index())


def attach(talk: Conversation, settings: Settings, timeout: float | None) -> Attachment:
    """A part in the communicator that all ranks have for these settings, or else in a new one.

    Every rank calls it, in a conversation that tells the others if one fails. Whether they have one is
    agreed: garbage is collected, and failures are heard of, at different times on different ranks.

    Args:
        talk: of the ranks.
        settings: all but the timeout.
        timeout: seconds that a rank waits for a peer; None: the team's, 600 for a new one.
    """
    team = None if settings.exclusive else find_team(talk.group, settings.device)
    mine = team.attach(settings) if team else None
    if team and (known := team.communicators):
        talk.watch = known[-1].core.has_exited
    try:
        return _join_or_make(talk, settings, timeout, team, mine)
    except BaseException:
        if mine is not None:
            mine.close()  # not only when the exception goes, which may be kept
        raise


def _join_or_make(
    talk: Conversation,
    settings: Settings,
    timeout: float | None,
    team: Team | None,
    mine: Attachment | None,
) -> Attachment:
    have = {
        "team": team.uid if team else None,
        "communicator": mine.communicator.uid if mine else None,
        "callers": mine.communicator.callers if mine else 0,
    }
    infos = _introduce(talk, settings, have)
    if team is None or not _agreed(infos, "team"):
        team = Team(infos[0]["name"], _DEFAULT_TIMEOUT if timeout is None else timeout)
    if mine is None or not _agreed(infos, "communicator"):
        if mine is not None:
            mine.close()
        return _attach_to_new(talk, replace(settings, timeout=team.timeout), timeout, infos, team)
    team.check_timeout(timeout)
    gather(talk, "ready", None)
    talk.over = True
    mine.agree(max(int(info["callers"]) for info in infos) + 1)
    return mine


def _attach_to_new(
    talk: Conversation, settings: Settings, timeout: float | None, infos: list[dict[str, Any]], team: Team
) -> Attachment:
    team.check_timeout(timeout)
    backend, topology = _connect(talk, settings, infos, team)
    anew = partial(_reconnect, talk.group, talk.name, itertools.count(), team)
    communicator = Communicator(
        talk.rank, talk.size, settings, team, infos[0]["name"], backend, topology, anew
    )
    team.add(communicator)
    if not settings.exclusive:
        keep_team(talk.group, settings.device, team)
    attachment = Attachment(communicator)
    attachment.agree(1)
    return attachment


def _agreed(infos: list[dict[str, Any]], what: str) -> bool:
    """Whether all ranks have it, and the same one."""
    return infos[0][what] is not None and all(info[what] == infos[0][what] for info in infos)


def _introduce(talk: Conversation, settings: Settings, more: dict[str, Any]) -> list[dict[str, Any]]:
    """What all ranks say of themselves, by rank; their settings agree."""
    told = {"pid": os.getpid(), "secret": os.urandom(32).hex(), "name": os.urandom(16).hex()}
    mine = _facts(settings) | own_place() | told | more | {"shared": settings.shared() | _build(settings)}
    infos = gather(talk, "settings", mine)
    _compare([_shared_of(info, rank) for rank, info in enumerate(infos)])
    return infos


def _connect(
    talk: Conversation, settings: Settings, infos: list[dict[str, Any]], team: Team
) -> tuple[Backend, Topology]:
    """The connected backend of this rank, and where all ranks are."""
    topology = _topology(infos, settings)
    several = len(topology.hosts) > 1
    if several:
        _require_network(settings)
    prepare = _prepare_cuda if settings.device.type == "cuda" else _prepare_cpu
    config, stream = prepare(talk, settings, infos)
    config.team = team.core
    near = topology.near(talk.rank)
    if stream is not None:
        config.share = _share([infos[rank] for rank in near])
    if several:
        config.net.node_of = list(topology.node_of)
        config.net.hierarchical = (
            topology.choose(settings.routing, settings.num_experts, settings.topk) == "hierarchical"
        )
        networks = {info["network"] for info in infos}
        keys = ucx.message_keys(infos[0]["secret"], talk.rank, talk.size)
        config.use_ucx(keys, loopback=len(networks) == 1)
    core = _make_and_connect(talk, config, infos, near)
    backend: Backend
    if isinstance(core, _core.CpuCommunicator):
        backend = CpuBackend(core)
    else:
        assert stream is not None
        blocks = config.num_sms + (config.plan_stream != 0)
        free_sms = _count_blocks(settings, infos[talk.rank], blocks)
        in_step = isinstance(talk.group, ThreadGroup) and not talk.group.run_ahead
        backend = CudaBackend(core, stream, free_sms, in_step)
    try:
        gather(talk, "ready", None)
    except BaseException:
        backend.close()
        raise
    talk.over = True  # from here on the communicator reports failures
    return backend, topology


def _reconnect(
    group: Group,
    started: str,
    counts: Iterator[int],
    team: Team,
    settings: Settings,
    core: _core.Communicator,
) -> Backend:
    """A backend for other settings, of ranks that have one; every rank calls it at the same operation.

    Other communicators of the group may do so meanwhile, in other threads, and in another order on each rank.

    Args:
        started: the name of the conversation in which they started; "" where the group knows no names.
        counts: numbers of the times they have done this.
        team: of the ranks.
        settings: with more room.
        core: the present backend's, which knows whose processes are gone.
    """
    name = started and f"{started}/grown/{next(counts)}"
    with group.converse(settings.timeout, name) as talk:
        talk.task, talk.advice = "take a larger heap", "ep.timeout allows more time"
        talk.watch = core.has_exited
        try:
            return _connect(talk, settings, _introduce(talk, settings, {}), team)[0]
        except PeerTimeout:
            raise
        except CommError as error:  # what a rank had cannot be found once it is gone
            gone = [rank for rank in range(talk.size) if core.has_exited(rank)]
            if not gone:
                raise
            text = f"{exited(gone)} ({error})"
            raise PeerTimeout(text, talk.rank, gone, "dispatch", "larger heap", 0) from error


def _make_and_connect(
    talk: Conversation, config: _core.Config, infos: list[dict[str, Any]], near: list[int]
) -> _core.Communicator:
    on_gpu = "uuid" in infos[talk.rank]
    core: _core.Communicator
    if on_gpu:
        for uuid in {infos[rank]["uuid"] for rank in near}:
            cuda._cuda.require_peer_access(config.device, uuid)
        core = cuda._cuda.make_communicator(config)
    else:
        core = _core.CpuCommunicator(config)
    addresses = [_to_address(said) for said in gather(talk, "addresses", _from_address(core.address()))]
    if not on_gpu:
        _open(core, addresses, talk)
        return core
    addresses = exchange_fds(talk, addresses, near, talk.left)
    try:
        _open(core, addresses, talk)
    finally:
        close_fds(addresses, near)  # mappings stay
    return core


def _open(core: _core.Communicator, addresses: list[Address], talk: Conversation) -> None:
    """Map the others' memory. A rank that has failed meanwhile, taking its memory with it, has said why."""
    try:
        core.connect(addresses)
    except RuntimeError as error:
        talk.hear()
        raise CommError(str(error)) from error


def _from_address(address: Address) -> list[Any]:
    """An address in a form that JSON has."""
    *numbers, handle, net = address
    return [*numbers, handle.hex(), net.hex()]


def _to_address(said: Any) -> Address:
    try:
        pid, fd, workers, handle, net = said
        return int(pid), int(fd), int(workers), bytes.fromhex(handle), bytes.fromhex(net)
    except (TypeError, ValueError):
        raise CommError(f"addresses: {str(said)[:80]} is no address") from None


def _count_blocks(settings: Settings, facts: dict[str, Any], blocks: int) -> Callable[[], None]:
    """Warn if all communicators of this process do not fit on the GPU; returns what to call at the end."""
    if settings.partition is not None:
        return lambda: None
    return of_this_process.add(facts["uuid"], str(settings.device), blocks, facts["sms"], stacklevel=_USER)


def _prepare_cpu(
    talk: Conversation, settings: Settings, infos: list[dict[str, Any]]
) -> tuple[_core.Config, torch.cuda.Stream | None]:
    beside = [rank for rank, info in enumerate(infos) if info["host"] == infos[talk.rank]["host"]]
    cores = len(set().union(*(infos[rank]["cpus"] for rank in beside)))
    partition = settings.partition
    share = cores // (2 * len(beside)) if partition is None else partition.comm // len(beside)
    workers = settings.num_sms or max(1, share)
    everyones = gather(talk, "threads", workers)
    threads = sum(everyones[rank] for rank in beside)
    config = _config(talk, settings, workers, threads > cores)
    if partition is not None:
        config.cores = partition.comm_cores
    return config, None


def _prepare_cuda(
    talk: Conversation, settings: Settings, infos: list[dict[str, Any]]
) -> tuple[_core.Config, torch.cuda.Stream | None]:
    mine = infos[talk.rank]
    beside = [
        i for i in infos if (i["pid"], i["host"], i["uuid"]) == (mine["pid"], mine["host"], mine["uuid"])
    ]
    partition = settings.partition
    there_are = mine["sms"] if partition is None else partition.comm
    blocks = settings.num_sms or _default_blocks(talk, settings, mine, len(beside))
    wanted = gather(talk, "SMs", (mine["pid"], mine["uuid"], blocks))
    together = sum(n for pid, uuid, n in wanted if (pid, uuid) == (mine["pid"], mine["uuid"]))
    if together > there_are:
        place = "it has" if partition is None else "its partition has for communication"
        raise ValueError(
            f"num_sms of the {len(beside)} ranks on this GPU add up to {together}, but {place} {there_are} "
            "SMs, and all blocks must run at once"
        )
    config = _config(talk, settings, blocks, crowded=False)
    config.device, config.spin = settings.device.index, _SPIN_GPU
    _give_streams(config, partition)
    if together + len(beside) > there_are:
        config.plan_stream = 0  # no SM is left for plans beside rows: see csrc/cuda/plan.cuh
    return config, torch.cuda.ExternalStream(config.stream, settings.device)


def _give_streams(config: _core.Config, partition: SMPartition | None) -> None:
    """Streams that the communicator has to itself, on the partition's SMs for communication."""
    if partition is None:
        cuda._cuda.give_streams(config, None)
    else:
        partition.give_streams(config)


def _default_blocks(group: Group, settings: Settings, facts: dict[str, Any], ranks_on_device: int) -> int:
    """What the performance model proposes; in a partition, all its SMs, shared by the ranks on the GPU."""
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
    """How processes on a node share device memory: in a way that all its ranks can."""
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
    config.slots, config.num_sms = settings.slots_on(group.size), num_sms
    config.timeout = settings.timeout
    config.link_gbps = settings.link_gbps or 0.0
    config.spin = _SPIN_SHARED_CORE if crowded else _SPIN_OWN_CORE
    return config


def _build(settings: Settings) -> dict[str, Any]:
    """Which commlib this is: its version, and its modules' sources as setup.py recorded them."""
    modules = [_core] if settings.device.type == "cpu" else [_core, cuda._cuda]
    return {"build": " ".join([commlib.__version__, *map(_sources_of, modules)])}


def _sources_of(module: Any) -> str:
    record = Path(module.__file__).with_suffix(".sources")
    return record.read_text().strip() if record.exists() else "unknown"


def _shared_of(info: Any, rank: int) -> dict[str, Any]:
    """The part of a rank's information that must be equal on all."""
    shared = info.get("shared") if isinstance(info, dict) else None
    if not isinstance(shared, dict):
        raise CommError(f"settings: rank {rank} said {str(info)[:80]}. Is it of another version of commlib?")
    return shared


def _compare(shared: list[dict[str, Any]]) -> None:
    differences = []
    for name in dict.fromkeys(name for settings in shared for name in settings):
        values: dict[Any, list[int]] = {}
        for rank, settings in enumerate(shared):
            values.setdefault(str(settings.get(name)), []).append(rank)
        if len(values) > 1:
            said = ", ".join(f"{value} on rank {_ranks(ranks)}" for value, ranks in values.items())
            advice = ": install the same commlib on all" if name == "build" else ""
            differences.append(f"{name} is {said}{advice}")
    if differences:
        raise ConfigMismatch("ranks disagree: " + "; ".join(differences))


def _ranks(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:4]))
    return shown if len(ranks) <= 4 else f"{shown} and {len(ranks) - 4} more"


def own_place() -> dict[str, Any]:
    """Where this process is: "host" is equal where processes can open each other's memory through /proc,
    "network" where they have the same interfaces; and the host's name."""
    with open("/proc/sys/kernel/random/boot_id") as f:
        boot = f.read().strip()
    return {
        "host": f"{boot} {os.readlink('/proc/self/ns/pid')}",
        "network": f"{boot} {os.readlink('/proc/self/ns/net')}",
        "host_name": socket.gethostname(),
    }


def _topology(infos: list[dict[str, Any]], settings: Settings) -> Topology:
    # GPUs of one NVLink domain map each other's memory across hosts. All of them or none: a rank outside
    # reaches the others only by the network, and then those of its host should stay together.
    domains = {info.get("domain", "") for info in infos}
    one = len(domains) == 1 and "" not in domains
    hosts = ["domain" if one else info["host"] for info in infos]
    return find_topology(hosts, [info["host_name"] for info in infos], node_size(settings.ranks_per_node))


def _require_network(settings: Settings) -> None:
    """Raise ValueError or CommError if this rank cannot reach other nodes."""
    if settings.link_gbps is not None:
        raise ValueError(
            "link_gbps limits the memory that ranks of one node share, and these are several nodes"
        )
    ucx.load()
