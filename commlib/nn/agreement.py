"""Whether ranks have the same to send, before they send it.

Where they have not, backends of torch.distributed end the process (gloo), hang, or add up what does not
belong together.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from commlib.group import gather_in

if TYPE_CHECKING:
    from .shards import Shard


def is_same_everywhere(
    lines: list[str], mask: Iterable[bool], group: dist.ProcessGroup | None, device: torch.device
) -> bool:
    """Check that all ranks say the same lines, and find out whether they say the same mask. All call it.

    Args:
        lines: what this rank sends, in that order.
        mask: may differ by rank.
        group: None: torch.distributed's default group.
        device: for what is gathered.

    Raises:
        ValueError: ranks say different lines; on all of them, with the first difference.
    """
    known = dist.group.WORLD if group is None else group
    assert known is not None
    said = torch.tensor([_number(lines), _number([str(has) for has in mask])], device=device)
    same = [bool((column == column[0]).all()) for column in gather_in(known, said).cpu().unbind(1)]
    if not same[0]:
        everywhere: list[Any] = [None] * dist.get_world_size(known)
        dist.all_gather_object(everywhere, lines, group=known)
        other = next(rank for rank, theirs in enumerate(everywhere) if theirs != everywhere[0])
        first, second = (dist.get_global_rank(known, rank) for rank in (0, other))
        raise ValueError(
            f"the model differs by rank: {_difference(first, everywhere[0], second, everywhere[other])}. "
            "Nothing of it has been sent. All ranks must have the same model, and train the same parameters "
            "(requires_grad)"
        )
    return same[1]


def describe(name: str, t: Tensor, shard: Shard | None) -> str:
    """A line for a tensor, the same on all ranks of a shard, each of which has rows for other experts."""
    sizes = list(map(str, t.shape))
    if shard is not None and sizes:
        sizes[0] = f"{shard.total} on {shard.ep.size} ranks"
    return f"{name} [{', '.join(sizes)}] {str(t.dtype).removeprefix('torch.')}"


def _number(lines: list[str]) -> int:
    """The same on every rank, which ``hash`` is not."""
    digest = hashlib.blake2b("\n".join(lines).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big", signed=True)


def _difference(rank: int, lines: list[str], other: int, others: list[str]) -> str:
    here, there = set(lines), set(others)
    only = next((line for line in lines if line not in there), None)
    only_other = next((line for line in others if line not in here), None)
    if only is None and only_other is None:
        at = next(i for i, line in enumerate(lines) if line != others[i])
        return f"its parts are in another order, {lines[at]} on rank {rank} is {others[at]} on rank {other}"
    said = [
        f"rank {number} has {line}"
        for number, line in ((rank, only), (other, only_other))
        if line is not None
    ]
    if len(said) == 1:
        said.append(f"rank {rank if only is None else other} has no such one")
    return ", ".join(said)
