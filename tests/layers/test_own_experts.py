"""Experts that are not SwiGLU: they train, clip and are saved as the layer's own are."""

import functools

import pytest
import torch
import torch.nn.functional as F
from moe_models import (
    FFN,
    HIDDEN,
    TOPK,
    Model,
    batch,
    check_gradients,
    connect,
    rows_of,
    train,
    train_unsharded,
    unsharded_gradients,
)
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from commlib.nn import (
    Experts,
    GptOssExperts,
    MoELayer,
    clip_grad_norm_,
    expert_parameters,
    full_state_dict,
    fully_shard_experts,
    grouped_mm,
)


class GeluExperts(Experts):
    """No gate, two biases and a factor, of no dimension, for each expert."""

    def shapes(self, hidden, ffn_hidden):
        first, second = {"up": (hidden, ffn_hidden), "up_bias": (ffn_hidden,)}, {"down": (ffn_hidden, hidden)}
        return first | second | {"down_bias": (hidden,), "factor": ()}

    def compute(self, x, offsets, up, up_bias, down, down_bias, factor):
        inner = F.gelu(grouped_mm(x, up, offsets, up_bias))
        y = grouped_mm(inner, down, offsets, down_bias)
        return y * (1 + factor).repeat_interleave(offsets.diff(), output_size=len(x)).unsqueeze(-1)


def moved_biases(model):
    """They begin as zero: move each by its expert's number."""
    experts = model.moe.experts
    with torch.no_grad():
        for name in ("up_bias", "down_bias", "factor"):
            p = getattr(experts, name)
            by_expert = torch.arange(experts.first, experts.first + len(p)) / 20
            p += by_expert.view(-1, *[1] * (p.dim() - 1))
    return model


def test_values_are_those_of_each_expert_by_itself():
    model = moved_biases(Model(4, None, experts=GeluExperts))
    x = batch(0, 0)
    out, _ = model.moe(x)
    ids, weights, _ = model.moe.router(x)
    e = model.moe.experts
    want = torch.zeros_like(x)
    for t in range(len(x)):
        for i, weight in zip(ids[t].tolist(), weights[t], strict=True):
            inner = F.gelu(x[t] @ e.up[i] + e.up_bias[i])
            want[t] += weight * (1 + e.factor[i]) * (inner @ e.down[i] + e.down_bias[i])
    torch.testing.assert_close(out, want, rtol=1e-4, atol=1e-5)


def test_they_train_under_ddp_as_the_unsharded_model_does(torch_ranks):
    """Ranks hold 3 and 4 of 7; the norm is clipped, and the final weights are gathered."""
    whole = moved_biases(Model(7, None, experts=GeluExperts))
    losses = train_unsharded(whole, torch.optim.AdamW(whole.parameters(), 1e-2), 2, range(4), 0.5)
    wanted = {name: t.clone() for name, t in whole.state_dict().items()}

    def clip(model):
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)

    def main(rank):
        model = moved_biases(Model(7, connect(7), experts=GeluExperts))
        ddp = DistributedDataParallel(model)
        mine = train(ddp, torch.optim.AdamW(ddp.parameters(), 1e-2), rank, range(4), clip)
        for step, loss in enumerate(mine):
            assert loss == pytest.approx(losses[step][rank], rel=1e-4)
        state = full_state_dict(ddp)
        if rank == 0:
            assert state.keys() == wanted.keys()
            for name, t in state.items():
                torch.testing.assert_close(t, wanted[name], rtol=1e-3, atol=1e-5)
        again = Model(7, model.moe.ep, experts=GeluExperts, seed=5)
        again.load_state_dict(wanted)  # of all experts: sliced
        for name in again.moe.experts.weight_names:
            part = wanted[f"moe.experts.{name}"][rows_of(again)]
            assert torch.equal(again.moe.experts.get_parameter(name), part)

    torch_ranks(main, 2)


@pytest.mark.parametrize("experts", [GeluExperts, GptOssExperts])
def test_gradients_under_fsdp_are_those_of_the_unsharded_model(torch_ranks, experts):
    wanted = unsharded_gradients(8, 4, experts=experts)
    norm = torch.nn.utils.get_total_norm(wanted.values())

    def main(rank):
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "ep"))
        model = Model(8, connect(8, mesh["ep"]), experts=experts)
        rows = slice(model.moe.experts.first, model.moe.experts.first + 4)
        fully_shard_experts(model, mesh["dp"])
        fully_shard(model, mesh=mesh)
        model(batch(rank, 0)).backward()
        check_gradients(model, wanted, rows)
        torch.testing.assert_close(clip_grad_norm_(model, 1e9), norm, rtol=1e-5, atol=0.0)

    torch_ranks(main, 4)


@pytest.mark.parametrize("experts", [GeluExperts, GptOssExperts])
def test_gradients_under_ddp_are_those_of_the_unsharded_model(torch_ranks, experts):
    wanted = unsharded_gradients(8, 2, experts=experts)

    def main(rank):
        model = Model(8, connect(8), experts=experts)
        assert len(list(expert_parameters(model))) == len(model.moe.experts.weight_names)
        ddp = DistributedDataParallel(model)
        ddp(batch(rank, 0)).backward()
        check_gradients(model, wanted, rows_of(model))

    torch_ranks(main, 2)


def test_they_compile_and_take_arguments_of_their_own():
    make = functools.partial(GptOssExperts, limit=0.1)
    torch.manual_seed(1)
    layer = MoELayer(HIDDEN, FFN, 4, TOPK, None, experts=make)
    assert layer.experts.limit == 0.1
    x = batch(0, 0)
    want = layer(x)[0]
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(x)[0], want)
    layer.experts.limit = 7.0
    assert not torch.allclose(layer(x)[0], want)


def test_a_bias_is_added_to_the_rows_of_its_group(device):
    offsets = torch.tensor([0, 3, 3, 5], device=device)
    sizes = ((5, 4), (3, 4, 6), (3, 6))
    x, w, b = (torch.randn(*s, dtype=torch.float64, device=device, requires_grad=True) for s in sizes)
    want = torch.cat([x[:3] @ w[0] + b[0], x[3:] @ w[2] + b[2]])
    got = grouped_mm(x, w, offsets, b)
    torch.testing.assert_close(got, want)
    upstream = torch.randn_like(got)
    for a, c in zip(
        torch.autograd.grad(got, (x, w, b), upstream),
        torch.autograd.grad(want, (x, w, b), upstream),
        strict=True,
    ):
        torch.testing.assert_close(a, c)
    with torch.autocast(device, dtype=torch.bfloat16):
        assert grouped_mm(x.float(), w.float(), offsets, b.float()).dtype == torch.bfloat16
    with pytest.raises(ValueError, match=r"bias must be \[3, 6\], got \(3, 4\)"):
        grouped_mm(x, w, offsets, b[:, :4])


def test_what_is_no_rank_s_experts_is_refused():
    def linear(hidden, ffn_hidden, first, count, **options):
        return nn.Linear(hidden, hidden)

    def one_less(hidden, ffn_hidden, first, count, **options):
        return Experts(hidden, ffn_hidden, first, count - 1, **options)

    def make(experts):
        return MoELayer(HIDDEN, FFN, 4, TOPK, None, experts=experts)

    with pytest.raises(TypeError, match=r"must make a commlib\.nn\.Experts.*made a Linear.*a subclass"):
        make(linear)
    with pytest.raises(TypeError, match="got ready ones: give the class, GeluExperts"):
        make(GeluExperts(HIDDEN, FFN, 0, 4))
    with pytest.raises(ValueError, match="has 4 experts from number 0 on, Experts was made with 3 from 0 on"):
        make(one_less)


def test_experts_that_do_not_know_of_the_others_are_refused(torch_ranks):
    def alone(hidden, ffn_hidden, first, count, *, ep, **options):
        return Experts(hidden, ffn_hidden, first, count, **options)

    def main(rank):
        with pytest.raises(ValueError, match=r"does not know of the others \(ep\): hand all arguments on"):
            Model(8, connect(8), experts=alone)

    torch_ranks(main, 2)
