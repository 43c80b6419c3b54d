"""Whether and how commlib can use CUDA GPUs here."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from commlib._cuda import DeviceFacts

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
