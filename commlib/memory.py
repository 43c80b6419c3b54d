"""What communicators hold in memory."""

from __future__ import annotations

from dataclasses import dataclass

from commlib.communicator import Communicator


@dataclass(frozen=True)
class CommunicatorMemory:
    """Bytes of one communicator on this rank.

    Attributes:
        shape: what it was made for.
        layers: how many ExpertParallels share it.
        reserved: address space of the symmetric heap: slots * slot_bytes and the control words.
        slot_bytes: of one slot: ``capacity`` rows with their metadata.
        touched: of ``reserved``, in memory now; grows to at most ``reserved``.
        idle_buffers: results given back and kept for the next ones.
        network: rings and words for ranks on other nodes; 0 where there are none.
        grouped_rows: rows grouped by expert for which a slot has room; 0: they lie in none.
        slots, slots_in_use: all slots, and those that results, lent buffers or operations hold now.
    """

    shape: str
    layers: int
    reserved: int
    slot_bytes: int
    touched: int
    idle_buffers: int
    network: int
    grouped_rows: int
    slots: int
    slots_in_use: int

    def __str__(self) -> str:
        def mib(n: int) -> str:
            return f"{n / 2**20:,.1f} MiB"

        return (
            f"{self.shape}, used by {self.layers} ExpertParallel{'s' * (self.layers != 1)}: "
            f"heap {mib(self.touched)} touched of {mib(self.reserved)} reserved "
            f"({self.slots} slots of {mib(self.slot_bytes)}, each with room for {self.grouped_rows or 'no'} "
            f"grouped rows, {self.slots_in_use} in use), "
            f"idle result buffers {mib(self.idle_buffers)}"
            + (f", network rings {mib(self.network)}" if self.network else "")
        )


@dataclass(frozen=True)
class MemoryReport(CommunicatorMemory):
    """One communicator's, and beside it those of the same team: this rank with the same others.

    Attributes:
        others: the team's other communicators, which have other shapes, the oldest first.
    """

    others: tuple[CommunicatorMemory, ...] = ()

    def __str__(self) -> str:
        return "\n".join(f"commlib memory: {text}" for text in (super().__str__(), *map(str, self.others)))


def report_memory(mine: Communicator) -> MemoryReport:
    """The report for one communicator, and for its team."""
    others = (CommunicatorMemory(*_memory_of(c)) for c in mine.team.communicators if c is not mine)
    return MemoryReport(*_memory_of(mine), others=tuple(others))


def _memory_of(c: Communicator) -> tuple[str, int, int, int, int, int, int, int, int, int]:
    s = c.settings
    return (
        f"{s.num_experts} experts on {c.size} ranks, top {s.topk}, rows of {s.hidden} {str(s.dtype)[6:]}",
        c.attached,
        c.core.heap_bytes,
        c.core.slot_bytes,
        c.core.touched_bytes,
        c.backend.idle_bytes,
        c.core.network_memory,
        c.settings.grouped_rows,
        c.slots,
        c.core.slots_in_use,
    )
