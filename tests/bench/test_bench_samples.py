"""The files of samples: laid out for diffs, without places of this machine, and what tables are made from."""

import argparse
import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.harness.samples import RECORDED, laid_out, options, write_samples

FILES = sorted(RECORDED.glob("*.json"))
SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
CONTENT = st.recursive(SCALARS, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner))


def test_a_list_of_numbers_has_a_line_of_its_own(tmp_path):
    content = {"config": {"tokens": 4, "only": ["gloo", "mpi"]}, "s": {"dispatch": [0.5, 1], "none": []}}
    write_samples(tmp_path / "new" / "found.json", content | {"pairs": [(1, 2), (3, 4)], "sweep": {8: [1.5]}})
    assert (
        (tmp_path / "new" / "found.json").read_text()
        == """\
{
 "config": {
  "tokens": 4,
  "only": ["gloo", "mpi"]
 },
 "s": {
  "dispatch": [0.5, 1],
  "none": []
 },
 "pairs": [
  [1, 2],
  [3, 4]
 ],
 "sweep": {
  "8": [1.5]
 }
}
"""
    )


@given(CONTENT)
def test_the_layout_changes_no_value(content):
    assert json.loads(laid_out(content)) == content


def test_options_leave_out_where_files_are():
    args = argparse.Namespace(tokens=4, only={"mpi", "gloo"}, json=Path("/tmp/a.json"), plot=None)
    assert options(args) == {"tokens": 4, "only": ["gloo", "mpi"], "plot": None}


def test_a_path_among_samples_is_refused(tmp_path):
    with pytest.raises(TypeError, match="not JSON serializable"):
        write_samples(tmp_path / "found.json", {"config": {"json": tmp_path}})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_recorded_samples_are_as_they_would_be_written(path):
    text = path.read_text()
    assert text == laid_out(json.loads(text)) + "\n"
    assert re.findall(r'"[~/][^"]*"|"[A-Z]:\\[^"]*"', text) == []  # a path of some machine
