"""Between this module and commlib: communicators, made when a call shows which are needed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from commlib.dispatched import Handle
from commlib.event import Event
from commlib.expert_parallel import ExpertParallel
from commlib.startup.group import Group, ThreadGroup

_NARROW_BYTES, _NARROW_SMS = 4096, 2  # shorter rows are counts and weights, which need few SMs


class _Key(NamedTuple):
    experts: int
    topk: int
    width: int  # elements of a row
    dtype: torch.dtype
    device: torch.device
    max_tokens: int | None  # None: it grows


class Communicators:
    """The communicators of one buffer. Making one is collective: ranks need the same ones in the same order.

    Args:
        group: of the ranks.
        num_sms: how many SMs a communicator takes on a GPU.
        timeout: seconds that a rank waits for a peer; None: commlib's own.
    """

    def __init__(self, group: Group, num_sms: Callable[[], int], timeout: float | None = None) -> None:
        self.group = group
        self._num_sms, self._timeout = num_sms, timeout
        self._made: dict[_Key, ExpertParallel] = {}
        self._everyones: dict[_Key, Handle] = {}  # routes by which a row goes to every rank
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def of(
        self,
        experts: int,
        topk: int,
        width: int,
        dtype: torch.dtype,
        device: torch.device,
        max_tokens: int | None = None,
    ) -> ExpertParallel:
        """The communicator for rows of ``width`` elements; without ``max_tokens`` of a rank it grows."""
        key = _Key(experts, topk, width, dtype, device, max_tokens)
        if key not in self._made:
            self._made[key] = ExpertParallel(self.group, **self._settings(key))
        return self._made[key]

    def _settings(self, key: _Key) -> dict[str, Any]:
        num_sms = None
        if key.device.type == "cuda":
            narrow = key.width * key.dtype.itemsize < _NARROW_BYTES
            num_sms = _NARROW_SMS if narrow else self._num_sms()
            if isinstance(self.group, ThreadGroup):  # ranks that share the GPU
                num_sms = max(1, num_sms // self.group.size)
        return {
            "num_experts": key.experts,
            "hidden": key.width,
            "topk": key.topk,
            "max_tokens": key.max_tokens,
            "dtype": key.dtype,
            "device": key.device,
            "num_sms": num_sms,
            "timeout": self._timeout,
            "exclusive": True,  # DeepEP's buffers are independent of each other
        }

    def along(self, handle: Handle, width: int, dtype: torch.dtype) -> tuple[ExpertParallel, Handle]:
        """The routing of a dispatch for rows of another width or dtype: their communicator, and its handle.

        The dispatch must be done: another communicator does not wait for it.
        """
        known = handle._ep.settings
        if (known.hidden, known.dtype) == (width, dtype):
            assert isinstance(handle._ep, ExpertParallel)  # perhaps another buffer's
            return handle._ep, handle
        most = None if known.grows else known.max_tokens
        ep = self.of(known.num_experts, known.topk, width, dtype, known.device, most)
        return ep, handle.on(ep)

    def share(self, numbers: Tensor) -> tuple[Tensor, Event]:
        """``[n]`` int32 of each rank, as ``[ranks, n]`` on every rank once the event has been waited for.

        A dispatch of one row to each rank, whose routes are known after the first time: from then on the host
        waits for nothing.
        """
        ranks, width, device = self.group.size, len(numbers), numbers.device
        key = _Key(ranks, 1, width, torch.float32, device, ranks)
        ep = self.of(*key)
        rows = numbers.to(torch.int32).repeat(ranks, 1).view(torch.float32)
        if key not in self._everyones:
            everyone = torch.arange(ranks, device=device).view(-1, 1)
            self._everyones[key] = ep.dispatch(rows, everyone).handle
        shared = ep.dispatch(rows, handle=self._everyones[key], async_op=True)
        assert shared.event is not None
        return shared.x.view(torch.int32), shared.event

    def stream(self, device: torch.device) -> torch.cuda.Stream:
        """This buffer's stream on a GPU."""
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        return self._streams[device]

    def close(self) -> None:
        """Finish what is under way, and tell the other ranks."""
        self._everyones.clear()
        while self._made:
            self._made.popitem()[1].close()
