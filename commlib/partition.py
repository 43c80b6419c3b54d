"""Communication beside compute on disjoint SMs of a GPU, or on disjoint cores of a host."""

from __future__ import annotations

import torch

from commlib.devices import default_device, platform_of


class SMPartition:
    """A share of the SMs reserved for communication, and the rest for compute.

    Give it to communicators (``ExpertParallel(partition=p)``), and compute inside the context::

        p = commlib.SMPartition(comm=8)
        ep = commlib.ExpertParallel(..., partition=p)
        with p:
            y = layer(x)

    CUDA: green contexts. Inside, the current stream of the calling thread is a stream on the compute SMs
    (what was queued before comes first, and what is queued after the context comes after it); communicators
    use streams on the others. Backward runs on the stream on which forward ran, as always in PyTorch, and
    so inside the same share. Hardware splits SMs in groups: ``asked`` is the number asked for, ``comm`` and
    ``compute`` are the numbers given.

    CPU: sets of cores. Inside, all threads of the process except communicators' run on the compute cores,
    and PyTorch uses one thread for each of these; asynchronous operations run on the others.

    It can be entered again after it was left, and by several threads (in-process ranks) at once.

    Attributes:
        device: with an index where it is a GPU.
        asked: SMs or cores asked for, for communication.
        comm, compute: how many there are for communication, and for compute.
        share: what the device does for it.

    Args:
        comm: SMs (cores) for communication.
        device: "cpu", "cuda" or "cuda:i". None: the current CUDA device if there is one, else "cpu".

    Raises:
        ValueError: ``comm`` leaves nothing for compute, or is less than 1.
        RuntimeError: there is no such GPU, or its driver has no green contexts.
    """

    def __init__(self, comm: int, device: torch.device | str | None = None) -> None:
        platform = platform_of(device := device or default_device())
        platform.require()
        self.device = platform.resolve(torch.device(device))
        self.asked = comm
        self.share = platform.partition(self.device, comm)
        self.comm, self.compute = self.share.comm, self.share.compute

    def check_fits(self, device: torch.device, num_sms: int | None) -> None:
        """Raise ValueError unless a communicator on ``device`` with ``num_sms`` can use this partition."""
        if device != self.device:
            raise ValueError(f"the partition is of {self.device}, the communicator on {device}")
        if num_sms is not None and num_sms > self.comm:
            raise ValueError(f"num_sms is {num_sms}, but the partition has {self.comm} for communication")

    def __enter__(self) -> SMPartition:
        self.share.enter()
        return self

    def __exit__(self, *_: object) -> None:
        self.share.leave()

    def __repr__(self) -> str:
        return (
            f"SMPartition({self.device}: {self.comm} {self.share.unit} for communication "
            f"({self.asked} asked), {self.compute} for compute)"
        )
