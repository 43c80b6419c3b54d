"""Arguments of ExpertParallel, checked."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

import torch

from commlib import _core, cuda
from commlib.partition import SMPartition
from commlib.topology import ROUTINGS, node_size

CORE_DTYPES = {
    torch.bfloat16: _core.DType.bf16,
    torch.float16: _core.DType.f16,
    torch.float32: _core.DType.f32,
    torch.float64: _core.DType.f64,
}
_MAX_SMS = 1024
_MAX_ROWS = 2**31 - 1  # a row's number travels in 32 bits


@dataclass(frozen=True)
class Settings:
    """What the user asked for; see ExpertParallel."""

    num_experts: int
    hidden: int
    topk: int
    max_tokens: int
    dtype: torch.dtype
    device: torch.device
    num_sms: int | None
    capacity: int | None
    slots: int
    timeout: float
    partition: SMPartition | None = None
    link_gbps: float | None = None
    routing: str = "auto"
    ranks_per_node: int | None = None

    @property
    def weight_dtype(self) -> torch.dtype:
        """Of weights, and of sums."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    def check(self, size: int) -> None:
        """Raise ValueError or TypeError, naming the value, where they cannot be used on ``size`` ranks."""
        _check_int("num_experts", self.num_experts, 1, 2**20)
        _check_int("hidden", self.hidden, 1, 2**24)
        _check_int("topk", self.topk, 1, min(_core.MAX_TOPK, self.num_experts))
        _check_int("max_tokens", self.max_tokens, 1, _MAX_ROWS // size)
        _check_int("slots", self.slots, 1, _core.MAX_SLOTS)
        if self.num_sms is not None:
            _check_int("num_sms", self.num_sms, 1, _MAX_SMS)
        if self.capacity is not None:
            _check_int("capacity", self.capacity, 1, _MAX_ROWS)
        if self.dtype not in CORE_DTYPES:
            raise ValueError(f"dtype must be bfloat16, float16, float32 or float64, got {self.dtype}")
        if self.device.type not in ("cpu", "cuda"):
            raise ValueError(f'device must be "cpu" or "cuda", got {self.device}')
        if self.device.type == "cuda":
            cuda.require()
        if self.partition is not None:
            self.partition.check_fits(self.device, self.num_sms)
        if self.link_gbps is not None and not (self.link_gbps > 0 and math.isfinite(self.link_gbps)):
            raise ValueError(f"link_gbps must be a positive number of GB/s, got {self.link_gbps}")
        if self.routing not in ROUTINGS:
            raise ValueError(f"routing must be one of {', '.join(ROUTINGS)}, got {self.routing!r}")
        node_size(self.ranks_per_node)
        check_timeout(self.timeout)
        if size > _core.MAX_RANKS:
            raise ValueError(f"at most {_core.MAX_RANKS} ranks, got {size}")

    def capacity_on(self, size: int) -> int:
        """Rows a slot holds."""
        return size * self.max_tokens if self.capacity is None else self.capacity

    def shared(self) -> dict[str, Any]:
        """Those that must be equal on all ranks."""
        own = ("num_sms", "timeout", "partition", "link_gbps")
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in own}
        return values | {"device": self.device.type, "ranks_per_node": node_size(self.ranks_per_node)}


def check_timeout(seconds: float) -> None:
    """Raise ValueError unless ``seconds`` is a positive, finite number."""
    if not (seconds > 0 and math.isfinite(seconds)):
        raise ValueError(f"timeout must be a positive number of seconds, got {seconds}")


def _check_int(name: str, value: Any, least: int, most: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if not least <= value <= most:
        raise ValueError(f"{name} must lie in [{least}, {most}], got {value}")
