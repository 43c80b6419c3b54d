"""What only a GPU can show, and what a machine without one must say. The rest runs on both: see `device`."""

import os
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from reference import expected_rank_layout, make_world

import commlib
from commlib import ExpertParallel, cuda
from commlib.devices.cuda import CudaEvent
from commlib.devices.residency import Residency
from commlib.startup.group import resolve_group

PROGRAMS = Path(__file__).parents[1] / "programs"
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
TOKENS = [37, 0, 64, 5, 1, 20, 33, 12]  # of ranks 0 to 7
CONFIG = {"num_experts": 8, "hidden": 64, "topk": 2, "max_tokens": 8, "dtype": torch.float32}
SLEEP_CYCLES = 500_000_000  # of the GPU: about a quarter of a second
PATH = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])

gpu = pytest.mark.gpu
without_gpu = pytest.mark.skipif(cuda.is_available(), reason="a GPU can be used here")
mpirun = pytest.mark.skipif(shutil.which("mpirun", path=PATH) is None, reason="no mpirun")


@pytest.fixture
def x():
    return torch.ones(4, 64, device="cuda")


@pytest.fixture
def idx():
    return torch.tensor([[0, 7]] * 4, device="cuda")


# -- without a GPU -------------------------------------------------------------------------------------------


@without_gpu
def test_without_a_gpu_there_is_a_reason_that_can_be_printed():
    assert cuda.why_not().strip() and "\n" not in cuda.why_not()


@without_gpu
@pytest.mark.parametrize("device", ["cuda", "cuda:1", torch.device("cuda")])
def test_without_a_gpu_asking_for_one_is_an_error_with_the_reason(device):
    with pytest.raises((ValueError, RuntimeError), match=re.escape(cuda.why_not())):
        ExpertParallel(device=device, **CONFIG)
    with pytest.raises((ValueError, RuntimeError), match=re.escape(cuda.why_not())):
        commlib.run_ranks(lambda rank: None, 2, device=device)


@without_gpu
def test_without_a_gpu_no_device_means_the_cpu():
    with ExpertParallel(**CONFIG) as ep:
        assert ep.dispatch(torch.ones(4, 64), torch.zeros(4, 2, dtype=torch.int64)).x.device.type == "cpu"


def test_an_event_tells_the_core_which_stream_uses_the_results_and_waits_there(monkeypatch):
    calls = []

    class Core:
        def note_uses(self, addresses, stream):
            calls.append(("uses", addresses, stream))

        def wait_event(self, event):
            calls.append(("wait", event))

    recorded = SimpleNamespace(
        cuda_event=5, wait=lambda stream: calls.append(("stream waits", stream.cuda_stream))
    )
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=7))
    event = CudaEvent(Core(), recorded, torch.device("cuda:0"), [1, 2])
    event.wait()
    event.synchronize()
    assert calls == [("uses", [1, 2], 7), ("stream waits", 7), ("wait", 5)]


# -- the same results as the CPU's ---------------------------------------------------------------------------


def everything(world, rank, num_sms=None, apart=0):
    """What a rank gets from every kind of dispatch and combine, on the CPU.

    Args:
        apart: rows of x, y and bias lie this many elements further apart than they are long, so that
            no row but the first is aligned to 16 bytes.
    """

    def spread(rows):
        wide = rows.new_zeros(len(rows), world.hidden + apart)
        wide[:, apart:] = rows
        return wide[:, apart:]

    x, idx, weights = spread(world.x[rank]), world.topk_idx[rank], world.topk_weights[rank]
    with ExpertParallel(num_sms=num_sms, **world.config()) as ep:
        unique = ep.dispatch(x, idx, weights)
        grouped = ep.dispatch(x, idx, weights, layout="expert", align=4)
        again = ep.dispatch(x * 2, topk_weights=weights, handle=grouped.handle)
        buffer = ep.combine_buffer(unique.handle)
        buffer.copy_(unique.x * 3)
        got = [unique.x, unique.topk_idx, unique.topk_weights, unique.source, unique.tokens_per_expert]
        got += [grouped.x, grouped.topk_weights, grouped.source, grouped.offsets]
        got += [again.x, again.topk_weights]
        got += [ep.combine(spread(unique.x), unique.handle, bias=spread(x * 0.5))]
        got += [ep.combine(buffer, unique.handle)]
        got += [ep.combine(spread(grouped.x), grouped.handle, weights=grouped.topk_weights)]
        return [t.cpu() for t in got]


def check_equal_on_both(world, **options):
    """Ranks on the GPU get the CPU's results, bit for bit."""

    def on(device):
        there = world.to(device)
        return commlib.run_ranks(lambda rank: everything(there, rank, **options), world.size, device=device)

    for got, want in zip(on("cuda"), on("cpu"), strict=True):
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)


@gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_results_are_those_of_the_cpu_bit_for_bit(ranks, dtype):
    world = make_world(TOKENS[:ranks], num_experts=16, topk=4, hidden=136, dtype=dtype)
    check_equal_on_both(world)


@gpu
@pytest.mark.parametrize("apart", [0, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("hidden", [1, 7, 96, 7168])
def test_rows_of_any_size_may_begin_anywhere(hidden, dtype, apart):
    world = make_world([37, 20], num_experts=16, topk=4, hidden=hidden, dtype=dtype)
    check_equal_on_both(world, num_sms=3, apart=apart)


@gpu
def test_more_rows_than_fit_into_shared_memory_at_once():
    world = make_world([2048, 1500], num_experts=64, topk=8, hidden=1024, dtype=torch.bfloat16)
    check_equal_on_both(world, num_sms=2)


def test_the_program_for_the_sanitizer_works(device, monkeypatch):
    monkeypatch.syspath_prepend(PROGRAMS)
    import gpu_small

    for ranks in (1, 2):
        gpu_small.run(device, ranks, 72, torch.bfloat16)


@gpu
@pytest.mark.parametrize("launcher", ["torchrun", pytest.param("mpirun", marks=mpirun)])
def test_two_processes_share_one_gpu(launch, launcher):
    done = launch(str(PROGRAMS / "round_trip.py"), 2, launcher, arguments=["cuda"], KIND="default")
    assert done.returncode == 0, done.stdout + done.stderr
    assert sorted(re.findall(r"ok rank \d of 2", done.stdout)) == ["ok rank 0 of 2", "ok rank 1 of 2"]


@gpu
def test_cupy_in_cupy_out():
    cupy = pytest.importorskip("cupy")
    world = make_world([9], device="cuda")
    x, idx, weights = (cupy.from_dlpack(t[0]) for t in (world.x, world.topk_idx, world.topk_weights))
    with ExpertParallel(**world.config()) as ep:
        d = ep.dispatch(x, idx, weights)
        out = ep.combine(d.x, d.handle)
        want = expected_rank_layout(world, 0)
        assert all(isinstance(a, cupy.ndarray) for a in (d.x, d.topk_idx, d.topk_weights, d.source, out))
        assert (cupy.asnumpy(d.x) == want.x.numpy()).all()
        assert (cupy.asnumpy(d.source) == want.source.numpy()).all()
        assert out.shape == (9, 64)


# -- devices, streams, SMs -----------------------------------------------------------------------------------


@gpu
def test_properties_are_those_that_pytorch_sees():
    mine, theirs = cuda.properties(0), torch.cuda.get_device_properties(0)
    assert cuda.why_not() == ""
    assert mine.name == theirs.name
    assert mine.sms == theirs.multi_processor_count
    assert abs(mine.total_memory - theirs.total_memory) < 1 << 30


@gpu
def test_each_rank_has_a_stream_of_its_own_and_the_device_of_its_ranks(x, idx):
    def rank_main(rank):
        with ExpertParallel(**CONFIG) as ep:  # no device: that of run_ranks
            d = ep.dispatch(x, idx)
            assert d.x.device == x.device
        return torch.cuda.current_stream().cuda_stream

    streams = commlib.run_ranks(rank_main, 3, device="cuda")
    assert len({*streams, torch.cuda.default_stream().cuda_stream}) == 4


@gpu
def test_ranks_see_what_was_queued_before_them_and_their_caller_sees_what_they_queued(idx):
    torch.cuda._sleep(SLEEP_CYCLES)
    x = torch.randn(4, 64, device="cuda")

    def rank_main(rank):
        with ExpertParallel(**CONFIG) as ep:
            d = ep.dispatch(x, idx)
            out = ep.combine(d.x, d.handle)
        torch.cuda._sleep(SLEEP_CYCLES)
        return out * 2

    for out in commlib.run_ranks(rank_main, 2, device="cuda"):
        assert torch.equal(out, 4 * x)


@gpu
def test_without_run_ranks_the_device_is_the_current_one(x, idx):
    with ExpertParallel(**CONFIG) as ep:
        d = ep.dispatch(x, idx)
        assert torch.equal(ep.combine(d.x, d.handle), x)


@gpu
def test_all_sms_can_be_used_and_no_more(x, idx):
    sms = cuda.properties(0).sms

    def rank_main(rank):
        with pytest.raises(ValueError, match="num_sms"):
            ExpertParallel(num_sms=sms // 2 + 1, **CONFIG)
        with ExpertParallel(num_sms=sms // 2, **CONFIG) as ep:
            d = ep.dispatch(x, idx)
            return ep.combine(d.x, d.handle)

    for out in commlib.run_ranks(rank_main, 2, device="cuda"):
        assert torch.equal(out, 2 * x)


@gpu
@pytest.mark.parametrize("name", ["x", "topk_idx", "topk_weights"])
def test_dispatch_refuses_a_cpu_tensor_before_anything_is_sent(x, idx, name):
    good = {"x": x, "topk_idx": idx, "topk_weights": torch.ones(4, 2, device="cuda")}

    def rank_main(rank):
        with ExpertParallel(timeout=20.0, **CONFIG) as ep:
            if rank == 0:  # rank 1 would wait for it, or call out of step
                with pytest.raises(ValueError, match=f"{name} must be on.*got cpu"):
                    ep.dispatch(**{**good, name: good[name].cpu()})
            d = ep.dispatch(**good)
            return ep.combine(d.x, d.handle)

    for out in commlib.run_ranks(rank_main, 2, device="cuda"):
        assert torch.equal(out, 2 * x)


@gpu
@pytest.mark.parametrize("name", ["y", "weights", "bias", "out"])
def test_combine_refuses_a_cpu_tensor_before_anything_is_sent(x, idx, name):
    def rank_main(rank):
        with ExpertParallel(timeout=20.0, **CONFIG) as ep:
            d = ep.dispatch(x, idx)
            good = {"y": d.x, "weights": torch.ones(len(d.x), device="cuda"), "bias": x, "out": x.clone()}
            if rank == 0:
                with pytest.raises(ValueError, match=f"{name} must be on.*got cpu"):
                    ep.combine(handle=d.handle, **{**good, name: good[name].cpu()})
            return ep.combine(handle=d.handle, **good)

    for out in commlib.run_ranks(rank_main, 2, device="cuda"):
        assert torch.equal(out, 3 * x)


# -- what blocks, and what does not --------------------------------------------------------------------------


@gpu
@pytest.mark.parametrize("async_op", [False, True])
@pytest.mark.parametrize("operation", ["combine", "dispatch with a handle"])
def test_the_host_goes_on_while_the_stream_is_busy(x, idx, operation, async_op):
    def rank_main(rank):
        with ExpertParallel(**CONFIG) as ep:
            d = ep.dispatch(x, idx)
            stream = torch.cuda.current_stream()
            stream.synchronize()
            torch.cuda._sleep(SLEEP_CYCLES)
            if operation == "combine":
                result = ep.combine(d.x, d.handle, async_op=async_op)
                out, event = result if async_op else (result, None)
            else:
                again = ep.dispatch(x, handle=d.handle, async_op=async_op)
                out, event = again.x, again.event
            assert not stream.query(), "the call waited for the compute that was queued before it"
            if event is not None:
                assert not event.query()
                event.wait()
                assert not stream.query(), "Event.wait() blocked the host"
            doubled = out * 2
            stream.synchronize()
            assert event is None or event.query()
            return doubled.cpu(), (out * 2).cpu()

    for early, late in commlib.run_ranks(rank_main, 2, device="cuda", run_ahead=True):
        assert torch.equal(early, late), "the stream did not wait for the operation"
        want = 4 * x if operation == "combine" else 2 * torch.cat([x, x])
        assert torch.equal(late, want.cpu())


@gpu
def test_wait_orders_the_stream_on_which_it_is_called(idx):
    x = torch.randn(4, 64, device="cuda")

    def rank_main(rank):
        with ExpertParallel(**CONFIG) as ep:
            d = ep.dispatch(x, idx)
            torch.cuda._sleep(SLEEP_CYCLES)
            out, event = ep.combine(d.x, d.handle, async_op=True)
            other = torch.cuda.Stream()
            with torch.cuda.stream(other):
                event.wait()
                doubled = out * 2
            other.synchronize()
            return doubled.cpu()

    for out in commlib.run_ranks(rank_main, 2, device="cuda", run_ahead=True):
        assert torch.equal(out, 4 * x.cpu())


# -- failures ------------------------------------------------------------------------------------------------


def never_combine(x, idx, then, **config):
    """All ranks dispatch, all but rank 1 combine, and go on with ``then(ep)``; the errors raised, by rank."""

    def rank_main(rank):
        with ExpertParallel(timeout=1.0, startup_timeout=60.0, **CONFIG, **config) as ep:
            d = ep.dispatch(x, idx)
            try:
                if rank != 1:
                    ep.combine(d.x, d.handle)
                    then(ep)
            except commlib.CommError as error:
                return error
            finally:
                ep.group.barrier()

    return commlib.run_ranks(rank_main, 3, device="cuda", run_ahead=True)


@gpu
@pytest.mark.parametrize("num_sms", [1, 4])
def test_a_rank_that_never_combines_is_named_when_the_others_synchronize(x, idx, num_sms):
    errors = never_combine(x, idx, lambda ep: ep.synchronize(), num_sms=num_sms)
    assert errors[1] is None
    for rank in (0, 2):
        error = errors[rank]
        assert isinstance(error, commlib.PeerTimeout), error
        assert (error.rank, error.peers, error.op, error.epoch) == (rank, [1], "combine", 2)
        assert error.phase == "call"
        for said in (
            f"rank {rank} waited 1.0 s in combine",
            "phase call",
            "for rank 1",
            "last called dispatch",
        ):
            assert said in str(error)


@gpu
def test_a_failed_combine_is_raised_by_the_next_call(x, idx):
    def next_call(ep):
        torch.cuda.current_stream().synchronize()
        ep.dispatch(x, idx)

    errors = never_combine(x, idx, next_call)
    assert errors[1] is None
    for rank in (0, 2):
        assert "waited 1.0 s in combine" in str(errors[rank])


@gpu
def test_a_failed_combine_is_raised_at_the_end_if_no_call_raised_it(x, idx):
    def rank_main(rank):
        meeting = resolve_group()
        with ExpertParallel(timeout=1.0, startup_timeout=60.0, **CONFIG) as ep:
            d = ep.dispatch(x, idx)
            if rank != 1:
                ep.combine(d.x, d.handle)
            else:
                meeting.barrier()
        meeting.barrier()

    with pytest.raises(commlib.PeerTimeout, match=r"waited 1\.0 s in combine"):
        commlib.run_ranks(rank_main, 2, device="cuda", run_ahead=True)


@gpu
@pytest.mark.parametrize("tokens", [[37, 0], [0, 5, 64]])
def test_copies_to_the_host_hold_up_no_other_rank(tokens):
    world = make_world(tokens, device="cuda")

    def rank_main(rank):
        with ExpertParallel(**world.config()) as ep:
            for _ in range(20):
                d = ep.dispatch(world.x[rank], world.topk_idx[rank], layout="expert")
                d.tokens_per_expert.tolist()
                out, event = ep.combine(d.x, d.handle, async_op=True)
                event.wait()
                out.cpu()

    commlib.run_ranks(rank_main, len(tokens), device="cuda")


@gpu
def test_after_a_failure_the_gpu_goes_on(x, idx):
    never_combine(x, idx, lambda ep: ep.synchronize())

    def rank_main(rank):
        with ExpertParallel(**CONFIG) as ep:
            d = ep.dispatch(x, idx)
            return ep.combine(d.x, d.handle)

    for out in commlib.run_ranks(rank_main, 3, device="cuda"):
        assert torch.equal(out, 2 * x)


@gpu
def test_a_result_is_not_overwritten_while_a_named_stream_reads_it(x, idx):
    side = torch.cuda.Stream()
    with ExpertParallel(**CONFIG | {"slots": 1}) as ep:  # with more, another would be taken
        d = ep.dispatch(x, idx, zero_copy=True)
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            torch.cuda._sleep(SLEEP_CYCLES)
            seen = d.x.clone()
        ep.record_stream(d.x, side)
        address = d.x.data_ptr()
        del d
        again = ep.dispatch(x * 2, idx, zero_copy=True)
        assert again.x.data_ptr() == address
        torch.cuda.synchronize()
        assert torch.equal(seen.cpu(), x.cpu())
        assert torch.equal(again.x.cpu(), 2 * x.cpu())


@gpu
def test_every_communicator_has_a_stream_of_its_own():
    several = [ExpertParallel(num_sms=1, exclusive=True, **CONFIG) for _ in range(40)]
    assert len({ep._comm.backend.stream.cuda_stream for ep in several}) == 40


@gpu
def test_a_communicator_that_grows_has_its_sms_once(x, idx, monkeypatch):
    class Watched(Residency):
        def add(self, device, *facts):
            remove = super().add(device, *facts)
            counted.append(self.blocks_on(device))
            return remove

    counted: list[int] = []
    monkeypatch.setattr("commlib.devices.cuda.of_this_process", Watched())
    with ExpertParallel(**CONFIG | {"max_tokens": None, "capacity": 1, "num_sms": 1}, exclusive=True) as ep:
        d = ep.dispatch(x, idx)
        assert torch.equal(ep.combine(d.x, d.handle), x)
        assert ep.stats()["growths"] == 1
    assert len(counted) == 2 and counted[0] == counted[1]
