"""A whole MoE layer, forward and backward: the same MoELayer in sequence, in chunks, and as two batches.

It has a shared expert, of the size of the others. The link is so slow that dispatch and combine (forward and
backward: four operations) take about as long as all experts do. In sequence the layer takes the sum of the
two and a little more; docs/overlap.md says what overlap can reach. Efficiency is max(t_communication,
t_compute) / t, where the two are the operations alone and the experts alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import commlib
from bench.harness.ranks import Case, Ranks, interleaved
from bench.harness.workload import TOLERANCE, LinkRows, Shape, WrongResults, distance
from bench.overlap_matmul import PARTED, Samples, computing, reached
from commlib.nn import MoELayer, TopKRouter
from commlib.overlap import TwoBatch

COMMUNICATION, COMPUTE, SEQUENCE, TWO_BATCHES = (
    "communication alone",
    "experts alone",
    "in sequence",
    "two batches",
)
ALONE = (COMMUNICATION, COMPUTE, COMPUTE + PARTED)
OPERATIONS = 4  # dispatch and combine, and the adjoint of each
WARMUP = 2


@dataclass(frozen=True)
class LayerPlan:
    """What is measured."""

    shape: Shape
    ffn_hidden: int
    chunks: Sequence[int]
    iters: int


@dataclass(frozen=True)
class LayerResult:
    """Seconds of a forward and a backward, iteration by iteration."""

    num_sms: int
    link_gbps: float
    samples_s: Samples


class SharedExpert(nn.Module):
    """The expert that every token goes through: the same network as the others (SwiGLU)."""

    def __init__(self, hidden: int, ffn_hidden: int, **options: Any) -> None:
        super().__init__()
        self.w1, self.w3 = (nn.Linear(hidden, ffn_hidden, bias=False, **options) for _ in range(2))
        self.w2 = nn.Linear(ffn_hidden, hidden, bias=False, **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Layer:
    """One rank's layer and batch, and the ways to run it."""

    def __init__(self, ranks: Ranks, plan: LayerPlan) -> None:
        self._ranks, self._shape, shape = ranks, plan.shape, plan.shape
        sizes = (shape.hidden, plan.ffn_hidden, shape.experts, shape.topk)
        options: dict[str, Any] = dict(dtype=shape.dtype, device=ranks.device)
        self.shared = SharedExpert(*sizes[:2], **options)
        whole = MoELayer(*sizes, None, shared=self.shared, **options) if ranks.rank == 0 else None
        self.unsharded = ranks.gather(whole)[0]
        with self.open_ep() as ep:
            self.layer = MoELayer(*sizes, ep, **options)
            self._take_weights()
            generator = torch.Generator(ranks.device).manual_seed(shape.seed * 4096 + ranks.rank)
            draw: dict[str, Any] = dict(generator=generator, device=ranks.device)
            self.x, self.upstream = (
                torch.randn(shape.tokens, shape.hidden, **draw).to(shape.dtype) for _ in range(2)
            )
            self.topk_idx = self.layer.router(self.x).topk_idx
            d = ep.dispatch(self.x, self.topk_idx, layout="expert", align=self.layer.align)
            self.rows, self.offsets = d.x.clone(), d.offsets
        self.x.requires_grad_()
        self.rows.requires_grad_()
        self.parameters = dict([*self.layer.named_parameters(), *self.shared.named_parameters("shared")])

    def _take_weights(self) -> None:
        """Take the weights of the unsharded layer."""
        mine = slice(self.layer.experts.first, self.layer.experts.first + len(self.layer.experts.w1))
        for name, weight in self.layer.experts.named_parameters():
            weight.copy_(self.unsharded.experts.get_parameter(name)[mine])
        assert isinstance(self.layer.router, TopKRouter) and isinstance(self.unsharded.router, TopKRouter)
        self.layer.router.weight.copy_(self.unsharded.router.weight)
        self.shared.load_state_dict(self.unsharded.shared.state_dict())

    def open_ep(self, **options: Any) -> commlib.ExpertParallel:
        return commlib.ExpertParallel(
            self._ranks.group, device=self._ranks.device, **options, **self._shape.sizes
        )

    def clear(self) -> None:
        """Drop all gradients."""
        for leaf in (self.x, self.rows, *self.parameters.values()):
            leaf.grad = None

    def run(self, forward: Callable[[Tensor], Tensor]) -> Tensor:
        """Forward and backward; then parameters and x have their gradients."""
        self.clear()
        with torch.enable_grad():
            out = forward(self.x)
            out.backward(self.upstream)
        return out.detach()

    def in_sequence(self, ep: commlib.ExpertParallel) -> Tensor:
        self._set(ep, chunks=1, shared=None)
        return self.run(lambda x: self.layer(x)[0] + self.shared(x))

    def in_chunks(self, ep: commlib.ExpertParallel, chunks: int) -> Tensor:
        self._set(ep, chunks, self.shared)
        return self.run(lambda x: self.layer(x)[0])

    def two_batches(self, ep: commlib.ExpertParallel) -> Tensor:
        self._set(ep, 1, self.shared)
        return self.run(lambda x: torch.cat([out for out, _ in TwoBatch(self.layer.steps)(*x.chunk(2))]))

    def _set(self, ep: commlib.ExpertParallel, chunks: int, shared: nn.Module | None) -> None:
        self.layer.ep, self.layer.overlap_chunks, self.layer.shared = ep, chunks, shared

    def communicate(self, ep: commlib.ExpertParallel) -> Tensor:
        """The layer's dispatch and combine, forward and backward, with nothing in between."""

        def forward(x: Tensor) -> Tensor:
            d = ep.dispatch(x, self.topk_idx, layout="expert", align=self.layer.align)
            return ep.combine(d.x, d.handle)

        return self.run(forward)

    def compute(self) -> None:
        """The experts, forward and backward, on the rows that they get in the layer."""
        self.clear()
        with torch.enable_grad():
            out = self.layer.experts(self.rows, self.offsets)
            torch.autograd.backward([out, self.shared(self.x)], [out.detach(), self.upstream])

    def link_gbps(self) -> float:
        """The rate at which the layer's rows take as long as its experts do. Called by all ranks."""
        seconds = self._ranks.fastest(Case(self.compute))
        local_experts = self._shape.experts // self._ranks.size
        mine = LinkRows.of(self.topk_idx, local_experts, self._ranks.rank)
        rows = LinkRows.busiest(self._ranks.gather(mine)).unique
        return OPERATIONS * rows * self._shape.hidden * self._shape.dtype.itemsize / seconds / 1e9

    def check(self, ways: dict[str, Case]) -> None:
        """Raise WrongResults on all ranks unless each way gives the values and gradients of the one before,
        and the first those of the layer on one rank."""
        wrong: list[str] = []
        with torch.enable_grad():
            out = self.unsharded(self.x)[0]
            (gradient,) = torch.autograd.grad(out, self.x, self.upstream)
        want = {"output": out.detach(), "gradient of x": gradient}
        for name, way in ways.items():
            with way.inside():
                got = {"output": way.operation(), "gradient of x": self.x.grad}
            # Ranks that share a GPU share the driver, too: a rank that reads a value before the others have
            # queued their part of it keeps them from doing so.
            self._ranks.gather(None)
            got |= {f"gradient of {n}": p.grad for n, p in self.parameters.items()}
            off = {part: distance(got[part], value) for part, value in want.items()}
            limit = TOLERANCE[self._shape.dtype]
            wrong += [f"{name}: {part} is {e:.1e} off" for part, e in off.items() if not e <= limit]
            want = got
        wrong = [text for texts in self._ranks.gather(wrong) for text in texts]
        if wrong:
            raise WrongResults("\n".join(wrong))


def measure(ranks: Ranks, layer: Layer, plan: LayerPlan, link_gbps: float, num_sms: int) -> LayerResult:
    """Called by all ranks, with the SMs (CPU: threads) for the communication of each.

    Raises:
        WrongResults: ways differ in their values or gradients.
    """
    partition = ranks.partition(num_sms)
    with ExitStack() as stack:
        limits: dict[str, Any] = dict(num_sms=num_sms, link_gbps=link_gbps)
        ep = stack.enter_context(layer.open_ep(**limits))
        ways = {SEQUENCE: Case(partial(layer.in_sequence, ep))}
        ways |= {f"{n} chunks": Case(partial(layer.in_chunks, ep, n)) for n in plan.chunks}
        ways[TWO_BATCHES] = Case(partial(layer.two_batches, ep))
        alone = {COMMUNICATION: Case(partial(layer.communicate, ep)), COMPUTE: Case(layer.compute)}
        if partition is not None:
            own = stack.enter_context(layer.open_ep(partition=partition, **limits))
            inside = partial(computing, partition, None)
            ways |= {
                f"{n} chunks{PARTED}": Case(partial(layer.in_chunks, own, n), inside) for n in plan.chunks
            }
            alone[COMPUTE + PARTED] = Case(layer.compute, inside)
        for _ in range(WARMUP):
            layer.check(ways)
        samples = interleaved(ranks, alone | ways, plan.iters, "layer")
    return LayerResult(num_sms, link_gbps, samples)


def efficiency(samples: Samples, way: str) -> float:
    """max(t_communication, t_compute on its share) / t, of medians."""
    return reached(samples, way, alone(way))


def alone(way: str) -> tuple[str, str]:
    """The times that a way is compared with."""
    return COMMUNICATION, COMPUTE + PARTED if way.endswith(PARTED) else COMPUTE


def speed_ups(samples: Samples, way: str) -> list[float]:
    """The time in sequence over that of a way, iteration by iteration."""
    return [a / b for a, b in zip(samples[SEQUENCE], samples[way], strict=True)]
