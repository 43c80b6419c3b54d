"""Operations as values: what one is called with, and what it gives.

Each is described here and nowhere else: the ops of PyTorch (:mod:`commlib.ops`) take their schemas, shapes
and gradients from these fields, by name.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from commlib import _core


def words_of_groups(experts: int, grouped: bool) -> int:
    """Of ``RoutePlan.groups``, before the totals of a bounded dispatch."""
    return 2 * experts + 1 if grouped else experts


class RoutePlan(NamedTuple):
    """What a dispatch found out, as tensors: all that later operations on the same routing need.

    Nothing else holds those that are read again: ids, routes, groups, and local with layout="expert".
    """

    topk_idx: Tensor  # [T, K] global expert ids
    routes: Tensor  # [T, min(K, R)] rank << 32 | row at that rank, ascending; -1 ends
    local: Tensor  # [N, K] layout="rank": local expert ids; "expert": rows of d.x; -1: another rank's
    source: Tensor  # [N, 2] or [M, 2]: its length is that of d.x
    # tokens_per_expert [E_loc]; with layout="expert", offsets [E_loc + 1] follow; of a bounded dispatch, how
    # many unique rows there are, and how many rows were dropped here
    groups: Tensor
    # layout="expert": [T, K] rank << 32 | row in that rank's d.x, by rank, then place; -1 ends. Not filled in
    # where rows cannot lie so in slots.
    places: Tensor | None
    comm: Tensor  # [], see Attachment.name
    view: _core.RoutePlan | None = None  # the core's, of a plan whose sizes are known to fit each other

    def bounded(self, experts: int, grouped: bool) -> bool:
        """Whether it is of a bounded dispatch."""
        return self.groups.shape[0] > words_of_groups(experts, grouped)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What operations read."""
        return tuple(t for t in self[:6] if t is not None)


class Dispatch(NamedTuple):
    """A dispatch by expert ids."""

    x: Tensor  # [T, W]
    topk_idx: Tensor  # [T, K] int64
    topk_weights: Tensor | None  # [T, K] of the communicator's weight_dtype
    comm: Tensor
    width: int  # min(K, R), and how many local experts there are: sizes of results, for torch.compile
    experts: int
    grouped: bool  # layout="expert"
    align: int
    drop: bool
    zero_copy: bool
    scales: Tensor | None  # [T, S]
    # Bounds of a bounded dispatch, see commlib.settings.Bounds, and whether rows of the result that are none
    # are to be zero; else all 0.
    capacity: int = 0
    results: int = 0
    most_rows: int = 0
    padded: int = 0
    fixed: int = 0
    zero_rest: bool = False
    quantize: int = 0  # what x is converted to on the way: see commlib.quantization; 0: it is not

    @property
    def bounded(self) -> bool:
        return self.capacity > 0


class Arrived(NamedTuple):
    """Rows that a dispatch brought, and its routing."""

    rows: Tensor  # [N, W] or [M, W]
    weights: Tensor | None  # [N, K] or [M]
    counts: Tensor  # a copy of groups, which the user may change
    routes: Tensor
    local: Tensor
    source: Tensor
    groups: Tensor
    places: Tensor | None
    scales: Tensor | None
    view: _core.RoutePlan | None = None

    def plan(self, call: Dispatch) -> RoutePlan:
        """The routing, for later operations."""
        own = self.routes, self.local, self.source, self.groups, self.places
        return RoutePlan(call.topk_idx, *own, call.comm, self.view)


class Redispatch(NamedTuple):
    """A dispatch along a known routing, or the gradient of a combine."""

    x: Tensor
    topk_weights: Tensor | None
    plan: RoutePlan
    grouped: bool
    zero_copy: bool
    scales: Tensor | None
    y: Tensor | None = None  # [N, W] or [M, W]: rows that a combine has summed, x being its gradient, with
    y_weights: Tensor | None = None  # [N] or [M]; a row that comes is multiplied by each
    quantize: int = 0  # as in Dispatch


class Rearrived(NamedTuple):
    """Rows that came along a known routing."""

    rows: Tensor
    weights: Tensor | None
    scales: Tensor | None
    y_dots: Tensor | None  # [N] or [M]: the gradients of y_weights. (Those of y are the rows.)


class Combine(NamedTuple):
    """A combine, or the gradient of a dispatch."""

    y: Tensor  # [N, W] or [M, W]
    weights: Tensor | None  # [N] or [M]: of rows
    bias: Tensor | None  # [T, W]
    weight_grads: Tensor | None  # [N, K] or [M]: values of places, brought back to their tokens
    plan: RoutePlan
    grouped: bool


class Combined(NamedTuple):
    """Sums of rows, and what was brought back."""

    out: Tensor  # [T, W]
    weight_grads: Tensor | None  # [T, K]
