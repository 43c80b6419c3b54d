"""For benchmarks: what this machine can do at best for a given routing."""

from __future__ import annotations

import time

from torch import Tensor

from commlib.expert_parallel import ExpertParallel, Handle
from commlib.ops import _routing_view, _rows


def bare_limit(ep: ExpertParallel, x: Tensor, handle: Handle) -> tuple[float, float]:
    """Move the rows of a dispatch and of its combine with the same stores and loads, and no protocol.

    No plan, no counts, no flags, no waiting: each rank stores its rows into slot 0 of the others, then sums
    rows from there, with one thread. All ranks call it together while no slot is in use. It says how fast
    the machine moves these rows, so that a benchmark can print its share of that.

    Returns:
        This rank's seconds for dispatch and for combine; the job's are the largest of all ranks.
    """
    routing = handle._tensors()
    view = _routing_view(routing, grouped=False)
    rows = _rows(x, None)
    out = ep._new_rows(handle.num_tokens)
    ep.group.barrier()
    start = time.perf_counter()
    ep._core.bare_send(rows, view)
    sent = time.perf_counter() - start
    ep.group.barrier()
    start = time.perf_counter()
    ep._core.bare_pull(view, out.data_ptr())
    return sent, time.perf_counter() - start
