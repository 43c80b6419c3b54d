"""
commlib's C++ core: the CPU backend, and what all backends have in common.

Arguments named by address take ``tensor.data_ptr()``; shapes and types are checked in Python.
"""

from __future__ import annotations

import collections.abc
import typing

import typing_extensions

__all__: list[str] = [
    "MAX_RANKS",
    "MAX_SLOTS",
    "MAX_TOPK",
    "CombineInput",
    "Communicator",
    "Config",
    "Conversion",
    "CpuCommunicator",
    "DType",
    "Memory",
    "NetConfig",
    "PendingDispatch",
    "Placement",
    "Quantization",
    "Received",
    "RoutePlan",
    "RowFormat",
    "Rows",
    "SlotLease",
    "SpinPolicy",
    "Team",
    "Ticket",
    "Weighing",
    "available_vector_ops",
    "close_way_back",
    "load_ucx",
    "multicast",
    "quantize",
    "reduce",
    "type_names",
    "weigh",
    "when_gone",
]

class Placement:
    """
    Which rank owns which expert: contiguous blocks.

    Their sizes differ by one at most.

    Raises:
        ValueError: fewer than one of either, more than 2**20 experts, or more than 4095 ranks.
    """
    def __init__(self, experts: int, ranks: int) -> None: ...
    def experts_of(self, rank: int) -> range:
        """
        The experts of one rank. Raises IndexError where there is no such rank.
        """
    @property
    def owners(self) -> list[int]:
        """
        The owner of each expert.
        """

class DType:
    """
    The elements of rows.

    Members:

      bf16

      f16

      f32

      f64
    """

    __members__: typing.ClassVar[dict[str, DType]]
    bf16: typing.ClassVar[DType]
    f16: typing.ClassVar[DType]
    f32: typing.ClassVar[DType]
    f64: typing.ClassVar[DType]
    @typing.overload
    def __eq__(self, other: DType) -> bool: ...
    @typing.overload
    def __eq__(self, other: typing.Any) -> bool: ...
    def __getstate__(self) -> int: ...
    def __hash__(self) -> int: ...
    def __index__(self) -> int: ...
    def __init__(self, value: typing.SupportsInt | typing.SupportsIndex) -> None: ...
    def __int__(self) -> int: ...
    @typing.overload
    def __ne__(self, other: DType) -> bool: ...
    @typing.overload
    def __ne__(self, other: typing.Any) -> bool: ...
    def __repr__(self) -> str: ...
    def __setstate__(self, state: typing.SupportsInt | typing.SupportsIndex) -> None: ...
    def __str__(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def value(self) -> int: ...

class SpinPolicy:
    """
    How long a wait burns its core before it sleeps.
    """
    def __init__(self, pauses: int, yields: int) -> None: ...

class NetConfig:
    """
    Ranks on other nodes.

    Attributes:
        node_of: by rank; empty: all share one node.
        hierarchical: one gateway for each node, or each rank its own.
        chunk_bytes: 0: what suits.
        chunks: 0: what suits.
    """

    chunk_bytes: int
    chunks: int
    hierarchical: bool
    node_of: list[int]

class Team:
    """
    All communicators of one rank with the same other ranks.
    """
    def __init__(self) -> None: ...
    @property
    def has_given_up(self) -> bool:
        """
        Whether one of them has ever given up.
        """

class Config:
    """
    What a communicator is made from.

    Attributes:
        size: ranks.
        max_tokens: of one rank, in one dispatch.
        capacity: rows that a rank can receive.
        grouped_rows: for as many rows grouped by expert a slot has room; 0: they lie in none.
        num_sms: threads (CPU) or blocks (CUDA).
        timeout: seconds.
        link_gbps: emulated limit of this rank's link, in GB/s; 0: none.
        first_epoch: for tests.
        vector_ops: CPU: one of available_vector_ops(), or empty: the widest.
        cores: CPU: that threads may run on; empty: any.
        device: CUDA: its number.
        stream: CUDA: of communication; 0 on the CPU.
        plan_stream: CUDA: of plans; 0: the same.
        share: CUDA: how heaps reach other processes, "fd", "fabric" or "none".
    """

    capacity: int
    cores: list[int]
    device: int
    dtype: DType
    experts: int
    first_epoch: int
    grouped_rows: int
    hidden: int
    link_gbps: float
    max_tokens: int
    net: NetConfig
    num_sms: int
    plan_stream: int
    rank: int
    share: str
    size: int
    slots: int
    spin: SpinPolicy
    stream: int
    team: Team
    timeout: float
    topk: int
    vector_ops: str
    def __init__(self) -> None: ...
    def use_ucx(self, keys: list[tuple[bytes, bytes]], loopback: bool) -> None:
        """
        Reach other nodes over UCX. Keys by rank: what messages to it show, and what those from it must show.
        """

class RowFormat:
    """
    The rows of one operation, and the scales beside each.

    Without arguments: the communicator's own rows.
    """
    @typing.overload
    def __init__(self) -> None: ...
    @typing.overload
    def __init__(self, type: int, bytes: int, scale_bytes: int = 0) -> None: ...
    @property
    def is_own(self) -> bool: ...

class Quantization:
    """
    What rows are converted to as they are sent.

    Members:

      none

      fp8_e4m3

      fp8_e4m3_ue8m0

      mxfp8

      int8
    """

    __members__: typing.ClassVar[dict[str, Quantization]]
    fp8_e4m3: typing.ClassVar[Quantization]
    fp8_e4m3_ue8m0: typing.ClassVar[Quantization]
    int8: typing.ClassVar[Quantization]
    mxfp8: typing.ClassVar[Quantization]
    none: typing.ClassVar[Quantization]
    @typing.overload
    def __eq__(self, other: Quantization) -> bool: ...
    @typing.overload
    def __eq__(self, other: typing.Any) -> bool: ...
    def __getstate__(self) -> int: ...
    def __hash__(self) -> int: ...
    def __index__(self) -> int: ...
    def __init__(self, value: typing.SupportsInt | typing.SupportsIndex) -> None: ...
    def __int__(self) -> int: ...
    @typing.overload
    def __ne__(self, other: Quantization) -> bool: ...
    @typing.overload
    def __ne__(self, other: typing.Any) -> bool: ...
    def __repr__(self) -> str: ...
    def __setstate__(self, state: typing.SupportsInt | typing.SupportsIndex) -> None: ...
    def __str__(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def value(self) -> int: ...

class Conversion:
    """
    Of rows as they are sent, from so many elements of a type.

    Without arguments: they go as they are.
    """
    @typing.overload
    def __init__(self) -> None: ...
    @typing.overload
    def __init__(self, to: Quantization, dtype: DType, elements: int) -> None: ...

class Rows:
    """
    The rows that a rank sends.
    """
    def __init__(
        self,
        x: int,
        stride: int,
        count: int,
        has_weights: bool,
        weights: int,
        scales: int = 0,
        scales_stride: int = 0,
        format: RowFormat = ...,
        conversion: Conversion = ...,
    ) -> None: ...

class RoutePlan:
    """
    What a dispatch finds, and later operations use again.
    """
    def __init__(
        self,
        topk_idx: int,
        routes: int,
        places: int,
        tokens: int,
        rows: int = 0,
        expand_to: int = 0,
        offsets: int = 0,
        rows_per_expert: int = 0,
        align: int = 1,
        fixed: int = 0,
        totals: int = 0,
        results: int = 0,
        most_rows: int = 0,
        padded: int = 0,
    ) -> None: ...
    def complete(self, rows: int, expand_to: int) -> None:
        """
        What a dispatch knows once counts are here.
        """

class Weighing:
    """
    The gradient of a combine with weights, taken as its rows come.

    A row of y gets its weight times what has come for it, and its dot the product of y with what has come.
    """
    @typing.overload
    def __init__(self) -> None: ...
    @typing.overload
    def __init__(self, y: int, stride: int, weights: int, dots: int, dtype: DType) -> None: ...

class Received:
    """
    Where received rows go. Rows None: they stay in their slot.
    """
    def __init__(
        self,
        rows: int | None,
        weights: int,
        topk_idx: int = 0,
        source: int = 0,
        scales: int = 0,
        count: int = 0,
        weighing: Weighing = ...,
        zero_rest: bool = False,
        groups: int = 0,
        groups_words: int = 0,
    ) -> None: ...

class CombineInput:
    """
    The rows that a combine sums, and what goes with them.
    """
    def __init__(
        self,
        y: int,
        count: int,
        stride: int,
        weights: int,
        has_weight_grads: bool,
        weight_grads: int,
        bias: int,
        bias_stride: int,
        format: RowFormat = ...,
        dtype: DType = ...,
    ) -> None: ...

class SlotLease:
    """
    Holds one slot until it is destroyed.
    """

class Memory:
    """
    Rows that keep their memory alive; torch.from_dlpack takes them.
    """
    def __dlpack__(self, **kwargs) -> typing_extensions.CapsuleType: ...
    def __dlpack_device__(self) -> tuple[int, int]: ...

class Ticket:
    """
    An asynchronous operation.
    """
    @property
    def begun(self) -> float: ...
    @property
    def done(self) -> bool: ...
    @property
    def ended(self) -> float: ...

class PendingDispatch:
    """
    A dispatch whose counts are known.

    Its rows have not moved yet or, in waves, may be moving.
    """
    @property
    def dropped(self) -> int: ...
    @property
    def grouped_in_slot(self) -> bool:
        """
        They come grouped by expert, and stay in their slot.
        """
    @property
    def lease(self) -> SlotLease: ...
    @property
    def results(self) -> int:
        """
        Rows, or rows in groups with their padding.
        """
    @property
    def rows(self) -> int:
        """
        Unique rows.
        """

class Communicator:
    """
    One rank of an expert-parallel group.
    """
    def absence_of(self, rank: int, departed_too: bool) -> tuple[str, list[int]] | None:
        """
        Why a rank does nothing more ("exited", "lost" or "departed"), and whom to blame; or None.
        """
    def address(self) -> tuple[int, int, int, bytes, bytes]:
        """
        What the other ranks need to connect.
        """
    def begin_dispatch(
        self,
        routing: RoutePlan,
        has_weights: bool,
        drop: bool,
        in_waves: bool,
        grouped_in_slot: bool = False,
        caller: int = 0,
        format: RowFormat = ...,
    ) -> PendingDispatch:
        """
        Plan, and learn how many rows come.

        Fills in routes, rows_per_expert and offsets.

        Raises:
            ValueError: an expert id that there is not, or a format for which slots have no room.
            CapacityExceeded: on all ranks alike, unless `drop`.
        """
    def check_health(self) -> None:
        """
        Raise what has failed. Does not wait.
        """
    def close(self) -> None:
        """
        Finish what is under way, and tell the others.
        """
    def combine(
        self,
        input: CombineInput,
        routing: RoutePlan,
        out: int,
        out_weights: int,
        async_op: bool,
        keep: typing.Any,
        caller: int = 0,
    ) -> Ticket | None: ...
    def connect(self, peers: list[tuple[int, int, int, bytes, bytes]]) -> None:
        """
        Map the heaps of the others, whose addresses these are by rank.
        """
    def dispatch_bounded(
        self,
        rows: Rows,
        routing: RoutePlan,
        received: Received,
        drop: bool,
        async_op: bool,
        keep: typing.Any,
        caller: int = 0,
    ) -> tuple[Ticket | None, SlotLease]:
        """
        Plan and move the rows, without waiting for how many come.
        """
    def finish_dispatch(
        self,
        pending: PendingDispatch,
        rows: Rows,
        routing: RoutePlan,
        received: Received,
        async_op: bool,
        keep: typing.Any,
    ) -> Ticket | None:
        """
        Move the rows. Keeps `keep` until they have moved; None: a stream orders what comes after.
        """
    def give_up(self, why: str, blamed: list[int] = []) -> None:
        """
        The other ranks need not wait: they are told to blame these ranks, or else this one.
        """
    def lend_slot(self, once: bool) -> SlotLease:
        """
        A slot to write rows for a combine into; once: good for one, after which nothing is written there.
        """
    def note_uses(self, addresses: list[int], stream: int) -> None:
        """
        CUDA: `stream` may still use the tensors at these addresses when they go.
        """
    def redispatch(
        self,
        rows: Rows,
        routing: RoutePlan,
        received: Received,
        async_op: bool,
        keep: typing.Any,
        caller: int = 0,
    ) -> tuple[Ticket | None, SlotLease]:
        """
        Move the rows of other tensors along a known routing.
        """
    def set_timeout(self, seconds: float) -> None: ...
    def synchronize(self) -> None:
        """
        Wait for all operations issued.
        """
    def view(self, lease: SlotLease, rows: int, format: RowFormat = ..., scales: bool = False) -> Memory:
        """
        Rows in a slot, or their scales; as bytes where they are not the communicator's own.
        """
    def wait(self, ticket: Ticket) -> None: ...
    def wait_event(self, event: int) -> None:
        """
        CUDA: wait for an event of the communication stream.
        """
    def wait_expert(self, dispatch: PendingDispatch, ticket: Ticket | None, expert: int, stream: int) -> None:
        """
        Of a dispatch in waves: wait for the rows of one of this rank's experts.
        """
    @property
    def heap_bytes(self) -> int: ...
    @property
    def is_usable(self) -> bool: ...
    @property
    def network_memory(self) -> int: ...
    @property
    def network_refused(self) -> int: ...
    @property
    def network_sent(self) -> tuple[int, int]:
        """
        Messages and bytes, to other nodes.
        """
    @property
    def plan_stream(self) -> int: ...
    @property
    def slot_bytes(self) -> int: ...
    @property
    def slots_in_use(self) -> int: ...
    @property
    def touched_bytes(self) -> int: ...

class CpuCommunicator(Communicator):
    """
    A rank on the CPU.
    """
    def __init__(self, config: Config) -> None: ...
    def bare_pull(self, routing: RoutePlan, out: int) -> None:
        """
        For benchmarks: one worker pulls the rows, and nothing else.
        """
    def bare_send(self, rows: Rows, routing: RoutePlan) -> None:
        """
        For benchmarks: one worker sends the rows, and nothing else.
        """
    def new_rows(self, rows: int) -> Memory:
        """
        Memory that is used again when it has gone.
        """
    @property
    def idle_bytes(self) -> int: ...
    @property
    def vector_ops(self) -> str: ...

def available_vector_ops() -> list[str]:
    """
    What this processor runs, the widest first.
    """

def close_way_back() -> None:
    """
    At the end of the program: threads other than the main one that are still in the core stay there.
    """

def load_ucx(paths: collections.abc.Sequence[str]) -> str:
    """
    Load UCX from the first of these that loads; its version.

    Raises:
        RuntimeError: what went wrong with each.
    """

def multicast(name: str, dst: list[int], src: int, bytes: int) -> None:
    """
    For tests: store one row in many places, in this vector width.
    """

def quantize(name: str, how: Conversion, rows: int, scales: int, src: int) -> None:
    """
    For tests: convert a row, in this vector width.
    """

def reduce(name: str, dtype: DType, dst: int, src: list[int], weights: list[int], elements: int) -> None:
    """
    For tests: sum rows, each times its weight, in this vector width.
    """

def type_names() -> list[str]:
    """
    What rows and scales may be, by number from 1.
    """

def weigh(name: str, dtype: DType, dst: int, row: int, weight: int, y: int, elements: int, dot: int) -> None:
    """
    For tests: a row times its weight, and its product with another one, in this vector width.
    """

def when_gone(object: typing.Any, function: collections.abc.Callable[[], None]) -> None:
    """
    Call a function when an object has gone; a Ctrl-C meanwhile is not lost.
    """

MAX_RANKS: int = 64
MAX_SLOTS: int = 255
MAX_TOPK: int = 32
