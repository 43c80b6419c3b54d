"""Benchmarks leave the checkout clean: they write to no file in git, which README and docs/ cite."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SMALL = ["--tokens", "8", "--hidden", "64", "--experts", "4", "--topk", "2", "--iters", "1"]
OVERLAP = [*SMALL, "--ffn-hidden", "32", "--matmul", "16", "--chunks", "2"]
LINK = [*SMALL, "--link-gbps", "0.01", "--sweep", "1", "--num-sms", "1"]

pytestmark = pytest.mark.skipif(
    not (ROOT / ".git").exists() or not shutil.which("git"), reason="no git checkout"
)


def git(*arguments, cwd=ROOT):
    command = ["git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A separate checkout, with this one's programs."""
    tree = tmp_path_factory.mktemp("checkout")
    for name in filter(None, git("ls-files", "-z").split("\0")):
        if (ROOT / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tree / name)
    git("init", "-q", cwd=tree)
    git("add", "-A", cwd=tree)
    git("commit", "-qm", "as it is", cwd=tree)
    return tree


@pytest.mark.parametrize(
    ("program", "ranks", "options", "written"),
    [
        ("bench/dispatch_combine.py", 1, [*SMALL, "--warmup", "1"], "dispatch_combine-cpu-r1.json"),
        ("bench/dispatch_combine.py", 2, LINK, "limited_link-cpu-r2.json"),
        ("bench/overlap.py", 1, OVERLAP, "overlap-cpu-r1.png"),
        ("bench/moe_layer.py", 1, [*SMALL, "--ffn-hidden", "32"], "moe_layer-cpu-r1.json"),
        ("tests/gpu/stages.py", 0, ["--stage", "1", "--budget", "0"], "*-stage1.json"),
    ],
)
def test_a_benchmark_leaves_the_checkout_as_it_was(launch, checkout, program, ranks, options, written):
    program = str(checkout / program)
    if ranks:
        done = launch(program, ranks, arguments=options, PYTHONPATH=str(ROOT))
    else:
        done = subprocess.run(
            [sys.executable, program, *options], capture_output=True, text=True, timeout=120
        )
    assert list((checkout / "bench/results/local").glob(written)), done.stdout + done.stderr
    assert git("status", "--porcelain", cwd=checkout) == ""


def test_where_benchmarks_write_is_one_place_that_git_ignores():
    """Also those not run above, because they need a GPU or root."""
    sources = {path.name: path.read_text() for path in sorted((ROOT / "bench").rglob("*.py"))}
    places = {name: re.findall(r'"[^" ]*results[^" ]*"', text) for name, text in sources.items()}
    assert {name: found for name, found in places.items() if found} == {"samples.py": ['"results"']}
    assert git("check-ignore", "bench/results/local/nodes-cpu.json")


def test_samples_that_texts_cite_are_there():
    texts = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    cited = {
        (text.parent / link).resolve().relative_to(ROOT).as_posix()
        for text in texts
        for link in re.findall(r"\]\(([^)#]*bench/results/[^)]*)\)", text.read_text().replace("\n", ""))
    }
    assert len(cited) > 5 and cited <= set(git("ls-files").splitlines())
