"""Whole MoE layers that are compared: of the same weights, over commlib and over all-to-alls."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import commlib
from bench.harness.launch import Launch
from bench.harness.memory import PeakMemory
from bench.harness.workload import TOLERANCE, Shape, WrongResults, distance
from bench.systems.all_to_all_layer import AllToAllLayer, Exchange, MpiExchange, TorchExchange
from commlib.nn import MoELayer

COMMLIB, GLOO, MPI, NCCL = "commlib", "gloo all-to-all", "MPI all-to-all", "NCCL all-to-all"
CHOICES = {"commlib": COMMLIB, "gloo": GLOO, "mpi": MPI, "nccl": NCCL}
OPERATIONS = 4  # dispatch and combine, and the adjoint of each

Layer = Callable[[Tensor], Tensor]
Values = dict[str, Tensor]  # the output, and each gradient by its tensor's name


@dataclass(frozen=True)
class Place:
    """Where the ranks of a run are.

    Attributes:
        backend: of the process group for an all-to-all on a GPU; gloo stands in for NCCL in tests.
        network: ExpertParallel's arguments about nodes.
    """

    launch: Launch
    device: torch.device
    backend: str = "nccl"
    network: dict[str, Any] = field(default_factory=dict)


class Problem:
    """One rank's tokens, and the weights of the layer, which all systems have.

    Args:
        ffn_hidden: size of an expert's inner layer.
    """

    def __init__(self, place: Place, shape: Shape, ffn_hidden: int) -> None:
        self.place, self.shape, self._ffn_hidden = place, shape, ffn_hidden
        launch, device = place.launch, place.device
        ep = commlib.ExpertParallel(launch.ranks, device=device, **place.network, **shape.sizes)
        self._like = self._make(ep)
        ep.close()
        self.router, self.experts, self.align = self._like.router, self._like.experts, self._like.align
        generator = torch.Generator(device).manual_seed(shape.seed * 4096 + launch.rank)
        self.x, self.upstream = (
            torch.randn(shape.tokens, shape.hidden, generator=generator, device=device).to(shape.dtype)
            for _ in range(2)
        )
        self.x.requires_grad_()

    def _make(self, ep: commlib.ExpertParallel | None) -> MoELayer:
        """Make the layer; weights depend on the seed alone, not on how many ranks hold them."""
        torch.manual_seed(self.shape.seed)
        sizes = (self.shape.hidden, self._ffn_hidden, self.shape.experts, self.shape.topk)
        return MoELayer(*sizes, ep, dtype=self.shape.dtype, device=self.place.device)

    def over(self, ep: commlib.ExpertParallel) -> Layer:
        """The layer over a communicator, with the weights of all others."""
        layer = self._make(ep)
        layer.router, layer.experts = self.router, self.experts
        return lambda x: layer(x)[0]

    def run(self, layer: Layer) -> Tensor:
        """Forward and backward, which are timed."""
        self._leaves_are_clear()
        with torch.enable_grad():
            out = layer(self.x)
            out.backward(self.upstream)
        return out.detach()

    def values(self, layer: Layer) -> Values:
        """The results of a run."""
        found = {"output": self.run(layer)}
        for name, leaf in self._leaves().items():
            assert leaf.grad is not None
            found[f"gradient of {name}"] = leaf.grad.as_subclass(Tensor).clone()
        self._leaves_are_clear()
        return found

    def unsharded(self) -> Values:
        """The right values: of the layer in plain PyTorch, on all ranks' tokens. Called by all ranks."""
        whole, x = self._make(None), self.x.detach().requires_grad_()
        with torch.enable_grad():
            out, _ = whole(x)
            out.backward(self.upstream)
        found = {"output": out.detach(), "gradient of x": x.grad}
        found["gradient of router.weight"] = whole.router.weight.grad
        mine = slice(self.experts.first, self.experts.first + len(self.experts.w1))
        for name, weight in whole.experts.named_parameters():
            assert weight.grad is not None
            total = weight.grad.float().cpu()
            dist.all_reduce(total, group=self.place.launch.group)
            found[f"gradient of {name}"] = total[mine].to(self.place.device)
        return found

    def _leaves(self) -> dict[str, Any]:
        return {
            "x": self.x,
            "router.weight": self.router.weight,
            **dict(self.experts.named_parameters()),
        }

    def _leaves_are_clear(self) -> None:
        for leaf in self._leaves().values():
            leaf.grad = None

    def commlib_bytes(self) -> int:
        """Bytes of rows that this rank sends to others in a run, each once to a rank. Called by all ranks."""
        launch = self.place.launch
        with torch.no_grad():
            owner = self.router(self.x).topk_idx // len(self.experts.w1)
        to = [int((owner == rank).any(1).sum()) for rank in range(launch.size)]
        others = [sent for rank, sent in enumerate(launch.gather(to)) if rank != launch.rank]
        rows = sum(to) - to[launch.rank] + sum(sent[launch.rank] for sent in others)
        return OPERATIONS // 2 * rows * self.shape.hidden * self.shape.dtype.itemsize


@dataclass(frozen=True)
class System:
    """A layer that is ready, and what a run of it took.

    Attributes:
        sent_bytes: by this rank, to others.
        peak_bytes: of memory, above the level before the layer was made; None: unknown.
    """

    name: str
    run: Callable[[], Tensor]
    sent_bytes: int
    peak_bytes: int | None


class Systems:
    """The systems that can run here, made one after the other, each checked; a context manager.

    Attributes:
        skipped: why others cannot.
    """

    def __init__(self, problem: Problem, only: set[str]) -> None:
        self._problem, self._open, self.skipped = problem, ExitStack(), dict[str, str]()
        launch, gpu = problem.place.launch, problem.place.device.type == "cuda"
        stands_in = problem.place.backend != "nccl"
        makers: dict[str, Callable[[], tuple[Layer, Exchange | None]]] = {"commlib": self._commlib}
        if gpu or stands_in:
            makers["nccl"] = self._nccl
        else:
            makers |= {"gloo": self._gloo, "mpi": self._mpi}
            if launch.comm is None and "mpi" in only:
                self.skipped[MPI] = launch.no_mpi
                del makers["mpi"]
        self._makers = {name: make for name, make in makers.items() if name in only}

    def __enter__(self) -> Systems:
        return self

    def __exit__(self, *error: object) -> None:
        self._open.__exit__(*error)  # type: ignore[arg-type]

    def ready(self) -> list[System]:
        """The systems, checked. Called by all ranks.

        Raises:
            WrongResults: on all ranks: one system's output or gradients are not the unsharded layer's.
        """
        found, wrong, want = [], list[str](), self._problem.unsharded()
        for key, make in self._makers.items():
            found.append(self._measured(CHOICES[key], make, want, wrong))
        wrong = [text for texts in self._problem.place.launch.gather(wrong) for text in texts]
        if wrong:
            raise WrongResults("\n".join(wrong))
        return found

    def _measured(
        self,
        name: str,
        make: Callable[[], tuple[Layer, Exchange | None]],
        want: Values,
        wrong: list[str],
    ) -> System:
        problem = self._problem
        memory = PeakMemory(problem.place.device)
        layer, exchange = make()
        problem.run(layer)
        problem.run(layer)  # now slots and buffers that the first run leaves lent have been taken
        peak = memory.peak()
        before = exchange.sent_bytes if exchange else 0
        got = problem.values(layer)
        sent = exchange.sent_bytes - before if exchange else problem.commlib_bytes()
        limit, rank = TOLERANCE[problem.shape.dtype], problem.place.launch.rank
        off = {part: distance(got[part], value) for part, value in want.items()}
        wrong += [f"{name}, rank {rank}: {part} is {e:.1e} off" for part, e in off.items() if not e <= limit]
        return System(name, lambda: problem.run(layer), sent, peak)

    def _commlib(self) -> tuple[Layer, None]:
        problem, place = self._problem, self._problem.place
        ep = commlib.ExpertParallel(
            place.launch.ranks, device=place.device, **place.network, **problem.shape.sizes
        )
        self._open.callback(ep.close)
        return problem.over(ep), None

    def _over(self, exchange: Exchange) -> tuple[Layer, Exchange]:
        problem = self._problem
        layer = AllToAllLayer(problem.router, problem.experts, exchange, problem.align)
        return layer, exchange

    def _gloo(self) -> tuple[Layer, Exchange]:
        return self._over(TorchExchange(self._problem.place.launch.group))

    def _mpi(self) -> tuple[Layer, Exchange]:
        return self._over(MpiExchange(self._problem.place.launch.comm))

    def _nccl(self) -> tuple[Layer, Exchange]:
        group = dist.new_group(backend=self._problem.place.backend)
        self._open.callback(dist.destroy_process_group, group)
        return self._over(TorchExchange(group))
