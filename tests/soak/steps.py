"""The steps of a run: what users do with a communicator, each checked against plain PyTorch."""

from __future__ import annotations

import contextlib
import functools
import gc
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from exchange import check, unbounded
from reference import (
    World,
    apply_experts,
    copies_of_tokens,
    expected_combine,
    expected_expert_layout,
    expected_rank_layout,
    expert_scale,
    tolerance,
)

import commlib
from soak.plan import WORLDS, Plan

ALIGN = 4


class Reference:
    """What a rank must get, computed before the run begins, so that ranks do not wait for it."""

    def __init__(self, plan: Plan, rank: int) -> None:
        self.worlds, self.rank = plan.worlds(), rank
        for world in range(WORLDS):
            for choice in (False, True):
                self.dispatched(world, grouped=choice)
                self.combined(world, weighted=choice)
            self.copies(world)

    @functools.cache  # noqa: B019  # as long as its process
    def dispatched(self, world: int, grouped: bool) -> Any:
        if grouped:
            return expected_expert_layout(self.worlds[world], self.rank, ALIGN)
        return expected_rank_layout(self.worlds[world], self.rank)

    @functools.cache  # noqa: B019
    def combined(self, world: int, weighted: bool) -> torch.Tensor:
        """The sum of experts' results for each token."""
        w = self.worlds[world]
        weights = w.topk_weights if weighted else [torch.ones_like(t) for t in w.topk_weights]
        return expected_combine(replace(w, topk_weights=weights), self.rank)

    @functools.cache  # noqa: B019
    def copies(self, world: int) -> torch.Tensor:
        """The sum of the rows sent for each token."""
        w = self.worlds[world]
        return copies_of_tokens(w, self.rank) * w.x[self.rank].double()


@contextlib.contextmanager
def _reused(ep: commlib.ExpertParallel) -> Iterator[None]:
    """Fill memory that has become free with values, and check that they stay until all is done."""
    gc.collect()
    mine = [torch.full((size,), 7.0) for size in (8, 64, 512, 4096, 1 << 16) for _ in range(16)]
    yield
    ep.synchronize()
    assert all(bool((values == 7.0).all()) for values in mine), "an operation wrote into memory of others"


class Step:
    """One step of one rank.

    Args:
        middle: called where operations may be under way.
        drops: this rank lets go of an asynchronous dispatch and of all that it uses.
    """

    def __init__(
        self,
        plan: Plan,
        rank: int,
        number: int,
        reference: Reference,
        ep: commlib.ExpertParallel,
        middle: Callable[[], None],
        drops: bool,
    ) -> None:
        shared, own = plan.draw_for(number), plan.draw_for(number, rank)
        self.kind = "dropped" if drops else plan.steps[number]
        self.rank, self.reference, self.ep, self.middle = rank, reference, ep, middle
        self.at = shared.randrange(WORLDS)
        self.world: World = reference.worlds[self.at]
        experts = self.world.experts_of(rank)
        self.scales = torch.tensor([expert_scale(e) for e in experts] or [0.0], dtype=torch.float64)
        # Exact, so that rows of another step are not taken for this one's.
        self.scale = 2.0 ** shared.randint(0, 3)
        # The fault "other_call" must differ from all calls of steps: it has no weights, and overflow="drop",
        # which means nothing where the communicator grows.
        differs = plan.grows and any(fault.kind == "other_call" for fault in plan.faults)
        self.weighted = shared.random() < 0.7 or differs
        self.grouped = shared.random() < 0.5
        self.in_place = own.random() < 0.5  # grouped rows of y, where they may be
        self.x = self.world.x[rank] * self.scale
        self.idx = self.world.topk_idx[rank]
        self.weights = self.world.topk_weights[rank] if self.weighted else None

    def run(self) -> None:
        getattr(self, f"_{self.kind}")()

    # -- what a step can be

    def _sync(self) -> None:
        d = self.dispatch()
        self.check(d)
        self.middle()
        self.check_sum(self.combine(d))

    def _asynchronous(self) -> None:
        d = self.dispatch(async_op=True)
        self.middle()
        d.event.wait()
        self.check(d)
        out, event = self.combine(d, async_op=True)
        event.wait()
        self.check_sum(out)

    def _waves(self) -> None:
        self.grouped = True
        d = self.dispatch(async_op=True, in_waves=True)
        self.middle()
        want = self.reference.dispatched(self.at, True)
        for expert in range(self.ep.num_local_experts):
            d.wait_expert(expert)
            rows = slice(*want.offsets[expert : expert + 2])
            torch.testing.assert_close(d.x[rows], want.x[rows] * self.scale, rtol=0, atol=0)
        d.event.wait()
        self.check(d)
        self.check_sum(self.combine(d))

    def _handle(self) -> None:
        handle = self.dispatch().handle
        self.middle()
        self.scale *= 2
        again = self.ep.dispatch(self.x * 2, None, self.weights, handle=handle)
        self.check(again)
        self.check_sum(self.combine(again))

    def _zero_copy(self) -> None:
        self.grouped = False
        d = self.dispatch(zero_copy=True)
        self.middle()
        self.check(d)
        self.check_copies(self.ep.combine(d.x, d.handle))

    def _buffer(self) -> None:
        self.grouped = False
        d = self.dispatch()
        rows = self.ep.combine_buffer(d.handle).copy_(d.x)
        self.middle()
        self.check_copies(self.ep.combine(rows, d.handle))

    def _queued(self) -> None:
        self.grouped = False
        under_way = []
        for _ in range(3):
            d = self.dispatch(async_op=True)
            under_way.append((d, *self.ep.combine(d.x, d.handle, previous_event=d.event, async_op=True)))
        self.middle()
        for d, out, event in under_way:
            event.wait()
            self.check(d)
            self.check_copies(out)

    def _bounded(self) -> None:
        settings = self.ep.settings
        if settings.grows:  # results of one size are not to be had
            return self._asynchronous()
        if settings.capacity_on(self.ep.size) < self.ep.size * settings.max_tokens:
            self.grouped = False
        d = self.dispatch(bounded=True, async_op=True)
        self.middle()
        d.event.wait()
        self.check(unbounded(d))
        self.check_sum(self.combine(d))

    def _quantized(self) -> None:
        settings, scale_bytes = self.ep.settings, 4
        if self.x.dtype == torch.float64 or self.x.shape[1] + scale_bytes > self.x.shape[1] * self.x.itemsize:
            return self._bounded()  # such rows are not converted, or have no room
        d = self.dispatch(quantize="int8", bounded=not settings.grows and not self.grouped, async_op=True)
        self.middle()
        d.event.wait()
        if d.handle.bounded:
            d = replace(unbounded(d), scales=d.scales[: int(d.num_rows)])
        want = self.reference.dispatched(self.at, self.grouped)
        y = want.x * self.scale
        rows, scales = commlib.quantize(y, "int8")
        there = d.source[:, 0] >= 0
        assert torch.equal(d.x[there], rows[there]) and torch.equal(d.scales[there], scales[there])
        assert not d.x[~there].any()
        weights = want.topk_weights if self.weighted else None
        check(replace(d, x=y), replace(want, x=y, topk_weights=weights))

    def _backward(self) -> None:
        self.x.requires_grad_()
        d = self.dispatch()
        out = self.combine(d)
        self.middle()
        out.backward(self.x.detach())  # both are linear in x: its gradient is then what out is
        self.check_sum(out.detach())
        self.check_sum(self.x.grad)

    def _crowded(self) -> None:
        """All rows of all ranks to one of them: more than it has room for, unless it grows."""
        self.idx = torch.full_like(self.idx, -1)
        self.idx[:, 0] = 0
        self.weights = self.world.topk_weights[self.rank]  # unlike the call of the fault "other_call"
        tokens = [len(x) for x in self.world.x]
        grows = self.ep.settings.grows
        capacity = sum(tokens) if grows else self.ep.settings.capacity_on(self.ep.size)
        if sum(tokens) > capacity:
            with pytest.raises(commlib.CapacityExceeded, match=f"would receive {sum(tokens)} rows"):
                self.ep.dispatch(self.x, self.idx, self.weights)
        d = self.ep.dispatch(self.x, self.idx, self.weights, overflow="drop")
        self.middle()
        everyones = torch.cat(self.world.x)[:capacity] * self.scale
        assert torch.equal(d.x, everyones if 0 in self.world.experts_of(self.rank) else everyones[:0])
        kept = max(0, min(len(self.x), capacity - sum(tokens[: self.rank])))
        out = self.ep.combine(d.x, d.handle)
        assert torch.equal(out[:kept], self.x[:kept]) and not out[kept:].any()

    def _dropped(self) -> None:
        """An asynchronous step that lets go of all that only the operations under way need."""
        self.idx = self.idx.clone()
        if self.weighted:
            self.weights = self.weights.clone()
        d = replace(self.dispatch(async_op=True), event=None)
        self.x = self.idx = self.weights = None
        with _reused(self.ep):
            self.middle()
        self.check(d)
        self.combine(d, async_op=True)
        with _reused(self.ep):
            del d

    # -- parts of them

    def dispatch(self, **options: Any) -> commlib.Dispatched:
        layout = {"layout": "expert", "align": ALIGN} if self.grouped else {"layout": "rank"}
        return self.ep.dispatch(self.x, self.idx, self.weights, **layout, **options)

    def combine(self, d: commlib.Dispatched, **options: Any) -> Any:
        """Of rows that have gone through their experts."""
        if self.grouped:
            y = apply_experts(self.world, self.rank, d.x, d.offsets.tolist())
            if self.in_place and not y.requires_grad and self.ep._comm.can_group_in_slot(len(y)):
                y = self.ep.combine_buffer(d.handle).copy_(y)
            return self.ep.combine(y, d.handle, weights=d.topk_weights, **options)
        here = d.topk_idx >= 0
        factors = self.scales[d.topk_idx.clamp(min=0)] * here
        if self.weighted:
            factors = factors * d.topk_weights.double()
        y = (d.x.double() * factors.sum(1, keepdim=True)).to(d.x.dtype)
        return self.ep.combine(y, d.handle, **options)

    def check(self, d: commlib.Dispatched) -> None:
        want = self.reference.dispatched(self.at, self.grouped)
        weights = want.topk_weights if self.weighted else None
        check(d, replace(want, x=want.x * self.scale, topk_weights=weights))

    def check_sum(self, out: torch.Tensor) -> None:
        self._check_near(out, self.reference.combined(self.at, self.weighted))

    def check_copies(self, out: torch.Tensor) -> None:
        self._check_near(out, self.reference.copies(self.at))

    def _check_near(self, out: torch.Tensor, want: torch.Tensor) -> None:
        near = tolerance(self.world.dtype, 8 * self.world.topk)
        torch.testing.assert_close(out.double(), want * self.scale, **near)
