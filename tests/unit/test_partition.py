"""A partition keeps communication and compute apart, and changes no result."""

import os

import pytest
import torch
from exchange import check
from reference import expected_rank_layout, make_world

import commlib
from commlib import ExpertParallel, SMPartition

CORES = sorted(os.sched_getaffinity(0))
needs_two_cores = pytest.mark.skipif(len(CORES) < 2, reason="one core cannot be shared out")


def affinities():
    return [os.sched_getaffinity(int(t)) for t in os.listdir("/proc/self/task")]


@needs_two_cores
def test_threads_stay_on_their_side():
    partition = SMPartition(comm=1, device="cpu")
    assert (partition.asked, partition.comm, partition.compute) == (1, 1, len(CORES) - 1)
    comm, compute = set(partition.share.comm_cores), set(partition.share.compute_cores)
    assert comm | compute == set(CORES) and not comm & compute
    threads = torch.get_num_threads()
    world = make_world([30])

    with ExpertParallel(partition=partition, **world.config()) as ep:
        with partition:
            assert os.sched_getaffinity(0) == compute
            assert torch.get_num_threads() <= len(compute)
            d = ep.dispatch(world.x[0], world.topk_idx[0], world.topk_weights[0], async_op=True)
            d.event.wait()
            inside = affinities()
        assert os.sched_getaffinity(0) == set(CORES)
        assert torch.get_num_threads() == threads
        assert affinities().count(comm) == 1  # the communication thread stays where it is
        check(d, expected_rank_layout(world, 0))
    assert inside.count(comm) == 1
    assert all(a in (comm, compute) for a in inside)


@needs_two_cores
def test_results_do_not_change(device):
    world = make_world([11, 6], hidden=96, device=device)
    partition = SMPartition(comm=8 if device == "cuda" else 1, device=device)

    def rank_main(rank):
        with ExpertParallel(partition=partition, **world.config()) as ep, partition:
            x = world.x[rank].clone().requires_grad_()
            d = ep.dispatch(x, world.topk_idx[rank], async_op=True).finish()
            out = ep.combine(d.x * 2, d.handle)
            out.sum().backward()
            return d.x.detach().clone(), out.detach(), x.grad

    for rank, (rows, out, grad) in enumerate(commlib.run_ranks(rank_main, 2, device=device)):
        assert torch.equal(rows.cpu(), expected_rank_layout(world, rank).x)
        copies = torch.stack([(world.topk_idx[rank] // 4 == r).any(1) for r in range(2)]).sum(0)[:, None]
        torch.testing.assert_close(out, 2 * world.x[rank] * copies)
        torch.testing.assert_close(grad, (2.0 * copies).expand_as(grad))


@needs_two_cores
def test_it_can_be_entered_again_and_inside_itself():
    partition = SMPartition(comm=1, device="cpu")
    for _ in range(2):
        with partition, partition:
            assert os.sched_getaffinity(0) == set(partition.share.compute_cores)
        assert os.sched_getaffinity(0) == set(CORES)


@pytest.mark.parametrize("comm", [0, -1, len(CORES), 1000])
def test_a_share_that_leaves_nothing_is_refused(comm):
    with pytest.raises(ValueError, match=rf"comm must lie in \[1, {len(CORES)}\) .* got {comm}"):
        SMPartition(comm=comm, device="cpu")


@needs_two_cores
def test_a_communicator_must_fit_its_partition():
    partition = SMPartition(comm=1, device="cpu")
    config = dict(num_experts=2, hidden=8, topk=1, max_tokens=4, partition=partition)
    with pytest.raises(ValueError, match="num_sms is 2, but the partition has 1"):
        ExpertParallel(num_sms=2, device="cpu", **config)
    assert "1 cores for communication (1 asked)" in repr(partition)


@pytest.mark.skipif(commlib.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_reason_is_given():
    with pytest.raises(RuntimeError, match="CUDA is not available to commlib: "):
        SMPartition(comm=8, device="cuda")
