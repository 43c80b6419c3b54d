"""commlib: expert-parallel dispatch and combine for mixture-of-experts models."""

from commlib import cuda, nn, overlap
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
from commlib.group import Group
from commlib.inprocess import run_ranks
from commlib.partition import SMPartition

__version__ = "0.1.0"

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
    "cuda",
    "nn",
    "overlap",
    "run_ranks",
]
