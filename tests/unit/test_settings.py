"""Arguments of ExpertParallel: which values are taken, and as what."""

from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch

from commlib import ExpertParallel

CONFIG = {"num_experts": 8, "hidden": 64, "topk": 2, "max_tokens": 8, "dtype": torch.float32, "device": "cpu"}


def settings(**arguments):
    with ExpertParallel(**{**CONFIG, **arguments}) as ep:
        return ep.settings


@pytest.mark.parametrize("kind", [np.int64, np.int32, np.uint8])
def test_numpys_integers_are_integers(kind):
    names = ("num_experts", "hidden", "topk", "max_tokens", "num_sms", "capacity", "slots", "ranks_per_node")
    found = settings(**{name: kind(4 if name == "num_experts" else 2) for name in names})
    assert {name: getattr(found, name) for name in names} == dict.fromkeys(names, 2) | {"num_experts": 4}
    assert all(type(getattr(found, name)) is int for name in names)


@pytest.mark.parametrize(
    "bad", [True, 2.0, "2", np.float32(2), np.array([2, 2]), 1 + 0j, [2], torch.tensor(2), np.True_], ids=repr
)
def test_what_is_no_integer_is_refused(bad):
    for name in ("hidden", "slots", "num_sms", "capacity"):
        with pytest.raises(TypeError, match=f"{name} must be an int, got"):
            settings(**{name: bad})


@pytest.mark.parametrize(
    "dtype", [torch.float16, "float16", "torch.float16", np.float16, np.dtype("float16")]
)
def test_a_dtype_may_be_named(dtype):
    assert settings(dtype=dtype).dtype is torch.float16


def test_bfloat16_may_be_named():
    assert settings(dtype="bfloat16").dtype is torch.bfloat16


@pytest.mark.parametrize(
    "bad",
    [None, "float8", "nn", "", 3, torch.int32, "int32", np.int8, pytest.param(object(), id="object()")],
    ids=repr,
)
def test_what_is_no_dtype_of_rows_is_refused(bad):
    with pytest.raises(ValueError, match="dtype must be bfloat16, float16, float32 or float64, got"):
        settings(dtype=bad)


@pytest.mark.parametrize(
    "seconds", [5, Decimal(5), Fraction(5), np.float32(5), np.int8(5), torch.tensor(5.0)]
)
def test_seconds_may_be_any_number(seconds):
    with ExpertParallel(**CONFIG, timeout=seconds, startup_timeout=seconds) as ep:
        assert ep.timeout == 5.0 and type(ep.timeout) is float
        ep.timeout = 2 * seconds
        assert ep.timeout == 10.0 and type(ep.timeout) is float


@pytest.mark.parametrize(
    ("bad", "error"),
    [
        *((bad, TypeError) for bad in ("a", "5", True, [5], 5j, np.array([5.0, 5.0]))),
        *((bad, ValueError) for bad in (0, -1, 10**400, float("nan"), Decimal("inf"))),
    ],
)
def test_what_is_no_positive_number_is_refused(bad, error):
    for name in ("timeout", "startup_timeout", "link_gbps"):
        with pytest.raises(error, match=f"^{name} must be"):
            settings(**{name: bad})
    check_timeout_refused(bad, error)


@pytest.mark.parametrize(("bad", "error"), [(None, TypeError), (1e30, ValueError)])
def test_what_is_no_time_is_refused(bad, error):
    check_timeout_refused(bad, error)


def check_timeout_refused(bad, error):
    with ExpertParallel(**CONFIG) as ep:
        with pytest.raises(error, match=r"^timeout must be"):
            ep.timeout = bad
        assert ep.timeout == 600.0


def test_huge_numbers_are_not_spelt_out():
    with pytest.raises(ValueError) as caught:
        settings(hidden=10**5000)
    assert len(str(caught.value)) < 200
