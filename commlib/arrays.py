"""Arrays of other libraries, through DLPack: NumPy and CuPy in, the same kind out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch


def as_tensor(name: str, array: Any) -> torch.Tensor:
    """A tensor over the memory of ``array``: no copy, unless NumPy marks it as read-only.

    Raises:
        TypeError: it is neither a tensor nor speaks DLPack.
        ValueError: it cannot be exported, for example from a device that PyTorch does not see.
    """
    if isinstance(array, torch.Tensor):
        return array
    if not hasattr(array, "__dlpack__"):
        raise TypeError(f"{name} must be a tensor or an array with __dlpack__, got {type(array).__name__}")
    if isinstance(array, np.ndarray) and not array.flags.writeable:
        array = array.copy()  # DLPack cannot say "read only", so NumPy exports no such array
    try:
        return torch.from_dlpack(array)
    except (RuntimeError, BufferError, AssertionError) as error:
        kind = type(array).__name__
        raise ValueError(f"{name}: PyTorch cannot use this {kind} through DLPack: {error}") from error


def exporter_for(array: Any) -> Callable[[torch.Tensor], Any]:
    """A function that turns a tensor into the kind of array that ``array`` is (no copy).

    bfloat16 stays a tensor for NumPy, which has no such type.
    """
    if isinstance(array, torch.Tensor):
        return lambda tensor: tensor
    module = type(array).__module__.partition(".")[0]
    if module == "cupy":
        import cupy

        return cupy.from_dlpack
    if isinstance(array, np.ndarray):
        return lambda t: t if t.dtype == torch.bfloat16 else t.numpy()
    return lambda tensor: tensor
