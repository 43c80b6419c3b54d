"""Which way rows take to the groups of their experts. docs/model.md, "Grouped rows"."""

from __future__ import annotations

from commlib.model.checks import check_number
from commlib.model.routing import UniformRouting


def goes_direct(routing: UniformRouting, *, memory_gbps: float, link_gbps: float | None) -> bool:
    """Whether rows grouped by expert are there sooner if each crosses to a rank once for each expert.

    The sender then writes each row to all its places. The other way, a row crosses once to each rank, which
    reads it again and writes it to its groups. In combine the same bytes go back. So the first way saves
    memory's time, and takes more of the link's: for each byte of a token's row, with ``u`` ranks that own one
    of its K experts, of which ``u' = u * (R-1)/R`` are others,

    * direct: ``max(K * (R-1)/R / link, K / memory)``
    * once: ``max(u' / link, u / memory) + (u + K) / memory``

    Args:
        routing: of one node.
        memory_gbps: a rank's share of memory, bytes read plus bytes written.
        link_gbps: of its link to the other ranks; None: they share memory, and there is no other link.

    Raises:
        ValueError, TypeError: a rate that is no positive number.
    """
    check_number("memory_gbps", memory_gbps)
    if link_gbps is not None:
        check_number("link_gbps", link_gbps)
    memory, link = 1 / memory_gbps, 0.0 if link_gbps is None else 1 / link_gbps
    copies, ranks = routing.topk, routing.unique_ranks
    remote = (routing.ranks - 1) / routing.ranks
    direct = max(copies * remote * link, copies * memory)
    once = max(ranks * remote * link, ranks * memory) + (ranks + copies) * memory
    return direct < once
