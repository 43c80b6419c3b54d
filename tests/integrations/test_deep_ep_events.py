"""Events of commlib.compat.deep_ep."""

import contextlib
import threading

import pytest
import torch
from deep_ep_reference import expected_prefix, expected_sums, laid_out, made, on_ranks, rows_for, top_k
from reference import expected_rank_layout, make_world

import commlib
import commlib.compat.deep_ep as deep_ep
from commlib.compat.deep_ep import Buffer, EventHandle, EventOverlap, Refused, utils
from commlib.compat.deep_ep.events import Work


def world_of(tokens, device="cpu"):
    return make_world(tokens, 4, 2, 16, torch.bfloat16, holes=0.2, device=device)


def test_a_call_that_is_not_asynchronous_has_no_event():
    overlap = EventOverlap()
    assert overlap.event is None
    with pytest.raises(Refused, match="not asynchronous"):
        overlap.current_stream_wait()
    with overlap:  # nothing to wait for at its end
        pass


def test_an_event_of_the_present_is_waited_for_at_once():
    handle = EventHandle()
    assert handle.current_stream_wait() is None
    for captured in (EventOverlap(handle), Buffer.capture()):
        assert isinstance(captured.event, EventHandle)
        assert captured.current_stream_wait() is None
        assert captured.event is not None


def test_a_hook_is_called_once_after_the_wait():
    overlap, said = EventOverlap(EventHandle(), (torch.zeros(1),)), []
    overlap.register_hook_after_wait(lambda: said.append("hook") or "result")
    with pytest.raises(Refused, match="a hook is registered already"):
        overlap.register_hook_after_wait(lambda: None)
    assert said == []
    assert overlap.wait() == "result" and said == ["hook"]
    assert overlap.wait() is None and said == ["hook"]
    overlap.register_hook_after_wait(lambda: "another")
    assert overlap.current_stream_wait() == "another"


@pytest.mark.parametrize("release", [False, True])
def test_a_context_waits_at_its_end(release):
    overlap, said = EventOverlap(EventHandle()), []
    overlap.register_hook_after_wait(lambda: said.append("waited"))
    with overlap(release_handle=release) as entered:
        assert entered is overlap
        assert said == []
    assert said == ["waited"]
    assert (overlap.event is None) == release


def test_waiting_may_release_the_handle():
    overlap = EventOverlap(EventHandle())
    overlap.current_stream_wait(release_handle=True)
    assert overlap.event is None


def test_deep_ep_utils_has_them():
    assert (utils.EventHandle, utils.EventOverlap) == (EventHandle, EventOverlap)


def test_a_call_returns_before_rows_have_moved_and_its_event_waits(device):
    """Rank 1 comes late to the combine: rank 0's call has returned long before."""
    world = world_of([8, 8], device)
    may_go_on = threading.Event()

    def call(buffer, rank):
        handle = buffer.dispatch(world.x[rank], **laid_out(buffer, world, rank), **top_k(world, rank))[4]
        y = rows_for(world, rank)
        buffer.combine(y, handle)  # communicators are there
        if rank == 1:
            assert may_go_on.wait(20)
        out, _, event = buffer.combine(y, handle, async_finish=True)
        may_go_on.set()
        event.current_stream_wait()
        return torch.equal(out, buffer.combine(y, handle)[0])

    assert on_ranks(world, call) == [True, True]


def test_results_are_complete_after_the_event_whichever_thread_waits(device):
    """fp8 rows are taken apart when a thread waits: once, also if two do."""
    world = world_of([300, 200], device)

    def call(buffer, rank):
        pair = (world.x[rank].to(torch.float8_e4m3fn), world.x[rank][:, :3].float())
        args = laid_out(buffer, world, rank) | top_k(world, rank)
        found = []
        for _ in range(20):
            (rows, scales), *_, event = buffer.dispatch(pair, **args, async_finish=True)
            waiting = [threading.Thread(target=event.current_stream_wait) for _ in range(2)]
            for thread in waiting:
                thread.start()
            event.current_stream_wait()
            found.append((rows.float().cpu(), scales.cpu()))
            for thread in waiting:
                thread.join()
        return found

    for rank, found in enumerate(on_ranks(world, call)):
        want = expected_rank_layout(world, rank).x
        for rows, scales in found:
            assert torch.equal(rows, want.to(torch.float8_e4m3fn).float())
            assert torch.equal(scales, want[:, :3].float())


@pytest.mark.parametrize("inside", [True, False])
def test_the_wait_may_be_in_another_inference_mode_than_the_call(device, inside):
    """The mode belongs to a thread, and another thread may wait."""
    world = world_of([30, 20], device)

    def call(buffer, rank):
        args = laid_out(buffer, world, rank) | top_k(world, rank)
        with torch.inference_mode(inside):
            rows, *_, handle, event = buffer.dispatch(world.x[rank], **args, async_finish=True)
        with torch.inference_mode(not inside):
            event.current_stream_wait()
        with torch.inference_mode(inside):
            sums, _, event = buffer.combine(
                rows, handle, bias=(world.x[rank],) * 2, topk_weights=None, async_finish=True
            )
        with torch.inference_mode(not inside):
            event.current_stream_wait()
        return handle[0].clone(), buffer.combine(rows, handle, bias=(world.x[rank],) * 2)[0], sums

    for prefix, want, sums in on_ranks(world, call):
        assert torch.equal(sums, want)
        assert torch.equal(prefix.cpu(), expected_prefix(world))


def test_what_fails_after_an_event_is_not_forgotten():
    """A second wait must not say that results are complete."""
    done = []

    def step():
        done.append(len(done))
        if len(done) < 3:
            raise RuntimeError("not yet")

    work = Work(torch.device("cpu"), lambda: pytest.fail("no stream on the CPU"))
    work.then(step)
    work.then(lambda: done.append("last"))
    event = work.end(True)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="not yet"):
            event.current_stream_wait()
    event.current_stream_wait()
    event.current_stream_wait()
    assert done == [0, 1, 2, "last"]


def test_later_calls_come_after_an_asynchronous_dispatch(device):
    """Of the same buffer along its handle, whether or not its event was waited for."""
    world = world_of([300, 200], device)

    def call(buffer, rank):
        args = laid_out(buffer, world, rank) | top_k(world, rank)
        found = []
        for _ in range(10):
            x, _, weights, _, handle, first = buffer.dispatch(world.x[rank], **args, async_finish=True)
            wide = buffer.dispatch(world.x[rank].float(), handle)[0]
            out, back, event = buffer.combine(
                x, handle, weights, previous_event=first, async_finish=True, allocate_on_comm_stream=True
            )
            event.current_stream_wait()
            found.append((wide.cpu(), out.cpu(), back.cpu()))
        return found

    for rank, found in enumerate(on_ranks(world, call)):
        ids, x = world.topk_idx[rank].cpu(), world.x[rank].cpu()
        copies = torch.stack([((ids // 2) == r).logical_and(ids >= 0).any(1) for r in range(2)]).sum(0)
        for wide, out, back in found:
            assert torch.equal(wide, expected_rank_layout(world, rank).x.float())
            assert torch.equal(out, (x.float() * copies.view(-1, 1)).bfloat16())
            assert torch.equal(back, world.topk_weights[rank].cpu().masked_fill(ids < 0, 0))


def test_tensors_are_not_read_before_the_previous_event(device):
    """Their values come when it is waited for."""
    world = world_of([5, 7], device)

    def later(*pairs):
        """Zeros that become values, and the event at which they do."""
        targets = [torch.zeros_like(value) for value in pairs]
        steps = [lambda t=t, v=v: t.copy_(v) for t, v in zip(targets, pairs, strict=True)]
        return (*targets, EventHandle._of((), steps))

    def call(buffer, rank):
        x, ids, weights = world.x[rank], world.topk_idx[rank], world.topk_weights[rank]
        late_ids, event = later(ids)
        per_rank, _, per_expert, mask, _ = buffer.get_dispatch_layout(late_ids, 4, event)
        rows, scales = x.to(torch.float8_e4m3fn), x[:, :1].float()
        *late, event = later(per_rank, per_expert, mask, rows, scales, ids, weights)
        got, *_, handle, _ = buffer.dispatch(
            (late[3], late[4]), None, late[0], None, late[2], late[1], late[5], late[6], previous_event=event
        )
        y, bias, event = later(rows_for(world, rank).float(), torch.ones_like(x).float())
        if device == "cuda":
            y, bias, event = later(rows_for(world, rank), torch.ones_like(x))
        sums, *_ = buffer.combine(y, handle, bias=(bias, bias), previous_event=event)
        with made(deep_ep.ElasticBuffer, num_max_tokens_per_rank=8) as elastic:
            *late, event = later(x, ids, weights)
            rest = dict(num_experts=4, previous_event=event, allocate_on_comm_stream=True)
            (second, _, back, handle, _) = elastic.dispatch(late[0], late[1], late[2], **rest)
            y, values, event = later(rows_for(world, rank), back)
            rest = dict(previous_event_before_epilogue=event)
            other_sums, back, _ = elastic.combine(y, handle, values, **rest)
        return got, sums, second, other_sums, back

    for rank, ((rows, scales), sums, second, other_sums, back) in enumerate(on_ranks(world, call)):
        want = expected_rank_layout(world, rank).x
        assert torch.equal(rows.float().cpu(), want.to(torch.float8_e4m3fn).float())
        assert torch.equal(scales.cpu(), want[:, :1].float())
        assert torch.equal(second.cpu(), want)
        total = expected_sums(world, rank, lambda r: rows_for(world, r))
        assert torch.equal(sums.float().cpu(), total + 2) and torch.equal(other_sums.float().cpu(), total)
        assert torch.equal(back, world.topk_weights[rank].masked_fill(world.topk_idx[rank] < 0, 0))


@pytest.mark.parametrize("kind", [deep_ep.Buffer, deep_ep.ElasticBuffer])
def test_a_handle_waits_for_its_dispatch_before_another_communicator_uses_it(kind):
    world = world_of([3, 4])

    class Watched:
        def __init__(self, event):
            self.event, self.waits = event, 0

        def current_stream_wait(self):
            self.waits += 1
            self.event.current_stream_wait()

    def call(buffer, rank):
        x = (world.x[rank].to(torch.float8_e4m3fn), world.x[rank][:, :1].float())
        if kind is deep_ep.Buffer:
            args = laid_out(buffer, world, rank) | top_k(world, rank)
            handle = buffer.dispatch(x, **args, async_finish=True)[4]
        else:
            rest = dict(num_experts=4, num_max_tokens_per_rank=8, async_with_compute_stream=True)
            handle = buffer.dispatch(x, **top_k(world, rank), **rest)[3]
        watched = handle._route.event = Watched(handle._route.event)
        out = [buffer.combine(rows_for(world, rank), handle)[0] for _ in range(2)]
        assert torch.equal(*out)
        return watched.waits

    assert on_ranks(world, call, kind) == [1, 1]


def test_inputs_may_go_before_the_event(device):
    world = world_of([64, 64], device)

    def call(buffer, rank):
        args = laid_out(buffer, world, rank)
        found = []
        for _ in range(10):
            x, *_, event = buffer.dispatch(
                world.x[rank].clone(), **args, topk_idx=world.topk_idx[rank].clone(),
                topk_weights=world.topk_weights[rank].clone(), async_finish=True
            )  # fmt: skip
            noise = [torch.full((64, 8), float("nan"), device=device) for _ in range(4)]
            event.current_stream_wait()
            found.append(x.cpu())
            del noise
        return found

    for rank, found in enumerate(on_ranks(world, call)):
        assert all(torch.equal(x, expected_rank_layout(world, rank).x) for x in found)


def test_an_overlap_may_begin_before_and_end_after_other_work(device):
    world = world_of([30, 20], device)

    def call(buffer, rank):
        args = laid_out(buffer, world, rank) | top_k(world, rank)
        x, *_, handle, event = buffer.dispatch(world.x[rank], **args, async_finish=True)
        with event(release_handle=True):
            other = torch.ones(8, device=device).sum()
        assert event.event is None and other == 8
        return x, handle

    for rank, (x, _) in enumerate(on_ranks(world, call)):
        assert torch.equal(x.cpu(), expected_rank_layout(world, rank).x)


def test_a_layout_may_be_asynchronous(device):
    world = world_of([5], device)

    def call(buffer, rank):
        *found, event = buffer.get_dispatch_layout(
            world.topk_idx[0], 4, buffer.capture(), async_finish=True, allocate_on_comm_stream=True
        )
        assert isinstance(event.event, EventHandle)
        event.current_stream_wait()
        return found

    assert on_ranks(world, call)[0][0].tolist() == [int((world.topk_idx[0] >= 0).any(1).sum())]


def test_a_peer_that_fails_is_known_after_the_wait():
    world = world_of([4, 4])

    def rank_main(rank):
        with made() as buffer:
            args = laid_out(buffer, world, rank) | top_k(world, rank)
            handle = buffer.dispatch(world.x[rank], **args)[4]
            buffer.combine(rows_for(world, rank), handle)
            if rank == 1:
                raise KeyError("rank 1 has had enough")
            event = buffer.combine(rows_for(world, rank), handle, async_finish=True)[2]
            with pytest.raises(commlib.CommError, match="rank 1 has had enough"):
                event.current_stream_wait()
            raise commlib.CommError("as expected")

    with pytest.raises(KeyError, match="rank 1 has had enough"):
        commlib.run_ranks(rank_main, 2)


@pytest.mark.parametrize("wrong", [torch.zeros(1), "now", object()])
def test_what_is_no_event_is_refused(wrong):
    world = world_of([2])

    def call(buffer, rank):
        args = laid_out(buffer, world, rank) | top_k(world, rank)
        with pytest.raises(TypeError, match="must be an EventOverlap or EventHandle, got"):
            buffer.dispatch(world.x[0], **args, previous_event=wrong)

    on_ranks(world, call)


def test_the_result_of_a_call_that_was_not_asynchronous_is_nothing_to_wait_for():
    """Callers may pass on whatever they got."""
    world = world_of([2])

    def call(buffer, rank):
        args = laid_out(buffer, world, rank) | top_k(world, rank)
        *_, event = buffer.dispatch(world.x[0], **args)
        return buffer.dispatch(world.x[0], **args, previous_event=event)[0]

    assert torch.equal(on_ranks(world, call)[0], expected_rank_layout(world, 0).x)


def test_there_is_no_stream_without_a_gpu(monkeypatch):
    monkeypatch.setattr(commlib.cuda, "require", lambda: (_ for _ in ()).throw(RuntimeError("no GPU")))

    def call(buffer, rank):
        with pytest.raises(RuntimeError, match="no GPU"):
            buffer.get_comm_stream()

    on_ranks(world_of([1]), call)


class NotedStream:
    """Notes the calls on a CUDA stream, and on its events, in order."""

    def __init__(self, name, log):
        self.name, self.log = name, log

    def wait_stream(self, other):
        self.log.append(f"{self.name} waits for {other.name}")

    def record_event(self):
        self.log.append(f"{self.name} records")
        return self.name

    def wait_event(self, event):
        self.log.append(f"{self.name} waits for the event of {event}")


class NotedTensor:
    def __init__(self, log):
        self.log = log

    def record_stream(self, stream):
        self.log.append(f"a tensor is {stream.name}'s, too")


def test_on_a_gpu_results_are_finished_on_a_stream_whichever_thread_waits(monkeypatch):
    """With streams that only note: no GPU is needed to see the order."""
    log = []
    users, ours = NotedStream("the user's", log), NotedStream("ours", log)
    current = [users]

    @contextlib.contextmanager
    def stream(one):
        current.append(one)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: current[-1])
    monkeypatch.setattr(torch.cuda, "stream", stream)
    work = Work(torch.device("cuda", 0), lambda: ours)
    work.then(lambda: log.append(f"a step on {current[-1].name}"), NotedTensor(log))
    overlap = work.end(True)
    assert log == [
        "ours waits for the user's",
        "a step on ours",
        "ours records",
        "a tensor is ours's, too",
    ]
    overlap.current_stream_wait()
    assert log[4:] == ["the user's waits for the event of ours"]
    work.then(lambda: None, NotedTensor(log))
    del log[:]
    assert work.end(False).event is None  # on the user's own stream, in order
    assert log == ["a step on the user's"]
