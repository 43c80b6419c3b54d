"""Random programs over commlib.compat.deep_ep: many calls under way, waited for later, in another order."""

import torch
from deep_ep_reference import expected_sums, laid_out, on_ranks, relaxed, rows_for, top_k
from hypothesis import given
from hypothesis import strategies as st
from reference import expected_rank_layout, make_world

RANKS, EXPERTS, TOPK, HIDDEN = 3, 6, 2, 32
KINDS = ("bf16", "fp8", "int8", "float32")

step = st.tuples(
    st.sampled_from(["dispatch", "again", "combine", "wait"]),
    st.integers(0, 5),  # which of the handles, or events, made by then
    st.sampled_from(KINDS),
    st.booleans(),  # asynchronous
    st.booleans(),  # with weights, or with top-k
)


def world_of(number, device):
    g = torch.Generator().manual_seed(number)
    tokens = torch.randint(0, 12, (RANKS,), generator=g).tolist()
    return make_world(tokens, EXPERTS, TOPK, HIDDEN, torch.bfloat16, number, holes=0.3, device=device)


def as_kind(x, kind):
    if kind == "fp8":
        return x.to(torch.float8_e4m3fn), x[:, :3].float()
    return x.to({"bf16": torch.bfloat16, "int8": torch.int8, "float32": torch.float32}[kind])


def plain(rows):
    """For comparing, on the CPU."""
    rows = rows if isinstance(rows, tuple) else (rows,)
    return [t.cpu().float() for t in rows]


class Program:
    """Runs the steps on one rank, and notes what must hold when all is done."""

    def __init__(self, buffer, rank, device):
        self.buffer, self.rank, self.device = buffer, rank, device
        self.handles, self.waiting, self.checks = [], [], []

    def run(self, steps):
        for number, (what, which, *rest) in enumerate(steps):
            if what == "dispatch":
                self.dispatch(number, *rest)
            elif what == "wait" and self.waiting:
                self.waiting.pop(which % len(self.waiting)).current_stream_wait()
            elif self.handles:
                getattr(self, what)(*self.handles[which % len(self.handles)], *rest)
        for event in reversed(self.waiting):
            event.current_stream_wait()
        return [
            torch.equal(got, want) for given, wanted in self.checks for got, want in compared(given, wanted)
        ]

    def wait(self, *_):
        """There was nothing to wait for."""

    def note(self, event, asynchronous, got, want):
        if asynchronous:
            self.waiting.append(event)
        self.checks.append((got, want))

    def dispatch(self, number, kind, asynchronous, with_top_k):
        world = world_of(number, self.device)
        args = laid_out(self.buffer, world, self.rank) | (top_k(world, self.rank) if with_top_k else {})
        x = as_kind(world.x[self.rank], kind)
        got, idx, weights, counts, handle, event = self.buffer.dispatch(x, **args, async_finish=asynchronous)
        want = expected_rank_layout(world, self.rank)
        assert counts == want.tokens_per_expert
        self.note(event, asynchronous, got, as_kind(want.x, kind))
        if with_top_k:
            self.checks += [(idx, want.topk_idx), (weights, want.topk_weights)]
        self.handles.append((world, handle))

    def again(self, world, handle, kind, asynchronous, _):
        got, *_, event = self.buffer.dispatch(
            as_kind(world.x[self.rank] * 2, kind), handle, async_finish=asynchronous
        )
        want = expected_rank_layout(world, self.rank)
        self.note(event, asynchronous, got, as_kind(want.x * 2, kind))

    def combine(self, world, handle, _, asynchronous, weighted):
        y = rows_for(world, self.rank)
        weights = rows_for(world, self.rank, 9, 5, torch.float32) if weighted else None
        sums, back, event = self.buffer.combine(y, handle, weights, async_finish=asynchronous)
        want = expected_sums(world, self.rank, lambda r: rows_for(world, r))
        self.note(event, asynchronous, sums, want.bfloat16())
        if weighted:
            want = expected_sums(world, self.rank, lambda r: rows_for(world, r, 9, 5, torch.float32))
            self.checks.append((back, want))


def compared(got, want):
    return zip(plain(got), plain(want), strict=True)


@relaxed
@given(st.lists(step, min_size=1, max_size=14))
def test_whatever_is_under_way_each_call_gets_its_own(device, steps):
    world = world_of(0, device)
    found = on_ranks(world, lambda buffer, rank: Program(buffer, rank, device).run(steps))
    assert all(all(checks) for checks in found)
