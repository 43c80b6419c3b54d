"""What users install: the distribution's name, and what is in its source archive."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from pathlib import Path

import pytest

import commlib

ROOT = Path(__file__).parents[2]
BUILT = ("PKG-INFO", "setup.cfg")  # by setuptools, with a folder for egg-info
LEFT_OVER = (
    "commlib/_core.cpython-300-x86_64-linux-gnu.so",
    "commlib/_core.cpython-300-x86_64-linux-gnu.sources",
    "commlib/__pycache__/group.cpython-300.pyc",
    "tests/__pycache__/conftest.cpython-300.pyc",
    "tests/cpp/suite.o",
    "build/lib/commlib/startup/group.py",
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
    """What is in git, and what is in an sdist of it, made without nvcc among leftovers of builds."""
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
        return archive, names, {m.name.partition("/")[2] for m in tar.getmembers() if m.isfile()}


def test_an_sdist_has_the_distributions_name_and_the_modules_version(sdist):
    assert sdist[0].name == f"commlib_ep-{commlib.__version__}.tar.gz"


def test_an_sdist_holds_what_is_in_git_and_no_leftovers(sdist):
    _, names, packed = sdist
    made = {name for name in packed if name in BUILT or name.startswith("commlib_ep.egg-info/")}
    assert packed - made == set(names)


USE = """
import torch, commlib
ep = commlib.ExpertParallel(num_experts=4, hidden=16, topk=2, max_tokens=8)
x = torch.randn(3, 16, dtype=torch.bfloat16)
d = ep.dispatch(x, torch.tensor([[0, 1], [2, 3], [1, -1]]))
assert torch.equal(ep.combine(d.x, d.handle), x)
print(commlib.__file__)
"""


def test_the_sdists_wheel_is_installed_and_used_without_nvcc_or_a_compiler(sdist, tmp_path):
    """Dependencies are those of this environment, which this test does not check."""
    pip = ["-m", "pip", "--quiet", "--disable-pip-version-check"]
    making = ["wheel", "--no-build-isolation", "--no-deps", "--wheel-dir", str(tmp_path), str(sdist[0])]
    built = subprocess.run(
        [sys.executable, *pip, *making],
        env={**os.environ, "COMMLIB_CUDA_ARCHS": "none"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert built.returncode == 0, built.stdout + built.stderr
    (wheel,) = tmp_path.glob("commlib_ep-*.whl")
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True, timeout=120)
    python = tmp_path / "venv/bin/python"
    (packages,) = (tmp_path / "venv/lib").glob("python*/site-packages")
    (packages / "these.pth").write_text(sysconfig.get_paths()["purelib"])
    for command in ([*pip, "install", "--no-deps", "--ignore-installed", str(wheel)], ["-c", USE]):
        done = subprocess.run(
            [str(python), *command],
            cwd=tmp_path,
            env={"PATH": str(tmp_path / "venv/bin"), "HOME": str(tmp_path)},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith(str(packages))


def test_no_text_names_another_projects_distribution():
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
