"""What a communicator holds in memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from commlib.expert_parallel import ExpertParallel


@dataclass(frozen=True)
class MemoryReport:
    """Bytes on this rank.

    Attributes:
        reserved: address space of the symmetric heap: slots * slot_bytes and the control words.
        slot_bytes: of one slot: ``capacity`` rows with their metadata.
        touched: of ``reserved``, in memory now; grows to at most ``reserved``.
        idle_buffers: results given back and kept for the next ones.
        network: rings and words for ranks on other nodes; 0 where there are none.
        slots, slots_in_use: all slots, and those that results, lent buffers or operations hold now.
    """

    reserved: int
    slot_bytes: int
    touched: int
    idle_buffers: int
    network: int
    slots: int
    slots_in_use: int

    def __str__(self) -> str:
        def mib(n: int) -> str:
            return f"{n / 2**20:,.1f} MiB"

        return (
            f"commlib memory: heap {mib(self.touched)} touched of {mib(self.reserved)} reserved "
            f"({self.slots} slots of {mib(self.slot_bytes)}, {self.slots_in_use} in use), "
            f"idle result buffers {mib(self.idle_buffers)}"
            + (f", network rings {mib(self.network)}" if self.network else "")
        )


def report_memory(ep: ExpertParallel) -> MemoryReport:
    """The report for one rank's communicator."""
    core = ep._comm.core
    return MemoryReport(
        core.heap_bytes,
        core.slot_bytes,
        core.touched_bytes,
        ep._comm.backend.idle_bytes,
        core.network_memory,
        ep.settings.slots,
        core.slots_in_use,
    )
