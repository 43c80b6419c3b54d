"""The results that DeepEP's calls must give, in plain PyTorch, and how the tests make the calls."""

import contextlib

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from reference import expected_rank_layout, make_world

import commlib
import commlib.compat.deep_ep as deep_ep

EXACT = dict(rtol=0, atol=0, check_device=False)
# Each example is a job of several threads and communicators.
relaxed = settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@st.composite
def worlds(draw, most_ranks=5):
    """Problems that DeepEP takes: equal blocks of experts, rows of a multiple of 16 bytes."""
    size = draw(st.integers(1, most_ranks))
    experts = size * draw(st.integers(1, 4))
    tokens = draw(st.lists(st.integers(0, 12), min_size=size, max_size=size))
    return make_world(
        tokens,
        experts,
        topk=draw(st.integers(1, min(experts, 6))),
        hidden=draw(st.sampled_from([8, 32, 96])),
        dtype=torch.bfloat16,
        seed=draw(st.integers(0, 1000)),
        holes=draw(st.sampled_from([0.0, 0.3, 1.0])),
    )


@contextlib.contextmanager
def made(kind=deep_ep.Buffer, **options):
    """A buffer of this rank's, destroyed at the end."""
    buffer = kind(None, explicitly_destroy=True, **options)
    yield buffer
    buffer.destroy()


def on_ranks(world, call, kind=deep_ep.Buffer, **options):
    """``call(buffer, rank)`` on in-process ranks, on the world's device; what each returned."""

    def rank_main(rank):
        with made(kind, **options) as buffer:
            return call(buffer, rank)

    return commlib.run_ranks(rank_main, world.size, device=world.device.type)


def laid_out(buffer, world, rank):
    """The arguments of ``Buffer.dispatch`` that come from its layout."""
    per_rank, per_node, per_expert, mask, _ = buffer.get_dispatch_layout(
        world.topk_idx[rank], world.num_experts
    )
    assert per_node is None
    return dict(num_tokens_per_rank=per_rank, num_tokens_per_expert=per_expert, is_token_in_rank=mask)


def top_k(world, rank):
    """A dispatch's arguments about experts."""
    return dict(topk_idx=world.topk_idx[rank], topk_weights=world.topk_weights[rank])


def mask_of(world, rank):
    """``[T, R]`` bool: which ranks a token goes to."""
    chosen = world.topk_idx[rank].tolist()
    rows = [[any(e in world.experts_of(r) for e in token) for r in range(world.size)] for token in chosen]
    return torch.tensor(rows, dtype=torch.bool).view(-1, world.size)


def expected_prefix(world):
    """``[R, R]``: rows that rank j gets from ranks 0 to i."""
    sent = torch.stack([mask_of(world, rank).sum(0) for rank in range(world.size)])
    return sent.cumsum(0).int()


def rows_for(world, rank, seed=0, width=None, dtype=torch.bfloat16):
    """Rows for combine, made by a rank. Whole numbers: their sums are exact, in whatever order."""
    count = len(expected_rank_layout(world, rank).x)
    g = torch.Generator().manual_seed(1000 * seed + rank)
    rows = torch.randint(-8, 9, (count, width or world.hidden), generator=g).to(dtype)
    return rows.to(world.device)


def expected_sums(world, rank, rows_of):
    """``[T, H]`` float32: each token's rows, of all ranks, ``rows_of(rank)`` being all rows of one."""
    total = None
    for other in range(world.size):
        rows = rows_of(other).cpu().float()
        if total is None:
            total = torch.zeros(len(world.x[rank]), rows.shape[1])
        source = expected_rank_layout(world, other).source
        mine = source[:, 0] == rank
        total.index_add_(0, source[mine, 1], rows[mine])
    return total


def finish(result, asynchronous):
    """The results of a call, complete."""
    event = result[-1]
    assert isinstance(event, deep_ep.EventOverlap)
    if asynchronous:
        event.current_stream_wait()
    else:
        assert event.event is None
    return result[:-1]


def bytes_of(tensor):
    """For comparing NaNs."""
    return tensor.cpu().contiguous().view(torch.uint8)
