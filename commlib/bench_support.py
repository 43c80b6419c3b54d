"""For benchmarks: the best that this machine can do for a given routing."""

from __future__ import annotations

from torch import Tensor

from commlib._core import CpuCommunicator
from commlib.dispatched import Handle
from commlib.expert_parallel import ExpertParallel
from commlib.operations import rows_of, view_of


class BareMover:
    """Moves the rows of a dispatch and of its combine with the same stores and loads, and no protocol.

    No plan, no counts, no metadata, no flags, no waiting: each rank stores its rows into slot 0 of the
    others, or sums rows from there, with one thread. It says how fast the machine moves these rows, so that
    a benchmark can print its share of that. All ranks use it together while no slot is in use.

    Args:
        ep: the communicator.
        x: ``[T, hidden]``, the rows.
        handle: of a dispatch of those rows. Layout "expert": grouped rows go straight to their places, and
            combine reads all of them.
    """

    def __init__(self, ep: ExpertParallel, x: Tensor, handle: Handle) -> None:
        assert isinstance(ep._comm.core, CpuCommunicator), "only CPUs have a bare mover"
        self._core = ep._comm.core
        self._keep = handle._plan, x
        self._view = view_of(handle._plan, handle._ep.num_local_experts, handle._grouped)
        self._rows = rows_of(x, None, None, ep._comm.own)
        self._out = ep._comm.new_rows(handle.num_tokens)

    def send(self) -> None:
        """Dispatch's stores."""
        self._core.bare_send(self._rows, self._view)

    def pull(self) -> None:
        """Combine's loads, sums and stores."""
        self._core.bare_pull(self._view, self._out.data_ptr())
