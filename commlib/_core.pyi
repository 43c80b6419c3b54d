"""The C++ core (csrc/bindings/core.cc). Arguments named by address take ``tensor.data_ptr()``."""

from collections.abc import Callable, Sequence
from typing import ClassVar

MAX_RANKS: int
MAX_SLOTS: int
MAX_TOPK: int

class CombineInput:
    def __init__(
        self,
        y: int,
        stride: int,
        weights: int,
        has_weight_grads: bool,
        weight_grads: int,
        bias: int,
        bias_stride: int,
        format: RowFormat = ...,
        dtype: DType = ...,
    ) -> None: ...

class Communicator:
    def address(self) -> tuple[int, int, int, bytes, bytes]: ...
    def begin_dispatch(
        self,
        routing: RoutePlan,
        has_weights: bool,
        drop: bool,
        in_waves: bool,
        caller: int = ...,
        format: RowFormat = ...,
    ) -> PendingDispatch: ...
    def check_health(self) -> None: ...
    def close(self) -> None: ...
    def combine(
        self,
        input: CombineInput,
        routing: RoutePlan,
        out: int,
        out_weights: int,
        async_op: bool,
        keep: object,
        caller: int = ...,
    ) -> Ticket | None: ...
    def connect(self, arg0: Sequence[tuple[int, int, int, bytes, bytes]]) -> None: ...
    def finish_dispatch(
        self,
        pending: PendingDispatch,
        rows: Rows,
        routing: RoutePlan,
        received: Received,
        async_op: bool,
        keep: object,
    ) -> Ticket | None: ...
    def give_up(self, arg0: str) -> None: ...
    def has_exited(self, arg0: int) -> bool: ...
    def lend_slot(self) -> SlotLease: ...
    def note_uses(self, addresses: Sequence[int], stream: int) -> None: ...
    def redispatch(
        self,
        rows: Rows,
        routing: RoutePlan,
        received: Received,
        async_op: bool,
        keep: object,
        caller: int = ...,
    ) -> tuple[Ticket | None, SlotLease]: ...
    def set_timeout(self, arg0: float) -> None: ...
    def synchronize(self) -> None: ...
    def view(self, lease: SlotLease, rows: int, format: RowFormat = ..., scales: bool = ...) -> Memory: ...
    def wait(self, arg0: Ticket) -> None: ...
    def wait_event(self, event: int) -> None: ...
    def wait_expert(
        self, dispatch: PendingDispatch, ticket: Ticket | None, expert: int, stream: int
    ) -> None: ...
    @property
    def heap_bytes(self) -> int: ...
    @property
    def is_usable(self) -> bool: ...
    @property
    def plan_stream(self) -> int: ...
    @property
    def slot_bytes(self) -> int: ...
    @property
    def slots_in_use(self) -> int: ...
    @property
    def touched_bytes(self) -> int: ...
    @property
    def network_memory(self) -> int: ...
    @property
    def network_sent(self) -> tuple[int, int]: ...
    @property
    def network_refused(self) -> int: ...

class CpuCommunicator(Communicator):
    def __init__(self, config: Config) -> None: ...
    def bare_pull(self, arg0: RoutePlan, arg1: int) -> None: ...
    def bare_send(self, arg0: Rows, arg1: RoutePlan) -> None: ...
    def new_rows(self, arg0: int) -> Memory: ...
    @property
    def idle_bytes(self) -> int: ...
    @property
    def vector_ops(self) -> str: ...

class Config:
    capacity: int
    cores: list[int]
    device: int
    dtype: DType
    experts: int
    first_epoch: int
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
    def use_ucx(self, keys: list[tuple[bytes, bytes]], loopback: bool) -> None: ...

class DType:
    bf16: ClassVar[DType] = ...
    f16: ClassVar[DType] = ...
    f32: ClassVar[DType] = ...
    f64: ClassVar[DType] = ...
    def __init__(self, value: int) -> None: ...
    @property
    def name(self) -> str: ...
    @property
    def value(self) -> int: ...

class Memory:
    def __dlpack__(self, **kwargs: object) -> object: ...
    def __dlpack_device__(self) -> tuple[int, int]: ...

class NetConfig:
    node_of: list[int]
    hierarchical: bool
    chunk_bytes: int
    chunks: int

class PendingDispatch:
    @property
    def dropped(self) -> int: ...
    @property
    def lease(self) -> SlotLease: ...
    @property
    def results(self) -> int: ...
    @property
    def rows(self) -> int: ...

class Received:
    def __init__(
        self, rows: int | None, weights: int, topk_idx: int = ..., source: int = ..., scales: int = ...
    ) -> None: ...

class Placement:
    """Which rank owns which expert: contiguous blocks, whose sizes differ by one at most.

    Raises:
        ValueError: fewer than one of either, more than 2**20 experts, or more than 4095 ranks.
    """

    def __init__(self, experts: int, ranks: int) -> None: ...
    def experts_of(self, rank: int) -> range:
        """The experts of one rank. Raises IndexError where there is no such rank."""
    @property
    def owners(self) -> list[int]:
        """The owner of each expert."""

class RoutePlan:
    def __init__(
        self,
        topk_idx: int,
        routes: int,
        tokens: int,
        rows: int = ...,
        expand_to: int = ...,
        offsets: int = ...,
        rows_per_expert: int = ...,
        align: int = ...,
    ) -> None: ...
    def complete(self, rows: int, expand_to: int) -> None: ...

class RowFormat:
    def __init__(self, type: int = ..., bytes: int = ..., scale_bytes: int = ...) -> None: ...
    @property
    def is_own(self) -> bool: ...

class Rows:
    def __init__(
        self,
        x: int,
        stride: int,
        count: int,
        has_weights: bool,
        weights: int,
        scales: int = ...,
        scales_stride: int = ...,
        format: RowFormat = ...,
    ) -> None: ...

class SlotLease: ...

class SpinPolicy:
    def __init__(self, pauses: int, yields: int) -> None: ...

class Team:
    def __init__(self) -> None: ...
    @property
    def has_given_up(self) -> bool: ...

class Ticket:
    @property
    def begun(self) -> float: ...
    @property
    def ended(self) -> float: ...
    @property
    def done(self) -> bool: ...

def close_way_back() -> None: ...
def when_gone(arg0: object, arg1: Callable[[], None]) -> None: ...
def load_ucx(paths: Sequence[str]) -> str: ...
def available_vector_ops() -> list[str]: ...
def multicast(arg0: str, arg1: Sequence[int], arg2: int, arg3: int) -> None: ...
def reduce(
    arg0: str, arg1: DType, arg2: int, arg3: Sequence[int], arg4: Sequence[int], arg5: int
) -> None: ...
