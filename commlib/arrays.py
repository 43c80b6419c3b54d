"""Other libraries' arrays, through DLPack: NumPy and CuPy in, the same kind out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeAlias, TypeVar

import numpy as np
import torch


class SupportsDLPack(Protocol):
    """An array of a library that hands its memory to others."""

    def __dlpack__(self, *args: Any, **kwargs: Any) -> Any: ...


# The kind of array that a user gives, and gets back.
Array = TypeVar("Array", torch.Tensor, np.ndarray, SupportsDLPack)
# Any kind, beside it.
AnyArray: TypeAlias = torch.Tensor | np.ndarray | SupportsDLPack


def as_tensor(name: str, array: Any, writable: bool = False) -> torch.Tensor:
    """A tensor over the memory of ``array``: no copy, unless it is read-only and not to be written.

    Raises:
        TypeError: it is not a tensor and does not speak DLPack.
        ValueError: it cannot be exported, for example from a device that PyTorch does not see; it has
            negative strides; it is read-only, but ``writable``.
    """
    if isinstance(array, torch.Tensor):
        return array
    kind = type(array).__name__
    if not hasattr(array, "__dlpack__"):
        raise TypeError(f"{name} must be a tensor or an array with __dlpack__, got {kind}")
    array = _readable(array)
    if any(stride < 0 for stride in getattr(array, "strides", None) or ()):
        # torch.from_dlpack ends the process here.
        raise ValueError(f"{name}: PyTorch has no negative strides, {array.strides}: make a contiguous copy")
    if isinstance(array, np.ndarray) and not array.flags.writeable:
        if writable:
            raise ValueError(f"{name} is read-only")
        array = array.copy()  # DLPack cannot say "read only", so NumPy exports no such array
    try:
        return torch.from_dlpack(array)
    except (RuntimeError, BufferError, AssertionError) as error:
        raise ValueError(f"{name}: PyTorch cannot use this {kind} through DLPack: {error}") from error


def _readable(array: Any) -> Any:
    """The same memory as an array that shows strides, and whether it may be written, where NumPy can."""
    if isinstance(array, np.ndarray) or hasattr(array, "strides"):
        return array
    try:
        return np.from_dlpack(array)
    except (RuntimeError, BufferError, TypeError, ValueError, AttributeError):
        return array  # on a GPU, or of a type that NumPy does not know


def _numpy_of(tensor: torch.Tensor) -> Any:
    try:
        return tensor.numpy()
    except TypeError:
        return tensor


def exporter_for(array: Any) -> Callable[[torch.Tensor], Any]:
    """A function that turns a tensor into the kind of array that ``array`` is (no copy).

    Types that NumPy lacks, as bfloat16, stay tensors for it.
    """
    if isinstance(array, torch.Tensor):
        return lambda tensor: tensor
    module = type(array).__module__.partition(".")[0]
    if module == "cupy":
        import cupy

        return cupy.from_dlpack
    if isinstance(array, np.ndarray):
        return _numpy_of
    return lambda tensor: tensor
