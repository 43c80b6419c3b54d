"""``commlib bench --calibrate``: measure a machine for commlib.model.

One rank has all the tokens, so that its SMs (or threads) do all the work and nothing competes with them; they
send to all ranks, so that a row goes to as many places as in real use.
"""

from __future__ import annotations

import argparse
import datetime
import statistics
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import commlib
from commlib._core import Placement
from commlib.arguments import as_int
from commlib.cli.measuring import (
    Clock,
    HostClock,
    clock_for,
    cpu_model,
    host_facts,
    let_ranks_share_a_gpu,
    usable_cores,
)
from commlib.devices import cuda
from commlib.model import Hardware
from commlib.model.presets import measured_path, preset_for
from commlib.startup.group import Group, SingleGroup, resolve_group

_WARMUP = 2
_MEASURED = ("sms", "memory_gbps", "dispatch_sm_gbps", "combine_sm_gbps", "latency_us", "tflops")


@dataclass(frozen=True)
class Plan:
    """What is measured."""

    device: str
    ranks: int
    tokens: int
    hidden: int
    topk: int
    experts: int
    num_sms: tuple[int, ...]
    iters: int
    copy_mib: int
    matmul: int

    @staticmethod
    def of(args: argparse.Namespace) -> Plan:
        """What the command line asks for.

        Raises:
            ValueError: a number that makes no sense; the text names it.
        """
        let_ranks_share_a_gpu()
        device = args.device or ("cuda" if cuda.is_available() else "cpu")
        gpu = device == "cuda"
        if gpu:
            cuda.require()
        for name in ("ranks", "tokens", "hidden", "topk", "experts", "iters", "copy_mib", "matmul"):
            if getattr(args, name) is not None:
                as_int(name, getattr(args, name), 1)
        tried = args.num_sms or ([1, 2, 4, 8, 16] if gpu else sorted({1, min(2, usable_cores())}))
        most = cuda.properties().sms // args.ranks if gpu else 1024
        num_sms = tuple(sorted(n for n in tried if 1 <= n <= most))
        if not num_sms:
            raise ValueError(f"--num-sms must lie in [1, {most}] for {args.ranks} ranks, got {tried}")
        return Plan(
            device=device,
            ranks=args.ranks,
            tokens=args.tokens or (4096 if gpu else 512),
            hidden=args.hidden,
            topk=args.topk,
            experts=args.experts,
            num_sms=num_sms,
            iters=args.iters,
            copy_mib=args.copy_mib or (1024 if gpu else 256),
            matmul=args.matmul or (8192 if gpu else 1024),
        )


@dataclass(frozen=True)
class Samples:
    """Seconds of rank 0, or of all where they share a GPU, by number of SMs, and the rows of each time."""

    tokens: int
    rows: int  # (token, rank) pairs
    dispatch: dict[int, list[float]]
    combine: dict[int, list[float]]
    dispatch_one: dict[int, list[float]]  # one token: the time that an operation takes anyway
    combine_one: dict[int, list[float]]

    def memory_gbps(self, row_bytes: int) -> float:
        """The highest rate at which any operation read and wrote."""
        rates = [self.gbps(op, n, row_bytes) for op in ("dispatch", "combine") for n in self.dispatch]
        return max(rates) * (self.tokens + self.rows) / self.rows

    def gbps(self, operation: str, num_sms: int, row_bytes: int) -> float:
        """Rows' bytes over the time that they add to an operation."""
        anyway = min(getattr(self, f"{operation}_one")[num_sms])
        seconds = statistics.median(getattr(self, operation)[num_sms]) - anyway
        if seconds <= 0:
            raise ValueError(f"{self.rows} rows are too few to measure {operation}: give more --tokens")
        return self.rows * row_bytes / seconds / 1e9


def calibrate(plan: Plan, out: Path | None) -> None:
    """Measure, print and write. Under a launcher all ranks call it, and rank 0 prints and writes."""
    launched = resolve_group()
    if launched.size > 1:
        samples = _measure_rank(plan)
    else:
        samples = commlib.run_ranks(
            lambda _: _measure_rank(plan), plan.ranks, device=plan.device, run_ahead=True
        )[0]
    if launched.rank == 0:
        copies, products = _plain_copies(plan), _products(plan)
        hardware = _hardware(plan, samples, copies, products)
        path = out or measured_path(hardware.name)
        record: dict[str, Any] = {
            "machine": host_facts(),
            "plan": asdict(plan),
            "launched_ranks": launched.size,
            "samples_s": asdict(samples),
            "copy_s": copies,
            "matmul_s": products,
        }
        hardware.save(path, record)
        _report(plan, samples, hardware, path)


def _hardware(
    plan: Plan, samples: Samples, copies: dict[str, list[float]], products: list[float]
) -> Hardware:
    name, sms = _device_facts(plan.device)
    first = plan.num_sms[0]
    row_bytes = 2 * plan.hidden
    latency = statistics.mean(
        statistics.median(one[first]) for one in (samples.dispatch_one, samples.combine_one)
    )
    copy = 2 * (plan.copy_mib << 20) / statistics.median(copies["all"]) / 1e9
    link, network, sources = _preset_links(plan, name)
    here = dict.fromkeys(_MEASURED, f"commlib bench --calibrate, {datetime.date.today()}")
    return Hardware(
        name=name,
        sms=sms,
        memory_gbps=max(copy, samples.memory_gbps(row_bytes)),
        link_gbps=link,
        network_gbps=network,
        dispatch_sm_gbps=samples.gbps("dispatch", first, row_bytes) / first,
        combine_sm_gbps=samples.gbps("combine", first, row_bytes) / first,
        latency_us=latency * 1e6,
        tflops=2 * plan.matmul**3 / statistics.median(products) / 1e12,
        sources={**here, **sources},
    )


def _preset_links(plan: Plan, name: str) -> tuple[float | None, float | None, dict[str, str]]:
    """Rates that cannot be measured here: a host has no link, and in-process ranks share one GPU."""
    known = preset_for(name) if plan.device == "cuda" else None
    if known is None:
        return None, None, {"link_gbps": "none", "network_gbps": "none"}
    sources = {rate: f"preset {known.name}: {known.sources[rate]}" for rate in ("link_gbps", "network_gbps")}
    return known.link_gbps, known.network_gbps, sources


# -- what every rank does ------------------------------------------------------------------------------------


def _measure_rank(plan: Plan) -> Samples:
    group = resolve_group()
    clock = clock_for(group, plan.device)
    sends = group.rank == 0
    generator = torch.Generator().manual_seed(0)
    chosen = torch.rand(plan.tokens, plan.experts, generator=generator).topk(plan.topk, dim=1).indices
    many, one = (_Job.of(plan, chosen[: n if sends else 0]) for n in (plan.tokens, 1))
    samples = Samples(plan.tokens, _count_rows(chosen, plan.experts, group.size), {}, {}, {}, {})
    with torch.no_grad():
        for n in plan.num_sms:
            with _communicator(plan, group, n) as ep:
                samples.dispatch_one[n], samples.combine_one[n] = _times(plan, ep, clock, one)
                samples.dispatch[n], samples.combine[n] = _times(plan, ep, clock, many)
    return samples


@dataclass(frozen=True)
class _Job:
    x: Tensor
    topk_idx: Tensor

    @staticmethod
    def of(plan: Plan, topk_idx: Tensor) -> _Job:
        x = torch.ones(len(topk_idx), plan.hidden, dtype=torch.bfloat16, device=plan.device)
        return _Job(x, topk_idx.to(plan.device))


def _communicator(plan: Plan, group: Group, num_sms: int) -> commlib.ExpertParallel:
    return commlib.ExpertParallel(
        group,
        num_experts=plan.experts,
        hidden=plan.hidden,
        topk=plan.topk,
        max_tokens=plan.tokens,
        capacity=plan.tokens,  # one rank sends
        device=plan.device,
        num_sms=num_sms,
    )


def _times(
    plan: Plan, ep: commlib.ExpertParallel, clock: Clock, job: _Job
) -> tuple[list[float], list[float]]:
    """Seconds of dispatch and of combine on this rank."""
    pairs = [_round_trip(ep, clock, job) for _ in range(_WARMUP + plan.iters)][_WARMUP:]
    return [dispatch for dispatch, _ in pairs], [combine for _, combine in pairs]


def _round_trip(ep: commlib.ExpertParallel, clock: Clock, job: _Job) -> tuple[float, float]:
    dispatch, d = clock.timed(lambda: ep.dispatch(job.x, job.topk_idx, zero_copy=True))
    y = ep.combine_buffer(d.handle).fill_(1.0)
    combine, _ = clock.timed(lambda: ep.combine(y, d.handle))
    return dispatch, combine


def _count_rows(topk_idx: Tensor, experts: int, ranks: int) -> int:
    """(token, rank) pairs."""
    owner = torch.tensor(Placement(experts, ranks).owners)[topk_idx]
    goes = torch.zeros(len(topk_idx), ranks, dtype=torch.bool)
    return int(goes.scatter_(1, owner, True).sum())


# -- what one rank does alone --------------------------------------------------------------------------------


def _plain_copies(plan: Plan) -> dict[str, list[float]]:
    """Seconds of a copy: by one thread (CPU), and by all threads or SMs."""
    source = torch.ones(plan.copy_mib << 20, dtype=torch.uint8, device=plan.device)
    target = torch.empty_like(source)
    everything = {"all": usable_cores()}
    if plan.device == "cpu":
        everything = {"one thread": 1, **everything}
    found = {}
    for name, threads in everything.items():
        with _threads(threads):
            found[name] = _repeated(plan, lambda: target.copy_(source))
    return found


def _products(plan: Plan) -> list[float]:
    """Seconds of a bf16 matrix product on all cores or SMs."""
    a = torch.ones(plan.matmul, plan.matmul, dtype=torch.bfloat16, device=plan.device)
    with _threads(usable_cores()):
        return _repeated(plan, lambda: a @ a)


def _repeated(plan: Plan, operation: Callable[[], Any]) -> list[float]:
    clock = HostClock(SingleGroup(), plan.device)
    return [clock.timed(operation)[0] for _ in range(_WARMUP + plan.iters)][_WARMUP:]


@contextmanager
def _threads(count: int) -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _device_facts(device: str) -> tuple[str, int]:
    """Name, and SMs or cores."""
    if device == "cuda":
        facts = cuda.properties()
        return facts.name, facts.sms
    return cpu_model(), usable_cores()


def _report(plan: Plan, samples: Samples, hardware: Hardware, path: Path) -> None:
    unit = "SMs" if plan.device == "cuda" else "threads"
    print(f"{hardware.name}: {hardware.sms} {'SMs' if plan.device == 'cuda' else 'cores'}")
    for n in plan.num_sms:
        rates = (samples.gbps(op, n, 2 * plan.hidden) for op in ("dispatch", "combine"))
        print(f"  {n:4} {unit}: dispatch {next(rates):7.2f}, combine {next(rates):7.2f} GB/s")
    for name in ("memory_gbps", "dispatch_sm_gbps", "combine_sm_gbps", "latency_us", "tflops", "link_gbps"):
        value = getattr(hardware, name)
        print(f"  {name:17} {'none' if value is None else format(value, '.4g'):>8}  {hardware.sources[name]}")
    print(f"written: {path}")
