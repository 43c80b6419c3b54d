"""What a type checker sees of the package (PEP 561: py.typed)."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mypy")

ROOT = Path(__file__).parents[2]
PROGRAM = """\
import numpy as np
import torch
from typing import Any
import commlib
from commlib import Dispatched

ep = commlib.ExpertParallel(num_experts=4, hidden=16, topk=2, max_tokens=8, dtype=torch.float32)
x, idx = torch.randn(3, 16), torch.zeros(3, 2, dtype=torch.int64)
weight = torch.nn.Parameter(torch.ones(3, 16))
array, untyped, wanted = np.ones((3, 16), np.float32), eval("x"), bool(eval("True"))
d = ep.dispatch(x, idx, layout="expert", overflow="drop")
reveal_type(d.x)  # Tensor
reveal_type(d.finish().source)  # Tensor
reveal_type(d.offsets.diff())  # Tensor | Any
reveal_type(ep.dispatch(weight, idx).x)  # Tensor
reveal_type(ep.dispatch(array, idx).x)  # ndarray[tuple[Any, ...], dtype[Any]]
reveal_type(ep.dispatch(untyped, idx).x)  # Any
reveal_type(ep.combine(x, d.handle))  # Tensor
reveal_type(ep.combine(x, d.handle, async_op=False))  # Tensor
reveal_type(ep.combine(x, d.handle, async_op=True))  # tuple[Tensor, Event]
reveal_type(ep.combine(x, d.handle, async_op=wanted))  # Tensor | tuple[Tensor, Event]
reveal_type(ep.combine(array, d.handle))  # ndarray[tuple[Any, ...], dtype[Any]]
reveal_type(commlib.__version__)  # str
d = ep.dispatch(x, idx, layout="experts")  # error: Literal['experts']
d = ep.dispatch(x, idx, overflow="lose")  # error: Literal['lose']
d = ep.dispatch([1, 2], idx)  # error: type "list[int]"
d = ep.dispatch(x, [[0, 1]] * 3)  # error: incompatible type "list[list[int]]"
d = ep.dispatch((x, array), idx, topk_weights=array)
reveal_type(commlib.run_ranks(lambda rank: str(rank), 2))  # list[str]
commlib.SMPartition(2, device=3)  # error: incompatible type "int"
commlib.ExpertParallel(num_experts=4, hidden=8, topk=2, max_tokens=8, routing="hop")  # error: Literal['hop']

def rows(d: Dispatched[torch.Tensor]) -> int:
    return len(d.x)
"""
QUALIFIED = re.compile(r"\b(?:[a-z_]+\.)+(?=[A-Za-z])")


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    """By line, what mypy says of the program."""
    place = tmp_path_factory.mktemp("user")
    (place / "user.py").write_text(PROGRAM)
    (place / "mypy.ini").write_text("[mypy]\n[mypy-mpi4py.*,cupy.*]\nignore_missing_imports = True\n")
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "user.py"],
        cwd=place,
        env={**os.environ, "MYPYPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=200,
    )
    found = {}
    for line in done.stdout.splitlines():
        if match := re.match(r"user\.py:(\d+): (?:note|error): (.*)", line):
            found[int(match[1])] = QUALIFIED.sub("", match[2])
    return found


@pytest.mark.parametrize("number", [n for n, line in enumerate(PROGRAM.splitlines(), 1) if "  # " in line])
def test_mypy_sees_types_and_refuses_what_cannot_be(said, number):
    what = PROGRAM.splitlines()[number - 1].partition("  # ")[2]
    if what.startswith("error: "):
        assert what.removeprefix("error: ") in said[number]
    else:
        assert said[number] == f'Revealed type is "{what}"'


def test_mypy_finds_nothing_else(said):
    known = {n for n, line in enumerate(PROGRAM.splitlines(), 1) if "  # " in line}
    assert said.keys() <= known, said
