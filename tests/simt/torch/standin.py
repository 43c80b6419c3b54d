"""PyTorch's device cuda:0, on a simulated GPU: what torch.cuda finds in torch._C where there is CUDA.

:func:`install` comes before the first ``import torch``: PyTorch asks only once whether there is CUDA. All of
torch.cuda, its rules for devices and streams included, is then PyTorch's own.
"""

import importlib
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import SimpleNamespace
from typing import Any

_DEVICE = "_simulated_cuda"
_CUDA = 1  # of torch's DeviceType
_CYCLES_PER_NS = 2  # of torch.cuda._sleep


def install(folder: str) -> None:
    """Let ``import torch`` find a GPU, and ``import commlib`` its CUDA backend, as built in ``folder``."""
    if "torch" in sys.modules:
        raise RuntimeError("the simulated GPU comes before the first `import torch`")
    sys.meta_path.insert(0, _Finder(Path(folder)))


class _Finder(MetaPathFinder):
    """Finds nothing but commlib's module; it is told of each import, and comes first."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name == "torch":
            _load(_DEVICE, self._folder / f"{_DEVICE}.so")
        if name == "torch.cuda":
            _provide(sys.modules["torch._C"], sys.modules[_DEVICE])
        if name == "commlib._cuda":
            return spec_from_file_location(name, self._folder / "_cuda.so")
        return None


def _load(name: str, file: Path) -> None:
    spec = spec_from_file_location(name, file, loader=ExtensionFileLoader(name, str(file)))
    assert spec is not None and spec.loader is not None
    sys.modules[name] = module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])


def _provide(c: Any, gpu: Any) -> None:
    """Put into torch._C what a build with CUDA has there, as far as streams, events and facts need it."""
    provided = dict(
        _CudaStreamBase=_stream_base(c, gpu),
        _CudaEventBase=_event_base(gpu),
        _CUDAGraph=_graph_base(gpu),
        _graph_pool_handle=lambda: (0, 1),
        _cuda_CUDAAllocator_AllocatorState=object,
        _set_cached_tensors_enabled=lambda enabled: None,
        _has_cuda=True,
        _cudart=SimpleNamespace(cudaMemGetInfo=lambda index: _free_and_total(gpu)),
        _cuda_init=lambda: _init(gpu),
        _cuda_isInBadFork=lambda: False,
        _cuda_getDeviceCount=lambda: 1,
        _cuda_getDevice=lambda: 0,
        _cuda_setDevice=_set_device,
        # torch.compile knows each of the three by itself.
        _cuda_exchangeDevice=lambda index: _set_device(index),
        _cuda_maybeExchangeDevice=lambda index: _set_device(index),
        _cuda_getArchFlags=lambda: None,
        _cuda_getCompiledVersion=lambda: 0,
        _cuda_getCurrentStream=lambda index: _stream(gpu.current_stream()),
        _cuda_getCurrentRawStream=lambda index: gpu.current_stream(),
        _cuda_getDefaultStream=lambda index: _stream(0),
        _cuda_getStreamFromExternal=lambda handle, index: _stream(handle),
        _cuda_setStream=lambda stream_id, device_index, device_type: gpu.set_current_stream(stream_id),
        _cuda_isCurrentStreamCapturing=lambda: gpu.is_captured(gpu.current_stream()),
        _cuda_synchronize=gpu.synchronize,
        _cuda_sleep=lambda cycles: gpu.sleep(cycles // _CYCLES_PER_NS),
        _cuda_emptyCache=lambda: None,
        _host_emptyCache=lambda: None,
        _cuda_resetPeakMemoryStats=lambda device: None,
        _cuda_memoryStats=lambda device: _memory_stats(gpu),
    )
    for name, what in provided.items():
        setattr(c, name, what)


def _stream_base(c: Any, gpu: Any) -> type:
    """What torch.cuda.Stream derives from."""

    class CudaStreamBase(c.Stream):
        def __new__(cls, priority=0, stream_id=0, device_index=0, device_type=0, stream_ptr=0):
            is_named = device_type != 0  # by what torch.cuda.current_stream was told
            handle = stream_id if is_named else stream_ptr or gpu.pooled_stream(priority < 0)
            return super().__new__(cls, stream_id=handle, device_index=0, device_type=_CUDA)

        @property
        def cuda_stream(self):
            return self.stream_id

        def query(self):
            return gpu.query_stream(self.stream_id)

        def synchronize(self):
            gpu.synchronize_stream(self.stream_id)

    return CudaStreamBase


def _event_base(gpu: Any) -> type:
    """What torch.cuda.Event derives from."""

    class CudaEventBase:
        def __new__(cls, enable_timing=False, blocking=False, interprocess=False, external=False):
            event = super().__new__(cls)
            event.cuda_event, event._timed = 0, enable_timing
            return event

        def __del__(self):
            if self.cuda_event:
                gpu.destroy_event(self.cuda_event)

        def record(self, stream):
            self.cuda_event = self.cuda_event or gpu.new_event()
            gpu.record_event(self.cuda_event, stream.stream_id)

        def wait(self, stream):
            if self.cuda_event:
                gpu.wait_event(self.cuda_event, stream.stream_id)

        def query(self):
            return not self.cuda_event or gpu.query_event(self.cuda_event)

        def synchronize(self):
            if self.cuda_event:
                gpu.synchronize_event(self.cuda_event)

        def elapsed_time(self, end):
            if not (self._timed and end._timed):
                raise ValueError("Both events must be created with argument 'enable_timing=True'.")
            return gpu.elapsed_time(self.cuda_event, end.cuda_event)

    return CudaEventBase


def _graph_base(gpu: Any) -> type:
    """What torch.cuda.CUDAGraph derives from. Memory of a graph is its own: there are no pools to share."""

    class Runnable:
        def __init__(self, handle):
            self.handle, self.stream = handle, 0

        def __del__(self):
            gpu.synchronize_stream(self.stream)  # what it works on goes with it
            gpu.destroy_graph(self.handle)

    class CUDAGraphBase:  # torch.cuda.CUDAGraph has a __del__ of its own
        def __new__(cls, keep_graph=False):
            graph = super().__new__(cls)
            graph._runnable = None
            return graph

        def capture_begin(self, pool=None, capture_error_mode="global"):
            self._stream = gpu.current_stream()
            gpu.begin_capture(self._stream)

        def capture_end(self):
            self._runnable = Runnable(gpu.end_capture(self._stream))

        def instantiate(self):
            pass

        def replay(self):
            if not self._runnable:
                raise RuntimeError("Called CUDAGraph::replay without a preceding successful capture.")
            self._runnable.stream = gpu.current_stream()
            gpu.launch_graph(self._runnable.handle, self._runnable.stream)

        def reset(self):
            self._runnable = None

        def pool(self):
            return 0, 1

    return CUDAGraphBase


def _set_device(index: int) -> int:
    if index > 0:
        raise RuntimeError("CUDA error: invalid device ordinal")
    return 0


def _stream(handle: int) -> tuple[int, int, int]:
    """As torch.cuda has it: stream, device, kind of device."""
    return handle, 0, _CUDA


def _init(gpu: Any) -> None:
    cuda = importlib.import_module("torch.cuda")
    cuda.default_generators = (sys.modules["torch"].default_generator,)
    cuda._get_device_properties = lambda index: SimpleNamespace(**gpu.properties())


def _memory_stats(gpu: Any) -> dict[str, Any]:
    """In the form that torch.cuda.memory_stats flattens."""
    used = dict.fromkeys(("current", "peak", "allocated", "freed"), gpu.used_bytes())
    return {what: {"all": used} for what in ("allocated_bytes", "reserved_bytes", "active_bytes")}


def _free_and_total(gpu: Any) -> tuple[int, int]:
    total = gpu.properties()["total_memory"]
    return max(total - gpu.used_bytes(), 0), total
