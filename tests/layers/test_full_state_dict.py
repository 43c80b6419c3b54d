"""full_state_dict: the unsharded model's, on the first rank."""

import pytest
import torch
import torch.distributed as dist
from moe_models import Model, connect, full
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import prune

from commlib.nn import Experts, MoELayer, full_state_dict, fully_shard_experts


@pytest.mark.parametrize("experts", [8, 10, 3])
def test_a_whole_state_dict_is_gathered_and_distributed(torch_ranks, experts):
    whole = full(Model(experts, None))

    def main(rank):
        model = Model(experts, connect(experts))
        model.again = model.moe  # the same module under another name
        gathered = full_state_dict(torch.compile(DistributedDataParallel(model)))
        assert (rank == 0) == bool(gathered)
        assert full_state_dict(DistributedDataParallel(torch.compile(model))).keys() == gathered.keys()
        for name in list(gathered):
            if name.startswith("again"):
                assert torch.equal(gathered.pop(name), whole[name.replace("again", "moe")])
        del model.again
        for name, value in gathered.items():
            assert type(value) is torch.Tensor
            assert torch.equal(value, whole[name]), name
        mine = [p.detach().clone() for p in model.parameters()]
        other = Model(experts, model.moe.ep, seed=99)
        other.load_state_dict(whole)
        assert all(torch.equal(a, b) for a, b in zip(mine, other.parameters(), strict=True))

    torch_ranks(main, 4)


@pytest.mark.parametrize("experts", [8, 10])
def test_a_whole_state_dict_has_the_names_of_the_state_dict(torch_ranks, experts):
    """Whatever modules call their parameters, and with buffers of experts."""
    whole = Model(experts, None)
    prune.l1_unstructured(whole.moe.experts, "w1", 0.5)
    whole = whole.state_dict()

    def main(rank):
        for inside in (Model, MoELayer, Experts):
            model = Model(experts, connect(experts))
            first, count = model.moe.experts.first, model.moe.experts.shard.count
            mask = whole["moe.experts.w1_mask"][first : first + count]
            prune.custom_from_mask(model.moe.experts, "w1", mask)
            if inside is Model:
                model = checkpoint_wrapper(model)
            else:
                apply_activation_checkpointing(model, check_fn=lambda m, kind=inside: isinstance(m, kind))
            gathered = full_state_dict(model)
            if rank == 0:
                assert gathered.keys() == whole.keys()
                assert all(torch.equal(gathered[name], whole[name]) for name in whole)
            dist.barrier()

    torch_ranks(main, 2 if experts == 8 else 4)


class Halved(torch.nn.Module):
    """Gives its state in half precision."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def state_dict(self, *args, **options):
        return {name: value.half() for name, value in super().state_dict(*args, **options).items()}


@pytest.mark.parametrize("experts", [8, 10])
def test_a_whole_state_dict_has_what_hooks_have_made_of_it(torch_ranks, experts):
    whole = full(Model(experts, None))

    def main(rank):
        model = Model(experts, connect(experts))
        halved = full_state_dict(Halved(model))
        model.register_state_dict_post_hook(
            lambda module, state, prefix, _: state.update({name: state[name].clone() for name in state})
        )
        cloned = full_state_dict(model)
        if rank == 0:
            assert cloned.keys() == whole.keys()
            assert all(torch.equal(cloned[name], whole[name]) for name in whole)
            assert all(torch.equal(halved[f"model.{name}"], whole[name].half()) for name in whole)

    torch_ranks(main, 4)


@pytest.mark.parametrize("given", ["a mesh", "a group"])
def test_a_whole_state_dict_has_buffers_of_experts_after_fsdp2(torch_ranks, given):
    def main(rank):
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "ep"))
        model = Model(8, connect(8, mesh["ep"] if given == "a mesh" else mesh["ep"].get_group()))
        model.moe.experts.register_buffer("load", torch.arange(4.0) + model.moe.experts.first)
        model.moe.experts.register_buffer("cache", torch.zeros(7), persistent=False)
        fully_shard_experts(model, mesh["dp"])
        fully_shard(model, mesh=mesh)
        whole = full_state_dict(model)
        if rank == 0:
            assert torch.equal(whole["moe.experts.load"], torch.arange(8.0))
            assert "moe.experts.cache" not in whole

    torch_ranks(main, 4)


def test_models_that_differ_by_rank_are_not_gathered(torch_ranks):
    def main(rank):
        ep = connect(8)
        model = Model(8, ep)
        if rank == 1:
            model.moe.experts.w2 = torch.nn.Parameter(model.moe.experts.w2.detach()[:, :8].clone())
        text = r"rank 0 has moe.experts.w2 \[8, 16, 32\] .*, rank 1 has moe.experts.w2 \[8, 8, 32\]"
        with pytest.raises(ValueError, match=text):
            full_state_dict(model)
        assert bool(full_state_dict(Model(8, ep))) == (rank == 0)

    torch_ranks(main, 2)
