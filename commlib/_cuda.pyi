"""
commlib's CUDA backend. Imports without a driver; why_not() says what is missing.
"""

from __future__ import annotations

import commlib._core

__all__: list[str] = [
    "ComputeStream",
    "DeviceFacts",
    "Partition",
    "give_streams",
    "make_communicator",
    "properties",
    "require_peer_access",
    "why_not",
]

class DeviceFacts:
    """
    What a GPU is and can do.
    """
    @property
    def capability(self) -> int:
        """
        90 for 9.0.
        """
    @property
    def domain(self) -> str:
        """
        The NVLink domain in which it can share memory with other hosts; '': none.
        """
    @property
    def name(self) -> str: ...
    @property
    def shares_fds(self) -> bool:
        """
        Of virtual memory.
        """
    @property
    def sms(self) -> int: ...
    @property
    def total_memory(self) -> int:
        """
        Bytes.
        """
    @property
    def uuid(self) -> str: ...

class ComputeStream:
    @property
    def handle(self) -> int: ...

class Partition:
    """
    A GPU's SMs in two disjoint parts, for communication and compute.
    """
    def __init__(self, device: int, comm: int) -> None:
        """
        At least `comm` SMs for communication.
        """
    def compute_stream(self) -> ComputeStream: ...
    @property
    def comm_sms(self) -> int: ...
    @property
    def compute_sms(self) -> int: ...

def give_streams(config: commlib._core.Config, partition: Partition | None) -> None:
    """
    Give a communicator streams of its own, on the partition's SMs for communication if there is one.
    """

def make_communicator(config: commlib._core.Config) -> commlib._core.Communicator: ...
def properties(device: int) -> DeviceFacts: ...
def require_peer_access(device: int, uuid: str) -> None:
    """
    Raise unless the device reaches the memory of the one with this UUID.
    """

def why_not() -> str:
    """
    '', or why there is no GPU to work with.
    """
