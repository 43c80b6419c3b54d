"""What one run does, drawn from its seed: ranks, shapes, steps, and what goes wrong in them."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

import torch
from reference import World, make_world

from soak.faults import KINDS, START, Fault

STEPS = (
    "sync",
    "sync",
    "asynchronous",
    "waves",
    "handle",
    "zero_copy",
    "buffer",
    "queued",
    "backward",
    "bounded",
    "quantized",
    "crowded",
)
LEAVES = ("with", "close", "drop", "exit")  # how ranks end the communicator; "exit": one rank by exiting
DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32, "f64": torch.float64}
PATIENCE = 60.0  # a communicator's timeout where nothing waits for it: longer than a run may take
# Where a fault is a hang, once all ranks have started. A busy machine may keep one from running for a second.
HASTE = 5.0
START_HASTE = 6.0  # where a rank does not start
WORLDS = 2  # routings that steps take in turns


@dataclass(frozen=True)
class Plan:
    """One run."""

    seed: int
    tokens: tuple[int, ...]  # of each rank
    node: int  # consecutive ranks of a node
    routing: str
    network: str  # UCX_TLS; "": its own choice
    experts: int
    topk: int
    hidden: int
    dtype: str
    slots: int
    sms: int
    grows: bool  # max_tokens is not known, and there is room for one row at first
    steps: tuple[str, ...]
    faults: tuple[Fault, ...]
    leave: str

    @property
    def ranks(self) -> int:
        return len(self.tokens)

    @property
    def start_timeout(self) -> float:
        """Seconds, to make the communicator."""
        missing = any(fault.step == START and KINDS[fault.kind].harms for fault in self.faults)
        return START_HASTE if missing else PATIENCE

    @property
    def timeout(self) -> float:
        """Seconds, once all have started."""
        return HASTE if any(KINDS[fault.kind].hangs for fault in self.faults) else PATIENCE

    def worlds(self) -> list[World]:
        """Inputs of all ranks."""
        shape = list(self.tokens), self.experts, self.topk, self.hidden, DTYPES[self.dtype]
        return [make_world(*shape, seed=WORLDS * self.seed + i) for i in range(WORLDS)]

    def capacity(self, worlds: list[World]) -> int:
        """Room for the rows that any rank receives, but not for all rows of all ranks."""
        received = [
            sum(int(((idx >= experts.start) & (idx < experts.stop)).any(1).sum()) for idx in world.topk_idx)
            for world in worlds
            for experts in map(world.experts_of, range(self.ranks))
        ]
        return max(1, *received)

    def draw_for(self, step: int, rank: int | None = None) -> random.Random:
        """Choices of a step: those that all ranks share, or a rank's own."""
        return random.Random(f"{self.seed} {step} {rank}")

    def __str__(self) -> str:
        several = f"nodes of {self.node}, {self.routing}{f' over {self.network}' if self.network else ''}"
        nodes = "1 node" if self.node >= self.ranks else several
        faults = "; ".join(map(str, self.faults))
        return (
            f"{self.ranks} ranks, {nodes}, {'+'.join(map(str, self.tokens))} tokens, top-{self.topk} of "
            f"{self.experts}, {self.hidden} {self.dtype}, {self.slots} slots, {self.sms} threads, "
            f"{'growing, ' if self.grows else ''}"
            f"{' '.join(self.steps)}, {self.leave}: {faults}"
        )


def draw(seed: int, kinds: list[str]) -> Plan:
    """The plan of a seed, with faults of these kinds."""
    g = random.Random(seed)
    ranks = g.randint(2, 8)
    experts = g.randint(2, 16)
    several = g.random() < 0.4
    big = g.random() < 0.2  # a fault may then come while rows are on their way
    steps = g.choices(STEPS, k=g.randint(4, 12))
    faults = _draw_faults(g, kinds, ranks, len(steps))
    for fault in faults:
        if fault.kind == "drop":  # the other ranks make the same calls
            steps[fault.step] = "asynchronous"
    return Plan(
        seed=seed,
        tokens=tuple(g.choices((0, 1, 9, 16, 24), k=ranks)),
        node=g.randint(1, ranks - 1) if several else ranks,
        routing=g.choice(("direct", "hierarchical")),
        network=g.choice(("", "tcp")),
        experts=experts,
        topk=g.randint(1, min(4, experts)),
        hidden=8192 if big else g.choice((8, 33, 64, 256)),
        dtype=g.choice(list(DTYPES)),
        slots=g.randint(4, 8),
        sms=g.randint(1, 2),
        grows=random.Random(f"{seed} grows").random() < 0.25,  # separate, so that older seeds draw as before
        steps=tuple(steps),
        faults=faults,
        leave=g.choice(LEAVES),
    )


def _draw_faults(g: random.Random, kinds: list[str], ranks: int, steps: int) -> tuple[Fault, ...]:
    """One or two, at different ranks."""
    count = 2 if ranks > 2 and g.random() < 0.3 else 1
    return tuple(_draw_fault(g, g.choice(kinds), victim, steps) for victim in g.sample(range(ranks), count))


def _draw_fault(g: random.Random, kind: str, victim: int, steps: int) -> Fault:
    starting = KINDS[kind].at_start and g.random() < 0.1
    return Fault(
        kind=kind,
        victim=victim,
        step=START if starting else g.randrange(steps),
        middle=not starting and g.random() < 0.5,
        delay=g.choice((0.0, 0.0005, 0.002, 0.01, 0.03)),
        choice=g.randrange(4),
    )


def with_plant(plan: Plan, plant: str) -> Plan:
    """The plan with one fault that no run may have, to test the soak itself."""
    fault = Fault(plant, victim=plan.ranks - 1, step=1, middle=False, delay=0.0, choice=0)
    return replace(plan, tokens=(9,) * plan.ranks, faults=(fault,))
