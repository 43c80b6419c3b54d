"""CUDA GPUs: whether and how commlib can use them here; kernels on streams, results in device memory."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from commlib import _core
from commlib.devices.base import Backend, Facts, Gather, Partition, Platform, Span, Wish
from commlib.devices.residency import of_this_process
from commlib.errors import CommError
from commlib.event import Event
from commlib.model import default_num_sms, find_hardware

if TYPE_CHECKING:
    from commlib._cuda import DeviceFacts

_SLOTS = 4  # all of their memory is taken at once
_MARGIN = 1.25  # room for grouped rows, over what is expected: routers are uneven
# A sleep of a kernel costs at least 50 µs, and what the host waits for comes within milliseconds.
_SPIN = _core.SpinPolicy(pauses=2000, yields=50_000)

_cuda: Any
try:
    _cuda = import_module("commlib._cuda")
except ImportError as error:
    _cuda = None
    _import_error = str(error)


@cache
def why_not() -> str:
    """Why there is no CUDA backend here, or an empty string if there is one."""
    if _cuda is None:
        return f"commlib was installed without its CUDA backend (no nvcc at that time): {_import_error}"
    reason = _cuda.why_not()
    if not reason and not torch.cuda.is_available():
        return "PyTorch sees no CUDA device (torch.cuda.is_available() is False)"
    return reason


def is_available() -> bool:
    """Whether tensors on CUDA devices can be dispatched and combined here."""
    return not why_not()


def properties(device: torch.device | str | int | None = None) -> DeviceFacts:
    """Facts about a device: name, uuid, sms, capability (90 for 9.0), total_memory in bytes.

    Raises:
        RuntimeError: there is no CUDA backend here; the text says why.
    """
    require()
    return _cuda.properties(device_index(device))


def require() -> None:
    """Raise RuntimeError with the reason unless the CUDA backend can be used."""
    if why_not():
        raise RuntimeError(f"CUDA is not available to commlib: {why_not()}")


@cache
def warm_up(index: int) -> None:
    """Load what, at its first use, would wait for the GPU to be idle.

    cuBLAS loads its kernels type by type, and loading waits for all kernels that run. Where ranks share the
    GPU, some of these wait for the very rank that loads. (Seen on an H100 with CUDA 13.0.)
    """
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        a = torch.ones(64, 64, dtype=dtype, device=torch.device("cuda", index))
        for product in (a @ a, a @ a.T, a.T @ a):
            product.sum()
    torch.cuda.synchronize(index)


def device_index(device: torch.device | str | int | None = None) -> int:
    """The number of a CUDA device; of the current one for None or "cuda"."""
    if isinstance(device, int):
        return device
    index = None if device is None else torch.device(device).index
    return torch.cuda.current_device() if index is None else index


class CudaEvent(Event):
    """On the communication stream of a CUDA device."""

    def __init__(
        self,
        core: _core.Communicator,
        event: torch.cuda.Event,
        device: torch.device,
        addresses: list[int],
        in_step: bool = False,
    ) -> None:
        self._core = core
        self._event = event
        self._device = device
        self._addresses = addresses  # of what the operation works on
        self._in_step = in_step  # the host waits as well

    def query(self) -> bool:
        return self._event.query()

    def wait(self) -> None:
        self._event.wait(self._using_stream())
        if _waits(self._in_step):
            self.synchronize()

    def _wait_wave(self, waves: _core.PendingDispatch, expert: int) -> None:
        stream = self._using_stream()
        self._core.wait_expert(waves, None, expert, stream.cuda_stream)
        if _waits(self._in_step):
            stream.synchronize()

    def _using_stream(self) -> torch.cuda.Stream:
        """The current stream, which from now on may use the results."""
        stream = torch.cuda.current_stream(self._device)
        self._core.note_uses(self._addresses, stream.cuda_stream)
        return stream

    def synchronize(self) -> None:
        self._core.wait_event(self._event.cuda_event)


class CudaBackend(Backend):
    """Kernels on a stream of their own: streams order everything, and the host goes on.

    With ``in_step`` the host waits: see :func:`commlib.run_ranks`.
    """

    def __init__(
        self,
        core: _core.Communicator,
        stream: torch.cuda.Stream,
        free_sms: Callable[[], None],
        in_step: bool = False,
    ) -> None:
        super().__init__(stream.device)
        self.core = core
        self.stream = stream
        self._plan_stream = torch.cuda.ExternalStream(core.plan_stream, self.device)
        self._in_step = in_step
        self._free_sms = free_sms  # called when no operation can come any more
        self._begun = torch.cuda.Event()
        self._has_graphs = False

    def is_captured(self) -> bool:
        return _is_captured()

    def held(self, keep: tuple[Any, ...], plan: tuple[Any, ...], async_op: bool) -> tuple[Any, ...] | None:
        return plan if _is_captured() else None  # else streams order the use of memory

    def close(self) -> None:
        self._follow_graphs()
        try:
            super().close()
        finally:
            self._free_sms()

    def synchronize(self) -> None:
        self._follow_graphs()
        super().synchronize()

    def _follow_graphs(self) -> None:
        """What waits for the communication stream waits for graphs that the current stream runs, too."""
        if self._has_graphs and not _is_captured():
            self.stream.wait_stream(torch.cuda.current_stream(self.device))

    def make_way(self) -> None:
        self._free_sms()

    def new_rows(self, rows: int, hidden: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(rows, hidden, dtype=dtype, device=self.device)

    def copied(self, tensor: Tensor) -> Tensor:
        with torch.cuda.stream(self.stream):
            copy = tensor.clone()
        copy.record_stream(torch.cuda.current_stream(self.device))
        return copy

    def begin_plan(self, awaited: bool) -> None:
        if not _is_captured():
            self._plan_stream.wait_stream(torch.cuda.current_stream(self.device))
        elif awaited:  # other plans are on the same stream as rows there
            raise CommError(
                "this dispatch cannot be captured in a CUDA graph, because the host reads how many rows "
                "come: capture one with bounded=True, or what follows it, with its handle"
            )

    def begin(self) -> None:
        self._has_graphs |= _is_captured()
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        if self.traces and not _is_captured():
            self._begun = _recorded(self.stream)

    def give_up(self, why: str, blamed: Sequence[int] = ()) -> None:
        super().give_up(why, blamed)
        for stream in (self._plan_stream, self.stream):
            torch.cuda.current_stream(self.device).wait_stream(stream)

    def end(
        self, name: str, ticket: _core.Ticket | None, keep: tuple[Any, ...], async_op: bool
    ) -> Event | None:
        if self.traces and not _is_captured():  # each run of a graph has its own times
            begun, ended = self._begun, _recorded(self.stream)
            for trace in self.traces:
                trace.notes.append((name, self.span(trace.zero, begun, ended)))
        current = torch.cuda.current_stream(self.device)
        tensors = [t for t in keep if isinstance(t, Tensor) and t.is_cuda]
        addresses = [t.data_ptr() for t in tensors]
        # For those in slots, which record_stream knows nothing of.
        self.core.note_uses(addresses, current.cuda_stream)
        if not async_op:
            # The current stream waits here, so memory that it gives back is not reused too early.
            current.wait_stream(self.stream)
            if _waits(self._in_step):  # for this alone: what was wrong with a bounded one a later call tells
                ended = _recorded(self.stream)
                self.core.wait_event(ended.cuda_event)
            return None
        for tensor in tensors:
            tensor.record_stream(self.stream)
        event = self.stream.record_event()
        return CudaEvent(self.core, event, self.device, addresses, in_step=self._in_step)

    def done(self) -> Event:
        event = torch.cuda.current_stream(self.device).record_event()
        return CudaEvent(self.core, event, self.device, [], self._in_step)

    def record_stream(self, tensor: Tensor, stream: torch.cuda.Stream) -> None:
        self.core.note_uses([tensor.data_ptr()], stream.cuda_stream)
        tensor.record_stream(stream)

    def mark(self) -> torch.cuda.Event:
        return _recorded(torch.cuda.current_stream(self.device))

    def span(self, zero: torch.cuda.Event, begun: torch.cuda.Event, ended: torch.cuda.Event) -> Span:
        def read() -> tuple[float, float]:
            ended.synchronize()  # and nothing else: others may wait for us
            return zero.elapsed_time(begun) / 1e3, zero.elapsed_time(ended) / 1e3

        return read


def _recorded(stream: torch.cuda.Stream) -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record(stream)
    return event


def _is_captured() -> bool:
    return torch.cuda.is_current_stream_capturing()


def _waits(in_step: bool) -> bool:
    return in_step and not _is_captured()


class CudaPartition(Partition):
    """Green contexts: streams on some SMs only."""

    unit = "SMs"

    def __init__(self, device: torch.device, comm: int) -> None:
        require()
        self._device = device
        self._part = _cuda.Partition(device.index, comm)
        self.comm, self.compute = self._part.comm_sms, self._part.compute_sms
        self._entered = threading.local()

    @property
    def compute_stream(self) -> torch.cuda.Stream:
        """The calling thread's stream on the compute SMs."""
        if getattr(self._entered, "stream", None) is None:
            self._entered.owner = self._part.compute_stream()  # this thread's alone, as long as it lives
            self._entered.stream = torch.cuda.ExternalStream(self._entered.owner.handle, self._device)
        return self._entered.stream

    def claim(self, config: _core.Config) -> None:
        _cuda.give_streams(config, self._part)

    def enter(self) -> None:
        before = torch.cuda.current_stream(self._device)
        self._entered.before = [*getattr(self._entered, "before", []), before]
        self.compute_stream.wait_stream(before)
        torch.cuda.set_stream(self.compute_stream)

    def leave(self) -> None:
        before = self._entered.before.pop()
        before.wait_stream(self.compute_stream)
        torch.cuda.set_stream(before)


class Cuda(Platform):
    """GPUs of this host."""

    name = "cuda"
    exchanges_fds = True

    def require(self) -> None:
        require()

    def resolve(self, device: torch.device) -> torch.device:
        if device.index is not None or not is_available():
            return device
        return torch.device("cuda", device_index())

    def modules(self) -> list[ModuleType]:
        return [_core, _cuda]

    def default_slots(self, heaps: int) -> int:
        return _SLOTS

    def default_grouped_rows(self, most: int, expected: int) -> int:
        return min(most, math.ceil(_MARGIN * expected))

    def rates(self, facts: Facts, alone: bool) -> tuple[float, float | None] | None:
        if alone:
            return 1.0, None  # memory's rate does not matter where all goes over it
        known = facts["rates"]
        return None if known is None or known[1] is None else (known[0], known[1])

    def facts(self, device: torch.device) -> Facts:
        p = properties(device)
        names = ("name", "uuid", "sms", "shares_fds", "domain")
        known = find_hardware(p.name)
        return {name: getattr(p, name) for name in names} | {
            "place": p.uuid,
            "rates": None if known is None else (known.memory_gbps, known.link_gbps),
        }

    def configure(self, config: _core.Config, wish: Wish, infos: list[Facts], gather: Gather) -> None:
        mine, partition = infos[config.rank], wish.partition
        place = (mine["pid"], mine["host"], mine["uuid"])
        beside = sum((info["pid"], info["host"], info["uuid"]) == place for info in infos)
        config.num_sms = wish.num_sms or _default_blocks(config, wish, mine, beside)
        wanted = gather("SMs", (mine["pid"], mine["uuid"], config.num_sms))
        together = sum(n for pid, uuid, n in wanted if (pid, uuid) == (mine["pid"], mine["uuid"]))
        there_are = mine["sms"] if partition is None else partition.comm
        if together > there_are:
            has = "it has" if partition is None else "its partition has for communication"
            raise ValueError(
                f"num_sms of the {beside} ranks on this GPU add up to {together}, but {has} {there_are} "
                "SMs, and all blocks must run at once"
            )
        config.device, config.spin = wish.device.index, _SPIN
        if partition is None:
            _cuda.give_streams(config, None)
        else:
            partition.claim(config)
        if together + beside > there_are:
            config.plan_stream = 0  # no SM is left for plans beside rows: see csrc/cuda/plan.cuh

    def connectable(self, config: _core.Config, near: list[Facts]) -> _core.Communicator:
        config.share = _way_to_share(near)
        for uuid in {info["uuid"] for info in near}:
            _cuda.require_peer_access(config.device, uuid)
        return _cuda.make_communicator(config)

    def backend(self, core: _core.Communicator, config: _core.Config, wish: Wish, facts: Facts) -> Backend:
        stream = torch.cuda.ExternalStream(config.stream, wish.device)
        if wish.partition is not None:
            return CudaBackend(core, stream, lambda: None, wish.in_step)
        blocks = config.num_sms + (config.plan_stream != 0)
        free_sms = of_this_process.add(facts["uuid"], str(wish.device), blocks, facts["sms"])
        return CudaBackend(core, stream, free_sms, wish.in_step)

    def partition(self, device: torch.device, comm: int) -> CudaPartition:
        return CudaPartition(device, comm)

    def rank_thread(self, device: torch.device) -> Callable[[], AbstractContextManager[None]]:
        require()
        index = device_index(device)
        warm_up(index)
        begun = torch.cuda.current_stream(device).record_event()
        return lambda: _apart(index, begun)

    def readable(self, tensor: Tensor) -> bool:
        return not tensor.is_cuda


def _default_blocks(config: _core.Config, wish: Wish, facts: Facts, ranks_on_device: int) -> int:
    """What the performance model proposes; in a partition, all its SMs, shared by the ranks on the GPU."""
    if wish.partition is not None:
        return max(1, wish.partition.comm // ranks_on_device)
    return default_num_sms(
        name=facts["name"],
        sms=facts["sms"],
        ranks=config.size,
        max_tokens=config.max_tokens,
        hidden=config.hidden,
        itemsize=wish.itemsize,
        topk=config.topk,
        experts=config.experts,
        ranks_on_device=ranks_on_device,
    )


def _way_to_share(near: list[Facts]) -> str:
    """How processes on a node share device memory: in a way that all its ranks can."""
    if any(info["host"] != near[0]["host"] for info in near):
        return "fabric"
    return "fd" if all(info["shares_fds"] for info in near) else "none"


@contextmanager
def _apart(index: int, begun: torch.cuda.Event) -> Iterator[None]:
    """Keep apart what ranks on one GPU must not share, since they would wait for each other in it.

    A stream, which goes on after ``begun``, and the thread that autograd keeps for each device. A new
    thread's current device is number 0, whatever that of the thread that starts it.
    """
    torch.cuda.set_device(index)
    stream = torch.cuda.Stream()
    stream.wait_event(begun)
    with torch.cuda.stream(stream), torch.autograd.set_multithreading_enabled(False):
        yield
    stream.synchronize()
