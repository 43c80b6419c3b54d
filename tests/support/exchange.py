"""What tests of dispatch and combine share: worlds drawn at random, layers, the comparison of a result."""

from dataclasses import replace

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from reference import apply_experts, expert_scale, make_world

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


def check(got, want):
    """The result, on whatever device, is the wanted one, bit for bit."""
    equal = dict(rtol=0, atol=0, check_device=False)
    torch.testing.assert_close(got.x, want.x, **equal)
    torch.testing.assert_close(got.topk_weights, want.topk_weights, **equal)
    torch.testing.assert_close(got.source, want.source, **equal)
    assert got.tokens_per_expert.tolist() == want.tokens_per_expert
    if want.topk_idx is None:
        assert got.topk_idx is None
        assert got.offsets.tolist() == want.offsets
    else:
        torch.testing.assert_close(got.topk_idx, want.topk_idx, **equal)
        assert got.offsets is None


def unbounded(d, sizes=None):
    """The rows that there are, as a dispatch that is not bounded gives them; ``sizes``: of batched groups."""
    fields = {name: getattr(d, name) for name in ("x", "topk_idx", "topk_weights", "source")}
    rows = None if sizes is not None else int(d.num_rows)
    for name, values in fields.items():
        if values is None:
            continue
        if sizes is None:
            fields[name] = values[:rows]
        else:
            parts = [group[:n] for group, n in zip(values, sizes, strict=True)]
            fields[name] = torch.cat([values.flatten(0, 1)[:0], *parts])
    offsets = d.offsets
    if sizes is not None:
        offsets = torch.tensor([0, *sizes]).cumsum(0)
    return replace(d, **fields, offsets=offsets)


@st.composite
def worlds(draw):
    size = draw(st.integers(1, 8))
    experts = draw(st.integers(1, 24))
    topk = draw(st.integers(1, min(experts, 8)))
    tokens = draw(st.lists(st.integers(0, 12), min_size=size, max_size=size))
    world = make_world(
        tokens,
        experts,
        topk,
        hidden=draw(st.sampled_from([1, 7, 32, 64, 96])),
        dtype=draw(st.sampled_from(DTYPES)),
        seed=draw(st.integers(0, 1000)),
        holes=draw(st.sampled_from([0.0, 0.3, 1.0])),
    )
    if draw(st.booleans()):  # all tokens to one expert
        for idx in world.topk_idx:
            idx[:] = -1
            idx[:, 0] = experts - 1
    return world


# Ranks come and go by the thousand here, and each example is a job of up to 16 threads.
relaxed = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


def nonlinear_experts(rows, offsets, mine):
    """Elementwise, different for each expert, and smooth."""
    groups = [torch.tanh(rows[offsets[i] : offsets[i + 1]] * expert_scale(e)) for i, e in enumerate(mine)]
    return torch.cat([rows[:0], *groups])


def expert_layer(world, rank, ep, align=1):
    """What a user does: dispatch by expert, run the experts, combine with the weights."""
    d = ep.dispatch(
        world.x[rank], world.topk_idx[rank], world.topk_weights[rank], layout="expert", align=align
    )
    y = apply_experts(world, rank, d.x, d.offsets.tolist())
    return ep.combine(y, d.handle, weights=d.topk_weights)
