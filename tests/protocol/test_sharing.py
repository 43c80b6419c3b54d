"""ExpertParallels of one shape and group share a communicator: what that costs, and what it means."""

import gc
import os
import threading
import time
from pathlib import Path

import pytest
import torch
from reference import expected_rank_layout, make_world

import commlib
from commlib import CallMismatch, CommError, ExpertParallel
from commlib.settings import Settings

CONFIG = {"num_experts": 8, "hidden": 64, "topk": 2, "max_tokens": 16, "dtype": torch.float32}
X, IDX = torch.arange(4 * 64, dtype=torch.float32).view(4, 64), torch.tensor([[0, 7], [1, 6], [2, 5], [3, 4]])


def made(device="cpu", **options):
    return ExpertParallel(device=device, **{"num_sms": 1, "timeout": 30.0, **CONFIG, **options})


def round_trip(ep, factor=1.0):
    x, idx = X.to(ep.device), IDX.to(ep.device)
    d = ep.dispatch(x * factor, idx)
    return ep.combine(d.x, d.handle)


def check_sums(ep, factor=1.0):
    """Each token goes to two ranks where there are two, once to one."""
    torch.testing.assert_close(round_trip(ep, factor), min(2, ep.size) * factor * X.to(ep.device))


def held():
    """What this process holds: descriptors, threads, and mapped heaps."""
    maps = Path("/proc/self/maps").read_text()
    return (
        len(os.listdir("/proc/self/fd")),
        len(os.listdir("/proc/self/task")),
        maps.count("memfd:commlib"),
    )


@pytest.mark.parametrize("nodes", [1, 2])
def test_sixty_layers_hold_what_one_does(torch_ranks, nodes):
    def main(rank):
        options = {"ranks_per_node": 1} if nodes == 2 else {}
        eps = [made(**options)]
        check_sums(eps[0])
        alone = held()
        eps += [made(**options) for _ in range(59)]
        for number, ep in enumerate(eps):
            check_sums(ep, factor=1.0 + number)
        return alone, held(), len({ep._comm for ep in eps}), [ep.stats()["dispatches"] for ep in eps]

    for alone, together, communicators, dispatches in torch_ranks(main, 2):
        # The network drops sockets that it needed to connect.
        assert all(now <= before for now, before in zip(together, alone, strict=True))
        assert communicators == 1
        assert dispatches == [2, *[1] * 59]


def test_layers_of_a_model_keep_their_results_for_backward(device):
    """All of them in slots, which they have in common; gradients are those of communicators of their own."""
    world = make_world([9, 7, 8], num_experts=6, topk=2, hidden=32, device=device)

    def gradients(rank, **options):
        eps = [ExpertParallel(**world.config() | options) for _ in range(20)]
        x = world.x[rank].clone().requires_grad_()
        rows = x
        for number, ep in enumerate(eps):
            d = ep.dispatch(rows, world.topk_idx[rank])
            rows = ep.combine(torch.sin(d.x) * (1 + number / 7), d.handle)  # backward needs d.x
        used = eps[0].memory_report().slots_in_use
        rows.square().sum().backward()
        for ep in eps:
            ep.close()
        return rows.detach(), x.grad, used

    def rank_main(rank):
        return gradients(rank), gradients(rank, exclusive=True)

    for (rows, grad, used), (wanted_rows, wanted_grad, _) in commlib.run_ranks(
        rank_main, world.size, device=device
    ):
        torch.testing.assert_close(rows, wanted_rows, rtol=0, atol=0)
        torch.testing.assert_close(grad, wanted_grad, rtol=0, atol=0)
        assert used >= (20 if device == "cpu" else 1)


def test_layers_in_different_orders_are_named(device):
    def rank_main(rank):
        first, second, third = (made(device) for _ in range(3))
        check_sums(second)
        with pytest.raises(CallMismatch) as raised:
            round_trip(first if rank == 0 else third)
            first.synchronize()
        return str(raised.value)

    for rank, text in enumerate(commlib.run_ranks(rank_main, 2, device=device)):
        mine, theirs = (1, 3) if rank == 0 else (3, 1)
        assert f"rank {1 - rank} called dispatch of ExpertParallel {theirs}" in text
        assert f"rank {rank} called dispatch of ExpertParallel {mine}, counted as they were made" in text
        assert "exclusive=True" in text


def test_a_layer_whose_backward_comes_out_of_order_is_named():
    def rank_main(rank):
        eps = [made() for _ in range(2)]
        x = X.clone().requires_grad_()
        sums = [ep.combine(d.x, d.handle) for ep in eps for d in [ep.dispatch(x, IDX)]]
        with pytest.raises(CallMismatch, match="called dispatch with a handle of ExpertParallel"):
            sums[rank].sum().backward()

    commlib.run_ranks(rank_main, 2)


def test_numbers_of_callers_begin_again_after_255():
    def rank_main(rank):
        eps = [made() for _ in range(258)]
        for ep in eps[254:]:
            check_sums(ep)
        return [ep._attachment.caller for ep in eps]

    for callers in commlib.run_ranks(rank_main, 2):
        assert callers == [*range(1, 256), 1, 2, 3]


def test_exclusive_ones_work_in_any_order_and_in_any_thread():
    def rank_main(rank):
        eps = [made(exclusive=True) for _ in range(2)]
        sums = [None, None]

        def use(number):
            for _ in range(5):
                sums[number] = round_trip(eps[number], 1.0 + number)
            eps[number].synchronize()

        threads = [threading.Thread(target=use, args=(number,)) for number in range(2)]
        for thread in threads if rank == 0 else reversed(threads):
            thread.start()
            time.sleep(0.05)  # it waits for the other rank, which has begun with the other one
        for thread in threads:
            thread.join()
        return sums

    for sums in commlib.run_ranks(rank_main, 2):
        for number, got in enumerate(sums):
            torch.testing.assert_close(got, 2 * (1.0 + number) * X)


def test_several_threads_may_use_what_they_share_in_one_order():
    """Operations of a thread come whole: here those of one thread after those of the other, on all ranks."""

    def rank_main(rank):
        eps = [made() for _ in range(4)]
        turns = [threading.Event() for _ in eps]
        turns[0].set()
        failed = []

        def use(number):
            turns[number].wait(60)
            try:
                check_sums(eps[number], 1.0 + number)
            except Exception as error:
                failed.append(error)
            if number + 1 < len(turns):
                turns[number + 1].set()

        threads = [threading.Thread(target=use, args=(n,)) for n in reversed(range(len(eps)))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return failed

    assert commlib.run_ranks(rank_main, 2) == [[], []]


def test_one_that_is_closed_leaves_the_others_open(device):
    def rank_main(rank):
        first, second = made(device), made(device)
        d = first.dispatch(X.to(first.device), IDX.to(first.device))
        first.close()
        first.close()  # twice is fine
        for call in (
            lambda: round_trip(first),
            lambda: first.combine(d.x, d.handle),
            lambda: first.combine_buffer(d.handle),
            first.synchronize,
        ):
            with pytest.raises(CommError, match="this ExpertParallel any more: it has been closed"):
                call()
        check_sums(second)
        second.close()
        with pytest.raises(CommError, match="has been closed"):
            round_trip(second)

    commlib.run_ranks(rank_main, 2, device=device)


def test_a_graph_of_autograd_keeps_what_it_needs_when_others_close():
    def rank_main(rank):
        first, second = made(), made()
        x = X.clone().requires_grad_()
        d = first.dispatch(x, IDX)
        sums = first.combine(d.x, d.handle)
        del first, d
        second.close()
        sums.sum().backward()
        return x.grad

    for grad in commlib.run_ranks(rank_main, 2):
        torch.testing.assert_close(grad, torch.full_like(X, 2.0))


def test_the_last_one_closes_also_where_it_is_only_forgotten():
    def rank_main(rank):
        first, second = made(), made()
        core = first._comm.core
        first.close()
        core.check_health()
        del second
        gc.collect()
        with pytest.raises(CommError, match="has been closed"):
            core.check_health()

    commlib.run_ranks(rank_main, 2)


def test_ranks_that_collect_garbage_at_different_times_agree_anew(device):
    """Rank 0 has closed its own: all take a new one. Then both still have that, and share it."""

    def rank_main(rank):
        old = made(device)
        check_sums(old)
        if rank == 0:
            old.close()
        new = made(device)
        assert new._comm is not old._comm
        check_sums(new)
        more = made(device)
        assert more._comm is new._comm
        check_sums(more)
        if rank == 1:
            with pytest.raises(CommError):  # rank 0 has closed it
                round_trip(old)
        return new._attachment.caller, more._attachment.caller

    assert commlib.run_ranks(rank_main, 2, device=device) == [(1, 2), (1, 2)]


def test_one_that_is_garbage_on_some_ranks_only_keeps_no_others_from_sharing():
    """A second shape keeps the team, so that rank 1 goes on to find the old one."""

    def rank_main(rank):
        old, other = made(), made(hidden=32)
        if rank == 0:
            old.close()
        eps = [made() for _ in range(4)]
        for ep in eps:
            check_sums(ep)
        assert not other._comm.closed
        return len({ep._comm for ep in eps}), [ep._attachment.caller for ep in eps]

    assert commlib.run_ranks(rank_main, 2) == [(1, [1, 2, 3, 4])] * 2


def test_one_that_has_just_been_closed_is_not_joined():
    def rank_main(rank):
        ep = made()
        communicator = ep._comm
        part = communicator.attach()
        ep.close()
        assert not communicator.closed
        part.close()
        assert communicator.closed and communicator.attach() is None and communicator.attached == 0

    commlib.run_ranks(rank_main, 2)


def test_an_error_that_is_kept_keeps_nothing_open():
    def rank_main(rank):
        ep, kept = made(timeout=30.0), None
        try:
            made(timeout=20.0)
        except ValueError as error:
            kept = error
        ep.close()
        assert kept is not None and ep._comm.closed
        with made(timeout=20.0) as anew:
            check_sums(anew)

    commlib.run_ranks(rank_main, 2)


def test_a_report_does_not_wait_for_an_operation():
    """Rank 1 comes only when the report is there."""
    reported = threading.Event()

    def rank_main(rank):
        waiting, other = made(), made(hidden=32)
        if rank == 1:
            reported.wait(60)
            return check_sums(waiting)
        thread = threading.Thread(target=round_trip, args=(waiting,))
        thread.start()
        time.sleep(0.1)
        for ep in (waiting, other):
            assert len(ep.memory_report().others) == 1
        reported.set()
        thread.join()
        return None

    commlib.run_ranks(rank_main, 2)


def test_what_was_found_and_not_agreed_on_is_not_kept_open():
    def rank_main(rank):
        old = made()
        core = old._comm.core
        if rank == 0:
            old.close()
        new = made()
        del old
        gc.collect()
        with pytest.raises(CommError, match="has been closed"):
            core.check_health()
        check_sums(new)

    commlib.run_ranks(rank_main, 2)


def test_room_that_one_takes_is_there_for_all(device):
    world = make_world([9, 4, 12], num_experts=5, device=device, holes=0.0)

    def rank_main(rank):
        first, second = (
            ExpertParallel(**world.config() | {"max_tokens": None, "capacity": 1}) for _ in range(2)
        )
        d = first.dispatch(world.x[rank], world.topk_idx[rank])
        grown = second.settings.capacity
        third = ExpertParallel(**world.config() | {"max_tokens": None, "capacity": 1})
        e = third.dispatch(world.x[rank], world.topk_idx[rank])
        return d.x, e.x, grown, [ep.stats()["growths"] for ep in (first, second, third)]

    wanted = [expected_rank_layout(world, rank).x for rank in range(world.size)]
    for rank, (x, again, grown, growths) in enumerate(
        commlib.run_ranks(rank_main, world.size, device=device)
    ):
        torch.testing.assert_close(x.cpu(), wanted[rank], rtol=0, atol=0)
        torch.testing.assert_close(again, x, rtol=0, atol=0)
        assert grown >= max(map(len, wanted))
        assert growths[0] == growths[1] == growths[2] > 0


def test_a_compiled_model_of_many_layers_shares_one():
    """Layers have names of their own, which are inputs: one compilation serves all."""

    def rank_main(rank):
        eps = [made() for _ in range(12)]

        class Layer(torch.nn.Module):
            def __init__(self, ep):
                super().__init__()
                self.ep = ep

            def forward(self, x):
                d = self.ep.dispatch(x, IDX)
                return self.ep.combine(d.x * 2, d.handle)

        compilations = []

        def backend(graph, inputs):
            compilations.append(graph)
            return graph

        layers = [torch.compile(Layer(ep), backend=backend, fullgraph=True) for ep in eps]
        x = X
        for layer in layers:
            x = layer(x) / 2
        return x, len({ep._comm for ep in eps}), len(compilations)

    torch._dynamo.reset()
    ((x, communicators, compilations),) = commlib.run_ranks(rank_main, 1)
    torch.testing.assert_close(x, X)
    assert communicators == 1
    assert compilations <= 2


@pytest.mark.parametrize(
    "ranks, capacity, hidden, slots",
    [(4, 4096, 7168, 128), (64, 1, 8, 128), (64, 64 * 4096, 7168, 9), (64, 64 * 8192, 7168, 8)],
)
def test_slots_of_a_cpu_are_many_unless_addresses_run_out(ranks, capacity, hidden, slots):
    asked = Settings(64, hidden, 8, 4096, torch.bfloat16, torch.device("cpu"), None, capacity, None)
    assert asked.checked(ranks).slots_on(ranks) == slots


def test_exclusive_is_a_bool_and_the_same_on_all_ranks():
    with pytest.raises(TypeError, match="exclusive must be True or False, got 'yes'"):
        made(exclusive="yes")

    def rank_main(rank):
        with pytest.raises(commlib.ConfigMismatch, match="exclusive is False on rank 0, True on rank 1"):
            made(exclusive=rank == 1)

    commlib.run_ranks(rank_main, 2)
