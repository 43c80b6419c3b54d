"""Checks that ranks have the same things to send, before they send them.

Otherwise backends of torch.distributed end the process (gloo), hang, or add up what does not belong
together.
"""

from __future__ import annotations

import hashlib
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from commlib.startup.group import gather_in

if TYPE_CHECKING:
    from .shards import Shard


class Agreement:
    """A block in which each rank finds out what it would send: after it all ranks go on, or none does.

    All ranks of the group enter it. An exception in the block is raised; ranks without one raise ValueError.

    Attributes:
        lines: what this rank sends, in that order.
        mask: may differ by rank.
        same_mask: afterwards, whether the mask is the same on all ranks.

    Args:
        group: None: there are no other ranks.
        wrong, advice: what an error says first and last.

    Raises:
        ValueError: ranks have different lines; on all of them, with the first difference.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        wrong: str = "the model differs by rank",
        advice: str = "All ranks must have the same model, and train the same parameters (requires_grad)",
    ) -> None:
        self.group, self.wrong, self.advice = group, wrong, advice
        self.lines: list[str] = []
        self.mask: list[bool] = []
        self.same_mask = True

    def __enter__(self) -> Agreement:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        if self.group is None or not (error is None or isinstance(error, Exception)):
            return
        why = None if error is None else f"{type(error).__name__}: {error}"
        numbers = [number_of([str(why), *self.lines]), number_of([str(has) for has in self.mask])]
        gathered = gather_in(self.group, torch.tensor(numbers, device=_device_for(self.group)))
        same, self.same_mask = ((gathered == gathered[0]).all(0)).tolist()
        if not same:
            everywhere: list[Any] = [None] * self.group.size()
            dist.all_gather_object(everywhere, (why, self.lines), group=self.group)
            if error is None:
                raise ValueError(self._difference(everywhere))

    def _difference(self, everywhere: list[tuple[str | None, list[str]]]) -> str:
        assert self.group is not None
        ranks = dist.get_process_group_ranks(self.group)
        for rank, (why, _) in zip(ranks, everywhere, strict=True):
            if why is not None:
                return f"rank {rank} cannot take part, and nothing has been sent: {why}"
        first = everywhere[0][1]
        other = next(i for i, (_, lines) in enumerate(everywhere) if lines != first)
        found = difference(ranks[0], first, ranks[other], everywhere[other][1])
        return f"{self.wrong}: {found}. Nothing of it has been sent. {self.advice}"


def _device_for(group: dist.ProcessGroup) -> torch.device:
    """A device that the group's backends take numbers from: the CPU if they take them there."""
    here = "cpu:" in dist.get_backend_config(group)
    return torch.device("cpu") if here else torch.device("cuda", torch.cuda.current_device())


def describe(name: str, t: Tensor, shard: Shard | None = None) -> str:
    """A line for a tensor, the same on all ranks of a shard, although each has rows for other experts."""
    sizes = list(map(str, t.shape))
    if shard is not None and sizes:
        sizes[0] = f"{shard.total} on {shard.ranks.size} ranks"
    return f"{name} [{', '.join(sizes)}] {str(t.dtype).removeprefix('torch.')}"


def number_of(lines: list[str]) -> int:
    """A hash that is the same on every rank, as ``hash`` is not."""
    digest = hashlib.blake2b("\n".join(lines).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big", signed=True)


def difference(rank: int, lines: list[str], other: int, others: list[str]) -> str:
    """The first difference between the lines of two ranks."""
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
