"""Blocks of several communicators on one GPU: a warning where they do not fit."""

import warnings
from types import SimpleNamespace

import pytest
import torch

from commlib import bootstrap
from commlib.backend import CudaBackend
from commlib.residency import Residency

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


def test_only_what_is_outside_partitions_is_counted(quiet, monkeypatch):
    residency = Residency()
    monkeypatch.setattr(bootstrap, "of_this_process", residency)
    facts = {"uuid": "uuid", "sms": 132}
    for partition, counted in ((object(), 0), (None, 100)):
        settings = SimpleNamespace(partition=partition, device=torch.device("cuda", 3))
        remove = bootstrap._count_blocks(settings, facts, 100)
        assert residency.blocks_on("uuid") == counted
    with pytest.warns(RuntimeWarning, match="on cuda:3 want 200 SMs"):
        bootstrap._count_blocks(settings, facts, 100)
    remove()
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

    backend = CudaBackend(Core(), SimpleNamespace(device=None), lambda: done.append("given back"))
    if failure:
        with pytest.raises(RuntimeError, match="lost"):
            backend.close()
    else:
        backend.close()
    assert done == ["closed", "given back"]
