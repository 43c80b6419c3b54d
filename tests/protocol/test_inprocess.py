"""Ranks as threads of one process: the device they share."""

import contextlib

import numpy as np
import pytest
import torch
from torch.cuda._utils import _get_device_index

import commlib
from commlib import cuda
from commlib.startup.group import resolve_group


class Stream:
    """A CUDA stream, as far as run_ranks needs one."""

    def record_event(self):
        return self

    def wait_event(self, event):
        pass

    def synchronize(self):
        pass


@pytest.fixture
def chosen(monkeypatch):
    """The devices that threads made current, on a machine whose current GPU is number 3.

    torch.cuda.set_device asks the same function for the number, which refuses a device that has none.
    """
    devices = []
    monkeypatch.setattr(cuda, "why_not", lambda: "")
    monkeypatch.setattr(cuda, "warm_up", lambda index: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "set_device", lambda d: devices.append(_get_device_index(d)))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda d: _get_device_index(d) is not None and Stream())
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    return devices


def test_a_function_comes_first_and_then_the_number_of_ranks():
    with pytest.raises(TypeError, match="run_ranks takes a function and the number of ranks, got 2 "):
        commlib.run_ranks(2, lambda rank: rank)
    for bad in ("2", 2.0, True, None):
        with pytest.raises(TypeError, match="world_size must be an int"):
            commlib.run_ranks(lambda rank: rank, bad)
    with pytest.raises(ValueError, match="world_size must be at least 1, got 0"):
        commlib.run_ranks(lambda rank: rank, 0)
    assert commlib.run_ranks(lambda rank: rank, np.int64(2)) == [0, 1]


@pytest.mark.parametrize(
    ("asked", "number"),
    [("cuda", 3), (torch.device("cuda"), 3), ("cuda:1", 1), (torch.device("cuda", 0), 0)],
)
def test_all_ranks_are_on_the_callers_gpu(chosen, asked, number):
    groups = commlib.run_ranks(lambda rank: resolve_group().device, 2, device=asked)
    assert groups == [f"cuda:{number}"] * 2
    assert chosen == [number] * 2
