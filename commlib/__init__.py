"""commlib: expert-parallel dispatch and combine for mixture-of-experts models."""

from commlib import nn, overlap
from commlib.devices import cuda
from commlib.dispatched import Dispatched, Handle
from commlib.errors import (
    CallMismatch,
    CapacityExceeded,
    CommError,
    ConfigMismatch,
    HandleError,
    PeerTimeout,
)
from commlib.event import Event
from commlib.expert_parallel import ExpertParallel
from commlib.partition import SMPartition
from commlib.quantization import dequantize, quantize
from commlib.startup.group import Group
from commlib.startup.inprocess import run_ranks
from commlib.version import __version__

__all__ = [
    "CallMismatch",
    "CapacityExceeded",
    "CommError",
    "ConfigMismatch",
    "Dispatched",
    "Event",
    "ExpertParallel",
    "Group",
    "Handle",
    "HandleError",
    "PeerTimeout",
    "SMPartition",
    "__version__",
    "cuda",
    "dequantize",
    "nn",
    "overlap",
    "quantize",
    "run_ranks",
]
