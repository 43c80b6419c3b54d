"""Start-up: ranks compare their settings, and share a communicator or map each other's memory for one."""

from __future__ import annotations

import itertools
import os
import socket
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from commlib import _core
from commlib.communicator import Attachment, Communicator, attach_in
from commlib.devices import Backend, Platform, Wish, default_device, platform_of, resolve
from commlib.devices.base import Facts
from commlib.errors import CommError, ConfigMismatch, PeerTimeout
from commlib.formats import CORE_DTYPES
from commlib.model import goes_direct
from commlib.settings import Settings
from commlib.startup import ucx
from commlib.startup.conversation import Conversation, about_absent, gather
from commlib.startup.fd_exchange import Address, close_fds, exchange_fds
from commlib.startup.group import Group, ThreadGroup
from commlib.startup.topology import Topology, find_topology, node_size
from commlib.team import Team, find_team, keep_team
from commlib.version import __version__

_DEFAULT_TIMEOUT = 600.0  # seconds: a checkpoint or a compilation on one rank takes minutes


def resolve_device(device: torch.device | str | None, group: Group) -> torch.device:
    """The device that ``ExpertParallel(device=...)`` means: with an index where it is a CUDA device.

    Raises:
        ValueError, TypeError: it names no device.
    """
    return resolve(group.device or default_device() if device is None else device)


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
    mine = attach_in(team, settings) if team else None
    if team and (known := team.communicators):
        talk.watch = partial(known[-1].core.absence_of, departed_too=False)  # it may make another
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
    team: Team[Communicator] | None,
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
    talk: Conversation,
    settings: Settings,
    timeout: float | None,
    infos: list[Facts],
    team: Team[Communicator],
) -> Attachment:
    team.check_timeout(timeout)
    settings = settings.with_groups(talk.size, _goes_direct(settings, infos, talk.size))
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


def _agreed(infos: list[Facts], what: str) -> bool:
    """Whether all ranks have it, and the same one."""
    return infos[0][what] is not None and all(info[what] == infos[0][what] for info in infos)


def _introduce(talk: Conversation, settings: Settings, more: dict[str, Any]) -> list[Facts]:
    """What all ranks say of themselves, by rank; their settings agree."""
    told = {"pid": os.getpid(), "secret": os.urandom(32).hex(), "name": os.urandom(16).hex()}
    told["limit"] = settings.link_gbps
    mine = (
        platform_of(settings.device).facts(settings.device)
        | own_place()
        | told
        | more
        | {"shared": settings.shared() | _build(settings)}
    )
    infos = gather(talk, "settings", mine)
    _compare([_shared_of(info, rank) for rank, info in enumerate(infos)])
    return infos


def _connect(
    talk: Conversation, settings: Settings, infos: list[Facts], team: Team[Communicator]
) -> tuple[Backend, Topology]:
    """The connected backend of this rank, and where all ranks are."""
    topology = _topology(infos, settings)
    several = len(topology.hosts) > 1
    if several:
        _require_network(settings)
    platform, wish = platform_of(settings.device), _wish(settings, talk.group)
    config = _config(talk, settings)
    platform.configure(config, wish, infos, partial(gather, talk))
    config.team = team.core
    if several:
        config.net.node_of = list(topology.node_of)
        config.net.hierarchical = (
            topology.choose(settings.routing, settings.num_experts, settings.topk) == "hierarchical"
        )
        networks = {info["network"] for info in infos}
        keys = ucx.message_keys(infos[0]["secret"], talk.rank, talk.size)
        config.use_ucx(keys, loopback=len(networks) == 1)
    core = _make_and_connect(talk, platform, config, infos, topology.near(talk.rank))
    backend = platform.backend(core, config, wish, infos[talk.rank])
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
    team: Team[Communicator],
    settings: Settings,
    before: Backend,
) -> Backend:
    """A backend for other settings, of ranks that have one; every rank calls it at the same operation.

    Other communicators of the group may do so meanwhile, in other threads, and in another order on each rank.

    Args:
        started: the name of the conversation in which they started; "" where the group knows no names.
        counts: numbers of the times they have done this.
        team: of the ranks.
        settings: with more room.
        before: the present backend, whose core knows which processes are gone.
    """
    name = started and f"{started}/grown/{next(counts)}"
    with group.converse(settings.timeout, name) as talk:
        talk.task, talk.advice = "take a larger heap", "ep.timeout allows more time"
        talk.watch = watch = partial(before.core.absence_of, departed_too=True)
        try:
            infos = _introduce(talk, settings, {})
            before.make_way()
            return _connect(talk, settings, infos, team)[0]
        except PeerTimeout:
            raise
        except CommError as error:  # what a rank had cannot be found once it is gone
            if error.peers or not (absent := about_absent(range(talk.size), watch)):
                raise
            text, blamed = absent
            raise PeerTimeout(f"{text} ({error})", talk.rank, blamed, "dispatch", "larger heap", 0) from error


def _make_and_connect(
    talk: Conversation, platform: Platform, config: _core.Config, infos: list[Facts], near: list[int]
) -> _core.Communicator:
    core = platform.connectable(config, [infos[rank] for rank in near])
    addresses = [_to_address(said) for said in gather(talk, "addresses", _from_address(core.address()))]
    if not platform.exchanges_fds:
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
        raise CommError(f"at step addresses: {str(said)[:80]} is no address") from None


def _wish(settings: Settings, group: Group) -> Wish:
    return Wish(
        settings.device,
        settings.num_sms,
        None if settings.partition is None else settings.partition.share,
        settings.dtype.itemsize,
        in_step=isinstance(group, ThreadGroup) and not group.run_ahead,
    )


def _config(group: Group, settings: Settings) -> _core.Config:
    """What a communicator is made with, wherever it runs."""
    config = _core.Config()
    config.rank, config.size = group.rank, group.size
    config.experts, config.hidden, config.topk = (
        settings.num_experts,
        settings.hidden,
        settings.topk,
    )
    config.max_tokens, config.capacity = settings.max_tokens, settings.capacity_on(group.size)
    config.grouped_rows = settings.grouped_rows
    config.dtype = CORE_DTYPES[settings.dtype]
    config.slots = settings.slots_on(group.size)
    config.timeout = settings.timeout
    config.link_gbps = settings.link_gbps or 0.0
    return config


def _goes_direct(settings: Settings, infos: list[Facts], size: int) -> bool:
    """Whether rows grouped by expert go straight to their places: from the same facts, on all ranks alike."""
    if settings.grouping == "once" or len(_topology(infos, settings).hosts) > 1:
        return False
    if settings.grouping == "direct":
        return True
    platform, routing = platform_of(settings.device), settings.uniform_routing(size)
    alone = len({info["place"] for info in infos}) == 1

    def is_better(info: Facts) -> bool:
        rates = platform.rates(info, alone)
        if rates is None:
            return False
        memory, *links = (*rates, info["limit"])
        link = min((gbps for gbps in links if gbps is not None), default=None)
        return goes_direct(routing, memory_gbps=memory, link_gbps=link)

    return all(map(is_better, infos))


def _build(settings: Settings) -> dict[str, Any]:
    """Which commlib this is: its version, and its modules' sources as setup.py recorded them."""
    modules = platform_of(settings.device).modules()
    return {"build": " ".join([__version__, *map(_sources_of, modules)])}


def _sources_of(module: Any) -> str:
    record = Path(module.__file__).with_suffix(".sources")
    return record.read_text().strip() if record.exists() else "unknown"


def _shared_of(info: Any, rank: int) -> dict[str, Any]:
    """The part of a rank's information that must be equal on all."""
    shared = info.get("shared") if isinstance(info, dict) else None
    if not isinstance(shared, dict):
        raise CommError(
            f"at step settings: rank {rank} said {str(info)[:80]}. Is it of another version of commlib?",
            peers=[rank],
        )
    return shared


def _compare(shared: list[Facts]) -> None:
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


def _topology(infos: list[Facts], settings: Settings) -> Topology:
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
