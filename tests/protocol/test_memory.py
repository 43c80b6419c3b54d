"""What a communicator holds."""

import gc
import os

import pytest
import torch
from processes import descriptors
from reference import make_world

import commlib
from commlib import ExpertParallel


def test_memory_is_reserved_for_the_worst_case_and_taken_as_used(capsys):
    config = dict(num_experts=8, hidden=7168, topk=2, max_tokens=65536, dtype=torch.bfloat16)
    with ExpertParallel(device="cpu", **config) as ep:
        report = ep.memory_report()
        assert report.reserved > 128 * 65536 * 7168 * 2
        assert report.touched < 1 << 20
        d = ep.dispatch(torch.zeros(1024, 7168, dtype=torch.bfloat16), torch.tensor([[0, 1]] * 1024))
        rows = 1024 * 7168 * 2
        assert rows <= ep.memory_report().touched < 1.1 * rows + (1 << 20)
        assert ep.memory_report().slots_in_use == 1
        del d
        assert ep.memory_report().slots_in_use == 0
    out = capsys.readouterr().out
    assert "heap" in out and "128 slots" in out


def test_repeated_operations_do_not_grow(device):
    world = make_world([200, 150], hidden=1024, device=device)

    def rank_main(rank):
        with ExpertParallel(**world.config()) as ep:
            seen = []
            for i in range(40):
                for layout in ("rank", "expert"):
                    d = ep.dispatch(world.x[rank], world.topk_idx[rank], layout=layout)
                    ep.combine(d.x, d.handle)
                    del d
                if i % 10 == 9:
                    gc.collect()
                    report = ep.memory_report()
                    seen.append((report.touched, report.idle_buffers))
            assert seen[1:] == seen[:1] * 3

    commlib.run_ranks(rank_main, 2, device=device)


def held_by_this_process(device):
    """Open files, and bytes of the GPU that are in use."""
    gc.collect()
    files = len(os.listdir("/proc/self/fd"))
    if device == "cpu":
        return files, 0
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    return files, total - free


def test_closed_communicators_give_their_memory_back(device):
    world = make_world([4, 4], device=device)

    def rank_main(rank):
        for _ in range(20):
            with ExpertParallel(**world.config()) as ep:
                ep.dispatch(world.x[rank], world.topk_idx[rank])

    commlib.run_ranks(rank_main, 2, device=device)
    files, memory = held_by_this_process(device)
    commlib.run_ranks(rank_main, 2, device=device)
    files_later, memory_later = held_by_this_process(device)
    assert files_later <= files
    assert memory_later - memory < 8 << 20  # the device gives at least 2 MiB to each of 40 communicators


@pytest.mark.parametrize("exclusive", [False, True])
def test_layers_share_descriptors_and_threads_go_with_close(in_processes, exclusive):
    """Each communicator has one descriptor, of its own memory, for any number of ranks."""

    def main(group):
        def make(num_sms, exclusive=False):
            shape = dict(num_experts=8, hidden=16, topk=2, max_tokens=8, device="cpu", num_sms=num_sms)
            return ExpertParallel(group, **shape, exclusive=exclusive)

        first = make(1)
        before = descriptors()
        layers = [make(3, exclusive) for _ in range(20)]
        with_layers, threads = descriptors(), threading_count()
        for ep in layers:
            x = torch.ones(4, 16, dtype=torch.bfloat16)
            d = ep.dispatch(x, torch.tensor([[0, 7]] * 4))
            assert torch.equal(ep.combine(d.x, d.handle), 2 * x)
            ep.close()
        del d  # whose rows lie in the memory of the last
        kept, threads_kept = descriptors(), threading_count()  # the objects are still here
        first.close()
        return with_layers - before, kept - before, threads - threads_kept

    communicators = 20 if exclusive else 1
    assert in_processes(main, 3) == [(communicators, 0, 2 * communicators)] * 3


def test_what_still_lies_in_a_closed_communicators_memory_stays():
    x = torch.randn(4, 16)
    ep = ExpertParallel(num_experts=4, hidden=16, topk=1, max_tokens=8, dtype=torch.float32, device="cpu")
    d = ep.dispatch(x, torch.zeros(4, 1, dtype=torch.int64), zero_copy=True)
    ep.close()
    assert torch.equal(d.x, x)


def threading_count():
    return len(os.listdir("/proc/self/task"))
