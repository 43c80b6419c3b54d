"""A machine's abilities, as far as the model needs them, and files of measured values."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from commlib.model.checks import check_number, keep_int

_REQUIRED = ("memory_gbps", "dispatch_sm_gbps", "combine_sm_gbps")
_OPTIONAL = ("link_gbps", "network_gbps", "tflops")


@dataclass(frozen=True)
class Hardware:
    """One device (a GPU; or a host, whose cores then are the "SMs") and its way to the others.

    GB/s are 1e9 bytes per second. Rates are achieved ones, except where the source says "nominal".

    Attributes:
        name: as the driver calls it, or a preset's.
        sms: SMs of the GPU, or cores of the host.
        memory_gbps: device memory, bytes read plus bytes written.
        link_gbps: to and from the other devices of the node, one direction while both are busy; None: no
            such link.
        network_gbps: to and from other nodes, for each device and direction; None: there is no network.
        dispatch_sm_gbps: bytes of rows that one SM stores at their targets.
        combine_sm_gbps: bytes of rows that one SM loads and sums.
        latency_us: time that an operation takes besides moving rows.
        tflops: dense bf16 matrix products on all SMs; None: unknown.
        sources: for each of these, where it comes from.
    """

    name: str
    sms: int
    memory_gbps: float
    link_gbps: float | None
    network_gbps: float | None
    dispatch_sm_gbps: float
    combine_sm_gbps: float
    latency_us: float
    tflops: float | None
    sources: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        keep_int(self, "sms", 1)
        for name in _REQUIRED:
            check_number(name, getattr(self, name))
        for name in _OPTIONAL:
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name))
        if self.latency_us != 0:
            check_number("latency_us", self.latency_us)

    def save(self, path: str | Path, calibration: Mapping[str, Any] | None = None) -> None:
        """Write it as JSON; ``calibration``: how it was measured, kept beside it."""
        path = Path(path).expanduser()
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {"hardware": asdict(self), "calibration": dict(calibration or {})}
        path.write_text(json.dumps(content, indent=1) + "\n")

    @staticmethod
    def load(path: str | Path) -> Hardware:
        """Read what :meth:`save` wrote.

        Raises:
            OSError: the file cannot be read.
            ValueError: it is not such a file, or a value makes no sense; the text names both.
        """
        path = Path(path).expanduser()
        try:
            return Hardware(**json.loads(path.read_text())["hardware"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} does not describe hardware: {error}") from error
