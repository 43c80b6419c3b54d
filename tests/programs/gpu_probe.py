"""What CUDA calls wait for while a kernel runs: what ranks that share a GPU as threads must not do.

    CUDA_MODULE_LOADING=EAGER CUDA_DEVICE_MAX_CONNECTIONS=32 python gpu_probe.py [A] [B] [C] [--limit SECONDS]

A: a kernel runs on a stream of its own; what does a call on another stream do? It goes on ("ok"), or returns
   when the kernel ends ("WAITS"), or so late that it might have waited ("late?").
B: a thread is inside a call that waits for such a kernel. What can another thread still do?
C: which of PyTorch's streams wait for each other, since they share a hardware queue?

It takes no part of commlib. A call that hangs ends the program at its limit, with the stacks of its threads.
"""

from __future__ import annotations

import argparse
import ctypes
import faulthandler
import itertools
import sys
import threading
import time
from collections.abc import Callable, Iterator

import torch

CYCLES = 100_000_000  # of a kernel whose duration shows the clock's rate
BEHIND = 0.3  # seconds in which work on another stream must get through beside the kernel
MIB = 1 << 20

Call = Callable[[], object]


class Kernels:
    """Kernels of one thread that run for a chosen time."""

    def __init__(self) -> None:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(2):  # the first one loads it, and wakes the GPU
            begin.record()
            torch.cuda._sleep(CYCLES)
            end.record()
            end.synchronize()
        self.hz = CYCLES / (begin.elapsed_time(end) * 1e-3)

    def start(self, seconds: float, stream: torch.cuda.Stream) -> torch.cuda.Event:
        """The event of its end."""
        with torch.cuda.stream(stream):
            torch.cuda._sleep(int(seconds * self.hz))
            return stream.record_event()


class Probe:
    """One kernel at a time on a stream of high priority, and calls beside it."""

    def __init__(self, kernels: Kernels) -> None:
        self.kernels = kernels
        self.side = torch.cuda.Stream(priority=-1)  # of another pool than those that `streams` gives
        self.streams: Iterator[torch.cuda.Stream] = itertools.cycle([torch.cuda.Stream() for _ in range(32)])

    def beside(self, name: str, call: Call, seconds: float = 0.6) -> None:
        """Time a call on another stream, and see whether what it queued there gets through."""
        torch.cuda.synchronize()
        stream = next(self.streams)
        ended = self.kernels.start(seconds, self.side)
        until = time.perf_counter() + seconds
        time.sleep(0.02)
        with torch.cuda.stream(stream):
            word, taken, error = timed(call, ended, until, seconds)
            queued = stream.record_event()
        note = ""
        if word == "ok":
            time_up = min(time.perf_counter() + BEHIND, until)
            while not queued.query() and time.perf_counter() < time_up:
                time.sleep(0.001)
            note = "" if queued.query() else "; what it queued waits"
        show(word, taken, name, f"{note}{error}")
        ended.synchronize()

    def while_waiting(self, name: str, wait: Call, calls: dict[str, Call], seconds: float = 0.4) -> None:
        """Time each call while a thread is inside ``wait``, on the stream that the kernel holds up."""
        print(f" while a thread is in {name}")
        for what, call in calls.items():
            torch.cuda.synchronize()
            ended = self.kernels.start(seconds, self.side)
            until = time.perf_counter() + seconds
            thread = threading.Thread(target=self._on_side, args=(wait,), daemon=True)
            thread.start()
            time.sleep(0.05)
            with torch.cuda.stream(next(self.streams)):
                word, taken, error = timed(call, ended, until, seconds)
            thread.join()
            show(word, taken, what, error)

    def _on_side(self, wait: Call) -> None:
        with torch.cuda.stream(self.side):
            wait()


def timed(call: Call, ended: torch.cuda.Event, until: float, seconds: float) -> tuple[str, float, str]:
    """Whether a call waited for a kernel that ends at ``until``, how long it took, and what went wrong."""
    error = ""
    begin = time.perf_counter()
    if ended.query():
        error = "; the kernel was over before"
    try:
        call()
    except Exception as e:
        error += f"; {type(e).__name__}: {e}"
    end = time.perf_counter()
    if not ended.query():
        return "ok", end - begin, error
    return ("WAITS" if end < until + 0.15 * seconds else "late?"), end - begin, error


def show(word: str, seconds: float, name: str, note: str) -> None:
    print(f"  {word:5} {seconds * 1e3:8.2f} ms  {name}{note}", flush=True)


class Runtime:
    """Calls of the CUDA runtime that PyTorch has loaded."""

    def __init__(self) -> None:
        library = ctypes.CDLL(find_runtime())
        pointer, size, flags = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint
        self._functions = {}
        for name, types in {
            "cudaMalloc": (ctypes.POINTER(pointer), size),
            "cudaFree": (pointer,),
            "cudaHostAlloc": (ctypes.POINTER(pointer), size, flags),
            "cudaFreeHost": (pointer,),
            "cudaStreamCreateWithFlags": (ctypes.POINTER(pointer), flags),
            "cudaStreamDestroy": (pointer,),
        }.items():
            function = getattr(library, name)
            function.argtypes, function.restype = types, ctypes.c_int
            self._functions[name] = function

    def __call__(self, name: str, *arguments: object) -> None:
        check(name, self._functions[name](*arguments))


def find_runtime() -> str:
    """The file of the runtime that this process has loaded; else a name that the linker may know."""
    with open("/proc/self/maps") as maps:
        loaded = {line.split()[-1] for line in maps if "/libcudart" in line}
    return min(loaded) if loaded else f"libcudart.so.{(torch.version.cuda or '13').partition('.')[0]}"


def check(name: str, code: int) -> None:
    if code:
        raise RuntimeError(f"{name}: error {code}")


class Allocation(ctypes.Structure):
    """CUmemAllocationProp: pinned memory of a device, to be exported as a file descriptor."""

    _fields_ = (
        *((name, ctypes.c_int) for name in ("type", "handle_types", "location_type", "location")),
        ("win32", ctypes.c_void_p),
        ("flags", ctypes.c_ubyte * 8),
    )


class Access(ctypes.Structure):
    """CUmemAccessDesc."""

    _fields_ = tuple((name, ctypes.c_int) for name in ("location_type", "location", "flags"))


class Mapping:
    """Memory that is created, mapped and made accessible call by call, as symmetric heaps are."""

    SIZE = 64 * MIB

    def __init__(self, device: int) -> None:
        self._driver = ctypes.CDLL("libcuda.so.1")
        self._handle, self._at = ctypes.c_ulonglong(), ctypes.c_ulonglong()
        self._allocation, self._access = Allocation(1, 1, 1, device), Access(1, device, 3)

    def create(self) -> None:
        u64, size = ctypes.c_ulonglong, ctypes.c_size_t(self.SIZE)
        self._call("cuMemCreate", ctypes.byref(self._handle), size, ctypes.byref(self._allocation), u64(0))
        self._call("cuMemAddressReserve", ctypes.byref(self._at), size, ctypes.c_size_t(0), u64(0), u64(0))
        self._call("cuMemMap", self._at, size, ctypes.c_size_t(0), self._handle, u64(0))

    def allow(self) -> None:
        size, count = ctypes.c_size_t(self.SIZE), ctypes.c_size_t(1)
        self._call("cuMemSetAccess", self._at, size, ctypes.byref(self._access), count)

    def release(self) -> None:
        self._call("cuMemUnmap", self._at, ctypes.c_size_t(self.SIZE))
        self._call("cuMemAddressFree", self._at, ctypes.c_size_t(self.SIZE))
        self._call("cuMemRelease", self._handle)

    def _call(self, name: str, *arguments: object) -> None:
        check(name, getattr(self._driver, name)(*arguments))


def part_a(probe: Probe) -> None:
    """Calls beside a running kernel, each for the first time in this process."""
    at, host, stream = (ctypes.c_void_p() for _ in range(3))
    runtime, mapping = Runtime(), Mapping(torch.cuda.current_device())
    x = torch.ones(1 << 18, device="cuda")
    f64, bf16 = (torch.randn(512, 512, device="cuda").to(t) for t in (torch.float64, torch.bfloat16))
    keep: list[torch.Tensor] = []
    ref = ctypes.byref
    for name, call in {
        "cudaMalloc 64 MiB": lambda: runtime("cudaMalloc", ref(at), 64 * MIB),
        "cudaFree": lambda: runtime("cudaFree", at),
        "cudaHostAlloc, mapped": lambda: runtime("cudaHostAlloc", ref(host), 1 << 16, 3),
        "cudaFreeHost": lambda: runtime("cudaFreeHost", host),
        "cuMemCreate, reserve, map": mapping.create,
        "cuMemSetAccess": mapping.allow,
        "cuMemUnmap, free, release": mapping.release,
        "cudaStreamCreateWithFlags": lambda: runtime("cudaStreamCreateWithFlags", ref(stream), 1),
        "cudaStreamDestroy": lambda: runtime("cudaStreamDestroy", stream),
        "torch.empty 300 MiB": lambda: keep.append(torch.empty(300 * MIB, dtype=torch.uint8, device="cuda")),
        "torch.empty 4 KiB, the stream's first": lambda: keep.append(torch.empty(1024, device="cuda")),
        "torch.empty, pinned": lambda: keep.append(torch.empty(MIB, pin_memory=True)),
        "to the GPU, pageable, 64 B": lambda: torch.zeros(8, dtype=torch.int64).to("cuda"),
        "to the GPU, pageable, 8 MiB": lambda: torch.zeros(MIB, dtype=torch.int64).to("cuda"),
        "to the host, pageable, 1 MiB": x.cpu,
        "item()": lambda: x[0].item(),
        "a kernel never launched": lambda: torch.erfinv(x),
        "sort": lambda: torch.sort(x),
        "matmul, float64: the first": lambda: f64 @ f64,
        "matmul, float64: transposed": lambda: f64.T @ f64,
        "matmul, bf16": lambda: bf16 @ bf16,
        "cudaMemGetInfo": torch.cuda.mem_get_info,
        "torch.cuda.empty_cache": lambda: (keep.clear(), torch.cuda.empty_cache()),
    }.items():
        probe.beside(name, call)
    probe.beside("a kernel compiled at run time", lambda: torch.special.bessel_j1(x), seconds=4)


def part_b(probe: Probe) -> None:
    """Locks that a waiting call holds."""
    runtime, at = Runtime(), ctypes.c_void_p()
    big, x = torch.ones(MIB, device="cuda"), torch.ones(1 << 18, device="cuda")
    calls = {
        "kernel launch": lambda: x.add_(1),
        "event record and query": lambda: torch.cuda.current_stream().record_event().query(),
        "stream.synchronize()": lambda: torch.cuda.current_stream().synchronize(),
        "to the GPU, pageable, 64 B": lambda: torch.zeros(8, dtype=torch.int64).to("cuda"),
        "to the host, pageable, 64 B": lambda: x[:16].cpu(),
        "item()": lambda: x[0].item(),
    }
    for call in calls.values():  # nothing is allocated or loaded later
        call()
    probe.while_waiting("a pageable copy to the host", big.cpu, calls)
    probe.while_waiting("a pageable copy to the GPU", lambda: torch.zeros(MIB).to("cuda"), calls)
    probe.while_waiting("item()", lambda: big[0].item(), calls)
    probe.while_waiting("stream.synchronize()", lambda: torch.cuda.current_stream().synchronize(), calls)

    def allocate_and_free() -> None:
        runtime("cudaMalloc", ctypes.byref(at), MIB)
        runtime("cudaFree", at)

    probe.while_waiting("cudaMalloc and cudaFree", allocate_and_free, calls)


def part_c(probe: Probe) -> None:
    """Hold up one stream after the other; which others stand still with it?"""
    streams = {f"{i}{'h' if p else ''}": torch.cuda.Stream(priority=p) for i in range(32) for p in (0, -1)}
    shared = {}
    for name, blocked in streams.items():
        torch.cuda.synchronize()
        ended = probe.kernels.start(0.03, torch.cuda.default_stream())  # PyTorch's streams do not wait for it
        blocked.wait_event(ended)
        probe.kernels.start(1e-6, blocked)
        events = {n: probe.kernels.start(1e-6, s) for n, s in streams.items() if n != name}
        time.sleep(0.004)
        waiting = [n for n, event in events.items() if not event.query()]
        if not ended.query():  # else it is too late to tell
            shared[name] = waiting
    torch.cuda.synchronize()
    held = {name: waiting for name, waiting in shared.items() if waiting}
    print(f"  {len(shared)} of {len(streams)} streams could be looked at (h: of high priority)")
    print(f"  a stream that is held up -> those that wait with it: {held or 'none'}", flush=True)


PARTS = {
    "A": ("beside a running kernel", part_a),
    "B": ("locks of the driver", part_b),
    "C": ("hardware queues", part_c),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", help="of A, B and C; default: all")
    parser.add_argument("--limit", type=float, default=100, help="seconds, then it ends itself")
    args = parser.parse_args()
    if unknown := set(args.parts) - set(PARTS):
        parser.error(f"no such part: {', '.join(sorted(unknown))}")
    if not torch.cuda.is_available():
        sys.exit("gpu_probe.py needs a GPU that PyTorch can use")
    faulthandler.dump_traceback_later(args.limit, exit=True)
    torch.cuda.init()
    kernels = Kernels()
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {kernels.hz / 1e9:.2f} GHz", flush=True
    )
    probe = Probe(kernels)
    for part in args.parts or PARTS:
        title, run = PARTS[part]
        print(f"{part}. {title}", flush=True)
        run(probe)
    faulthandler.cancel_dump_traceback_later()


if __name__ == "__main__":
    main()
