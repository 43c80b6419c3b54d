"""Blocks of several communicators on one GPU: a warning where they do not fit."""

import functools
import warnings
from types import SimpleNamespace

import pytest
import torch

from commlib.devices import Wish, cuda
from commlib.devices.residency import Residency

H100 = ("uuid", "cuda:0", 132)


def add(residency, blocks, device=H100):
    uuid, name, sms = device
    return residency.add(uuid, name, blocks, sms)


@pytest.fixture
def quiet():
    """Any warning is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def test_the_communicator_that_does_not_fit_is_warned_of_with_the_numbers(quiet):
    residency = Residency()
    for _ in range(5):
        add(residency, 24)
    add(residency, 12)  # 132 of 132
    with pytest.warns(RuntimeWarning) as said:
        add(residency, 1)
    text = str(said[0].message)
    assert "on cuda:0 want 133 SMs together (1 x 1 + 1 x 12 + 5 x 24), and it has 132" in text
    assert said[0].filename == __file__


def test_the_warning_comes_once_for_each_device(quiet):
    residency = Residency()
    add(residency, 132)
    with pytest.warns(RuntimeWarning, match="cuda:0"):
        add(residency, 1)
    add(residency, 100)
    other = ("another uuid", "cuda:1", 132)
    add(residency, 132, other)
    with pytest.warns(RuntimeWarning, match="cuda:1"):
        add(residency, 1, other)


def test_a_communicator_that_is_closed_counts_no_more(quiet):
    residency = Residency()
    for _ in range(10):
        remove = add(residency, 100)
        assert residency.blocks_on("uuid") == 100
        remove()
        remove()
        assert residency.blocks_on("uuid") == 0


def test_one_communicator_by_itself_is_checked_elsewhere(quiet):
    add(Residency(), 133)


@pytest.fixture
def residency(monkeypatch):
    """Of this process, on a GPU of 132 SMs that there is not."""
    residency = Residency()
    monkeypatch.setattr(cuda, "of_this_process", residency)
    monkeypatch.setattr(torch.cuda, "Event", lambda **_: None)
    monkeypatch.setattr(torch.cuda, "ExternalStream", lambda *_: SimpleNamespace(device="cpu"))
    return residency


def arguments(partition=None):
    """Of a backend that wants 100 SMs."""
    config = SimpleNamespace(stream=1, plan_stream=0, num_sms=100)
    core = SimpleNamespace(plan_stream=0, close=lambda: None)
    wish = Wish(torch.device("cuda", 3), 100, partition, 2, in_step=False)
    return core, config, wish, {"uuid": "uuid", "sms": 132}


def backend(partition=None):
    return cuda.Cuda().backend(*arguments(partition))


def test_one_that_grows_is_counted_once(quiet, residency):
    before = backend()
    before.make_way()
    after = backend()
    assert residency.blocks_on("uuid") == 100
    before.close()
    assert residency.blocks_on("uuid") == 100
    after.close()
    assert residency.blocks_on("uuid") == 0


def test_the_warning_points_at_the_users_line(residency):
    backend()
    core, *rest = arguments()
    make = functools.partial(cuda.Cuda().backend, **dict(zip(("config", "wish", "facts"), rest, strict=True)))
    with pytest.warns(RuntimeWarning) as said:
        torch.utils._pytree.tree_map(make, [core])  # under PyTorch, as operations may be
    assert said[0].filename == __file__


def test_only_what_is_outside_partitions_is_counted(quiet, residency):
    for partition, counted in ((object(), 0), (None, 100)):
        first = backend(partition)
        assert residency.blocks_on("uuid") == counted
    with pytest.warns(RuntimeWarning, match="on cuda:3 want 200 SMs"):
        backend(None)
    first.close()
    assert residency.blocks_on("uuid") == 100


@pytest.mark.parametrize("failure", [None, RuntimeError("the device is lost")])
def test_closing_a_backend_gives_its_sms_back_last(monkeypatch, failure):
    monkeypatch.setattr(torch.cuda, "Event", lambda **_: None)
    monkeypatch.setattr(torch.cuda, "ExternalStream", lambda *_: None)
    done = []

    class Core:
        plan_stream = 0

        def close(self):
            done.append("closed")
            if failure:
                raise failure

    backend = cuda.CudaBackend(Core(), SimpleNamespace(device=None), lambda: done.append("given back"))
    if failure:
        with pytest.raises(RuntimeError, match="lost"):
            backend.close()
    else:
        backend.close()
    assert done == ["closed", "given back"]
