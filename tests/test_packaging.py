"""What users install: the distribution's name, and what is in its source archive."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

import commlib

ROOT = Path(__file__).parent.parent
BUILT = ("PKG-INFO", "setup.cfg")  # by setuptools, with a folder for egg-info
LEFT_OVER = (
    "commlib/_core.cpython-300-x86_64-linux-gnu.so",
    "commlib/_core.cpython-300-x86_64-linux-gnu.sources",
    "commlib/__pycache__/group.cpython-300.pyc",
    "tests/__pycache__/conftest.cpython-300.pyc",
    "tests/cpp/suite.o",
    "build/lib/commlib/group.py",
    "bench/results/nvidia-2026-11-27-steps.log",
    "bench/results/local/dispatch_combine-cpu-r4.json",
)


def tracked():
    """Files of the checkout that are in git, or None where it is none."""
    if not (ROOT / ".git").exists() or not shutil.which("git"):
        return None
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    return [name for name in listed.stdout.split("\0") if (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    """What is in git, and what an sdist of it has that was made without nvcc among leftovers of builds."""
    names = tracked()
    if names is None:
        pytest.skip("no git checkout")
    tree = tmp_path_factory.mktemp("tree")
    for name in names:
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tree / name)
    for name in LEFT_OVER:
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text("left over")
    subprocess.run(
        [sys.executable, "setup.py", "-q", "sdist", "--dist-dir", "out"],
        cwd=tree,
        env={**os.environ, "COMMLIB_CUDA_ARCHS": "none"},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    (archive,) = (tree / "out").iterdir()
    with tarfile.open(archive) as tar:
        return archive.name, names, {m.name.partition("/")[2] for m in tar.getmembers() if m.isfile()}


def test_an_sdist_has_the_distributions_name_and_the_modules_version(sdist):
    assert sdist[0] == f"commlib_ep-{commlib.__version__}.tar.gz"


def test_an_sdist_holds_what_is_in_git_and_no_leftovers(sdist):
    _, names, packed = sdist
    made = {name for name in packed if name in BUILT or name.startswith("commlib_ep.egg-info/")}
    assert packed - made == set(names)


def test_no_text_names_somebody_elses_distribution():
    names = tracked()
    if names is None:
        pytest.skip("no git checkout")
    foreign = re.compile(
        r"(pip install|pip wheel)[^\n`]*[ '\"]commlib(\[|['\"\s]|$)|\bcommlib-\d|\bcommlib-\*\.whl"
    )
    texts = [
        ROOT / n for n in names if n.endswith((".py", ".md", ".toml", ".cc", ".h", "Makefile", ".mk", "run"))
    ]
    texts.remove(Path(__file__))
    found = {(text.name, m[0]) for text in texts for m in foreign.finditer(text.read_text())}
    assert not found
