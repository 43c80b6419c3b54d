"""The simulated GPU in PyTorch keeps the order of streams, and only that; and commlib's waits are all needed.

Part of `make test-gpu-simulated`. Each of the faults below is one that no test on the CPU can see.
"""

import ctypes
import math

import _simulated_cuda
import pytest
import torch

from commlib import ExpertParallel

CONFIG = {"num_experts": 8, "hidden": 64, "topk": 2, "max_tokens": 8, "num_sms": 1, "timeout": 30.0}
CONFIG["dtype"] = torch.float32
SLEEP_CYCLES = 100_000_000  # a twentieth of a second
LATENESS_NS = 60_000_000  # longer than an operation of CONFIG takes

pytestmark = pytest.mark.gpu


# -- PyTorch's rules -----------------------------------------------------------------------------------------


def test_a_device_without_an_index_is_another_device_and_means_the_current_one():
    x = torch.ones(2, device="cuda")
    assert x.device == torch.device("cuda:0") != torch.device("cuda")
    assert torch.cuda.current_device() == 0 and torch.cuda.Stream().device == x.device


def test_what_is_not_there_is_refused():
    with pytest.raises(RuntimeError, match="invalid device ordinal"):
        torch.ones(2, device="cuda:1")
    with pytest.raises(RuntimeError, match="same device"):
        torch.ones(2, device="cuda") + torch.ones(2)


def test_a_stream_sees_what_it_has_waited_for_and_nothing_else():
    main, side = torch.cuda.current_stream(), torch.cuda.Stream()
    torch.cuda._sleep(SLEEP_CYCLES)
    x = torch.full((4,), 3.0, device="cuda")
    with torch.cuda.stream(side):
        assert x.cpu().isnan().all(), "x was there before its stream had come that far"
        side.wait_stream(main)
        assert (x.cpu() == 3).all()


def test_an_event_is_done_when_its_stream_has_come_there():
    begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    assert ended.query(), "nothing has been recorded"
    begun.record()
    torch.cuda._sleep(SLEEP_CYCLES)
    ended.record()
    assert not ended.query()
    ended.synchronize()
    assert ended.query() and begun.elapsed_time(ended) >= 50


def test_freed_memory_is_overwritten_and_given_out_again_unless_its_users_were_named():
    side = torch.cuda.Stream()

    def new():
        return torch.full((12345,), 3.0, device="cuda")  # of no size that others have

    address = new().data_ptr()
    torch.cuda.synchronize()
    assert math.isnan(ctypes.c_float.from_address(address).value)
    x = new()
    assert x.data_ptr() == address
    with torch.cuda.stream(side):
        torch.cuda._sleep(SLEEP_CYCLES)
    x.record_stream(side)
    del x
    assert new().data_ptr() != address, "memory in use was given out"
    assert ctypes.c_float.from_address(address).value == 3
    side.synchronize()


def test_a_copy_on_the_device_is_no_wait_for_the_host():
    x = torch.full((4,), 3.0, device="cuda")
    torch.cuda._sleep(SLEEP_CYCLES)
    y = x.clone()
    assert not torch.cuda.current_stream().query()
    assert (y.cpu() == 3).all()


def test_backward_runs_on_the_streams_of_forward():
    seen, side = [], torch.cuda.Stream()
    x = torch.ones(4, device="cuda", requires_grad=True)
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        y = x * 2
        y.register_hook(lambda grad: seen.append(torch.cuda.current_stream()))
        z = y.sum()
    z.backward()
    assert seen == [side]
    assert (x.grad.cpu() == 2).all()


# -- commlib's waits -----------------------------------------------------------------------------------------


class Forgetful:
    """A core that is told nothing of the streams that use its memory."""

    def __init__(self, core):
        self._core = core

    def __getattr__(self, name):
        return getattr(self._core, name)

    def note_uses(self, addresses, stream):
        pass


@pytest.fixture
def forget(monkeypatch):
    """``forget(ep, what)``: from now on commlib omits one of its waits."""

    def forget(ep, what):
        backend = ep._comm.backend
        own, wait_stream = backend.stream.cuda_stream, torch.cuda.Stream.wait_stream

        def wait_but_once(self, other):
            if own != (self if what == "begin" else other).cuda_stream:
                wait_stream(self, other)

        if what == "begin":
            _simulated_cuda.set_lateness(LATENESS_NS)
        else:
            with torch.cuda.stream(backend.stream):
                torch.cuda._sleep(SLEEP_CYCLES)  # so that communication is late
        if what in ("begin", "end"):
            monkeypatch.setattr(torch.cuda.Stream, "wait_stream", wait_but_once)
        elif what == "record_stream":
            monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: None)
        elif what == "event":
            monkeypatch.setattr(torch.cuda.Event, "wait", lambda event, stream: None)
        elif what == "note_uses":
            backend.core = Forgetful(backend.core)

    yield forget
    _simulated_cuda.set_lateness(0)


@pytest.fixture
def x():
    return torch.rand(4, 64, device="cuda")  # other numbers than the test before left in memory


@pytest.fixture
def idx():
    return torch.tensor([[0, 7]] * 4, device="cuda")


@pytest.mark.parametrize("forgotten", ["", "begin", "end"])
def test_a_combine_waits_for_what_it_reads_and_is_waited_for(x, idx, forget, forgotten):
    with ExpertParallel(**CONFIG) as ep:
        d = ep.dispatch(x, idx)
        forget(ep, forgotten)
        out = ep.combine(d.x * 3, d.handle)
        assert torch.equal(out, 3 * x) == (not forgotten)
        torch.cuda.synchronize()


@pytest.mark.parametrize("forgotten", ["", "end", "record_stream", "event"])
def test_an_asynchronous_combine_keeps_what_it_reads(x, idx, forget, forgotten):
    with ExpertParallel(**CONFIG) as ep:
        d = ep.dispatch(x, idx)
        y = d.x * 3
        forget(ep, forgotten)
        out, event = ep.combine(y, d.handle, async_op=True)
        del y
        torch.full_like(d.x, 5.0).sum().item()  # in the memory of y, where it has gone
        event.wait()
        # An asynchronous operation does without the wait at its end.
        assert torch.equal(out, 3 * x) == (forgotten in ("", "end"))
        torch.cuda.synchronize()


@pytest.mark.parametrize(
    ("async_op", "forgotten"), [(False, ""), (False, "end"), (True, ""), (True, "end"), (True, "event")]
)
def test_rows_of_a_dispatch_are_waited_for(x, idx, forget, async_op, forgotten):
    with ExpertParallel(**CONFIG) as ep:
        forget(ep, forgotten)
        d = ep.dispatch(x, idx, layout="expert", async_op=async_op).finish()
        wrong = forgotten == ("event" if async_op else "end")
        assert torch.equal(d.x, torch.cat([x, x])) != wrong
        torch.cuda.synchronize()


@pytest.mark.parametrize("forgotten", ["", "note_uses"])
def test_a_slot_is_not_lent_again_while_it_is_read(x, idx, forget, forgotten):
    side = torch.cuda.Stream()
    with ExpertParallel(**CONFIG, slots=1) as ep:
        forget(ep, forgotten)
        d = ep.dispatch(x, idx, zero_copy=True)
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            torch.cuda._sleep(SLEEP_CYCLES)
            seen = d.x.clone()
        ep.record_stream(d.x, side)
        del d
        ep.dispatch(x * 2, idx, zero_copy=True)
        torch.cuda.synchronize()
        assert torch.equal(seen, x) == (not forgotten)


def test_a_device_without_an_index_serves_rows_on_the_current_one(x, idx):
    with ExpertParallel(device="cuda", **CONFIG) as ep:
        assert ep.device == x.device
        d = ep.dispatch(x, idx)
        object.__setattr__(ep.settings, "device", torch.device("cuda"))  # what a comparison would then find
        with pytest.raises(ValueError, match="must be on cuda"):
            ep.combine(d.x, d.handle)
