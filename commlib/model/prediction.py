"""How long dispatch and combine take, and what limits: the longest of five times. docs/model.md, "Times"."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

from commlib.arguments import as_int
from commlib.model.checks import check_number, keep_int
from commlib.model.hardware import Hardware
from commlib.model.routing import UniformRouting

# Bytes of a row of `hidden` elements. fp8 has one fp32 scale for each 128 elements, like DeepEP's.
ROW_BYTES: dict[str, Callable[[int], int]] = {
    "fp8": lambda hidden: hidden + 4 * -(-hidden // 128),
    "bf16": lambda hidden: 2 * hidden,
    "fp16": lambda hidden: 2 * hidden,
    "fp32": lambda hidden: 4 * hidden,
    "fp64": lambda hidden: 8 * hidden,
}


@dataclass(frozen=True)
class Config:
    """What is dispatched and combined. All ranks have the same.

    Args:
        ranks: R.
        tokens: T, on each rank.
        hidden: elements of a row.
        topk, experts: K and E; see UniformRouting.
        dispatch_dtype, combine_dtype: a key of ROW_BYTES.
        ranks_per_node: L; None: all ranks are on one node.
        ranks_per_device: ranks that share a GPU (in-process ranks) or a host's memory (the CPU backend);
            no row between them crosses a link. More than 1 needs a single node.
        node_limit: see UniformRouting.
        direct: rows go straight to the ranks of other nodes (latency mode), not through a gateway.
        dedup: a row goes once to a rank that owns several of its experts; False: once for each expert.
        imbalance: rows of the busiest rank over the mean, at least 1, besides what uneven ownership adds.

    Raises:
        ValueError, TypeError: a value that makes no sense; the text names it.
    """

    ranks: int
    tokens: int
    hidden: int
    topk: int
    experts: int
    dispatch_dtype: str = "bf16"
    combine_dtype: str = "bf16"
    ranks_per_node: int | None = None
    ranks_per_device: int = 1
    node_limit: int | None = None
    direct: bool = False
    dedup: bool = True
    imbalance: float = 1.0

    def __post_init__(self) -> None:
        for name in ("ranks", "tokens", "hidden", "topk", "experts"):
            keep_int(self, name, 1)
        for name in ("dispatch_dtype", "combine_dtype"):
            if getattr(self, name) not in ROW_BYTES:
                raise ValueError(f"{name} must be one of {', '.join(ROW_BYTES)}, got {getattr(self, name)!r}")
        for name in ("ranks_per_node", "node_limit"):
            if getattr(self, name) is not None:
                keep_int(self, name, 1)
        if self.ranks % self.node_size:
            raise ValueError(f"ranks_per_node={self.node_size} does not divide ranks={self.ranks}")
        keep_int(self, "ranks_per_device", 1, self.node_size)
        if self.ranks % self.ranks_per_device or (self.ranks_per_device > 1 and self.nodes > 1):
            raise ValueError(
                f"ranks_per_device={self.ranks_per_device} must divide the ranks of a single node, "
                f"got {self.ranks} ranks on {self.nodes} nodes"
            )
        if self.imbalance != 1.0:
            check_number("imbalance", self.imbalance, least=1.0)
        _ = self.routing  # checks the rest

    @property
    def node_size(self) -> int:
        """L, ranks of a node."""
        return self.ranks if self.ranks_per_node is None else self.ranks_per_node

    @property
    def nodes(self) -> int:
        return self.ranks // self.node_size

    @cached_property
    def routing(self) -> UniformRouting:
        return UniformRouting(self.experts, self.topk, self.ranks, self.nodes, self.node_limit)

    @property
    def row_bytes(self) -> tuple[int, int]:
        """Bytes of a row in dispatch, and in combine."""
        return ROW_BYTES[self.dispatch_dtype](self.hidden), ROW_BYTES[self.combine_dtype](self.hidden)

    @cached_property
    def traffic(self) -> Traffic:
        return Traffic.of(self)


@dataclass(frozen=True)
class Traffic:
    """Expected rows of the busiest rank (docs/model.md, "Traffic"). Combine moves the same rows back.

    Attributes:
        received: rows that arrive at a rank, its own tokens' included.
        node_rows: (token, node) pairs of a rank's tokens, its own node included.
        link: rows that cross a device's link in one direction, the busier one.
        network: rows that cross its network in one direction, the busier one.
        stores: rows that a rank's SMs store in dispatch.
        loads: rows that they load in combine.
        memory: rows read and written in a device's memory.
    """

    received: float
    node_rows: float
    link: float
    network: float
    stores: float
    loads: float
    memory: float

    @staticmethod
    def of(config: Config) -> Traffic:
        ranks, by_node, node_pairs = _rows_per_token(config)
        two_hop = config.nodes > 1 and not config.direct
        link, network = (_two_hop if two_hop else _direct)(config, ranks, by_node, node_pairs)
        forwarded = config.nodes * max(by_node) if two_hop else sum(ranks)
        received = config.ranks * max(ranks)
        busy = config.tokens * config.imbalance
        return Traffic(
            received=busy * received,
            node_rows=config.tokens * sum(node_pairs),
            link=busy * link,
            network=busy * network,
            stores=busy * (forwarded + (1 if two_hop else 0)),
            loads=busy * (forwarded + (sum(node_pairs) if two_hop else 0)),
            memory=busy * (config.ranks_per_device * (1 + received) + (2 * network if two_hop else 0)),
        )


PerToken = Sequence[float]


def _rows_per_token(config: Config) -> tuple[PerToken, PerToken, PerToken]:
    """Rows that one token has at each rank, at all ranks of each node, and (token, node) pairs by node."""
    routing, size = config.routing, config.node_size
    ranks: PerToken = routing.rank_share
    if not config.dedup:
        ranks = [config.topk * routing.experts_on(r) / config.experts for r in range(config.ranks)]
    by_node = [sum(ranks[v * size : (v + 1) * size]) for v in range(config.nodes)]
    return ranks, by_node, routing.node_share if config.dedup else by_node


def _direct(config: Config, ranks: PerToken, by_node: PerToken, _: PerToken) -> tuple[float, float]:
    """The busiest device's rows over link and network, for one token of each rank; all rows go straight."""
    size, shared, total = config.node_size, config.ranks_per_device, sum(ranks)
    others = config.ranks - size
    network = max(max(w * others for w in ranks), max(total - near for near in by_node))
    if shared == size:  # one device
        return 0.0, network
    incoming = max(w * (size - shared) for w in ranks)
    outgoing = max(by_node[r // size] - shared * w for r, w in enumerate(ranks))
    return shared * max(incoming, outgoing), network


def _two_hop(config: Config, ranks: PerToken, by_node: PerToken, node_pairs: PerToken) -> tuple[float, float]:
    """The same where a row goes once to a node, to the rank with its source's index there, and on from it."""
    nodes = config.nodes
    incoming = max(w * (config.ranks - nodes) for w in ranks)
    outgoing = max(nodes * (by_node[r // config.node_size] - w) for r, w in enumerate(ranks))
    total = sum(node_pairs)
    network = max(max(q * (nodes - 1), total - q) for q in node_pairs)
    return max(incoming, outgoing), network


@dataclass(frozen=True)
class Operation:
    """A predicted dispatch or combine. GB/s are 1e9 bytes per second.

    Attributes:
        seconds: from its begin to its end on the busiest rank.
        limit: what limits it: "link", "network", "SMs", "memory" or "latency".
        parts: seconds that each of these would take alone.
        link_gbps, network_gbps: bytes that cross them, one direction.
        nvlink_gbps: rows that a rank receives, its own included: "NVLink bottleneck bandwidth" of DeepEP V1,
            the logical one of V2, "NVLink" of UCCL.
        rdma_gbps: (token, node) pairs of a rank, its own node included: "RDMA bottleneck bandwidth" of DeepEP
            V1, the logical one of V2.
        selection_gbps: K rows for each token: "RDMA bandwidth" in tables of latency modes.
    """

    seconds: float
    limit: str
    parts: dict[str, float]
    link_gbps: float
    network_gbps: float
    nvlink_gbps: float
    rdma_gbps: float
    selection_gbps: float


@dataclass(frozen=True)
class Prediction:
    """Dispatch and combine of a Config on some Hardware with ``num_sms`` SMs."""

    hardware: str
    num_sms: int
    dispatch: Operation
    combine: Operation

    @property
    def seconds(self) -> float:
        """Of both operations."""
        return self.dispatch.seconds + self.combine.seconds

    def __str__(self) -> str:
        lines = [f"{self.hardware}, {self.num_sms} SMs for communication"]
        for name, op in (("dispatch", self.dispatch), ("combine", self.combine)):
            lines.append(
                f"{name:8}  {op.seconds * 1e6:8.1f} us, bound by {op.limit}: "
                f"{op.nvlink_gbps:.0f} GB/s received, {op.link_gbps:.0f} over the link, "
                f"{op.network_gbps:.0f} over the network"
            )
        return "\n".join(lines)


def predict(hardware: Hardware, config: Config, num_sms: int) -> Prediction:
    """Predict dispatch and combine.

    An operation takes its latency plus the longest of the times that link, network, SMs and memory need.

    Args:
        hardware: a preset, or measured.
        num_sms: SMs (threads, where the hardware is a host) that communicate on each rank.

    Raises:
        ValueError: more SMs than there are, or traffic over a link or network that the hardware lacks.
    """
    num_sms = as_int("num_sms", num_sms, 1, hardware.sms)
    sizes, traffic = config.row_bytes, config.traffic
    # Threads may outnumber cores; then they share them.
    workers = min(num_sms, hardware.sms / config.ranks_per_device)
    dispatch = _operation(hardware, config, sizes[0], traffic.stores / (workers * hardware.dispatch_sm_gbps))
    combine = _operation(hardware, config, sizes[1], traffic.loads / (workers * hardware.combine_sm_gbps))
    return Prediction(hardware.name, num_sms, dispatch, combine)


def _operation(hardware: Hardware, config: Config, row: int, sm_rows_per_gbps: float) -> Operation:
    traffic = config.traffic
    scale = row / 1e9  # from rows / (GB/s) to seconds
    parts = {
        "link": scale * _over("link", traffic.link, hardware.link_gbps, hardware),
        "network": scale * _over("network", traffic.network, hardware.network_gbps, hardware),
        "SMs": scale * sm_rows_per_gbps,
        "memory": scale * traffic.memory / hardware.memory_gbps,
        "latency": hardware.latency_us * 1e-6,
    }
    limit = max(parts, key=parts.__getitem__)
    longest = max(value for name, value in parts.items() if name != "latency")
    seconds = parts["latency"] + longest
    return Operation(
        seconds=seconds,
        limit=limit,
        parts=parts,
        link_gbps=scale * traffic.link / seconds,
        network_gbps=scale * traffic.network / seconds,
        nvlink_gbps=scale * traffic.received / seconds,
        rdma_gbps=scale * traffic.node_rows / seconds,
        selection_gbps=scale * config.tokens * config.topk / seconds,
    )


def _over(name: str, rows: float, gbps: float | None, hardware: Hardware) -> float:
    if rows == 0:
        return 0.0
    if gbps is None:
        raise ValueError(f"{hardware.name} has no {name} ({name}_gbps is None), but rows would cross it")
    return rows / gbps
