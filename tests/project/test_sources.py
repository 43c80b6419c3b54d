"""The structure of the sources: which folder includes which, how long files are, what tests are called."""

import itertools
import re
from difflib import SequenceMatcher
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted(p for p in (ROOT / "csrc").rglob("*") if p.suffix in (".h", ".cc", ".cu", ".cuh"))
ROW = re.compile(r"^\| `csrc/(\w+)/` \|.*\| ([^|]+) \|$", re.MULTILINE)
MOST_LINES = 500


def allowed() -> dict[str, set[str]]:
    """The folders that each folder includes, according to docs/architecture.md."""
    folders: dict[str, set[str]] = {}
    for folder, includes in ROW.findall((ROOT / "docs/architecture.md").read_text()):
        named = set(re.findall(r"`(\w+)`", includes))
        folders[folder] = set(folders) - named if "all above" in includes else named
    return folders


def included_folders(source: Path) -> set[str]:
    """The folders of our own that a file includes from, besides its own."""
    found = re.findall(r'^\s*#include "([^"]+)"', source.read_text(), re.MULTILINE)
    names = [name for name in found if not name.startswith("simt/")]  # the tests' simulated GPU
    assert all((ROOT / "csrc" / name).exists() for name in names), f"{source}: not from csrc/: {names}"
    return {name.partition("/")[0] for name in names} - {source.relative_to(ROOT / "csrc").parts[0]}


def test_every_folder_of_the_core_is_described() -> None:
    assert set(allowed()) == {p.relative_to(ROOT / "csrc").parts[0] for p in SOURCES}


def test_no_folder_includes_one_that_comes_after_it() -> None:
    """So there is no circle: each folder is described after all those it includes."""
    folders = allowed()
    order = list(folders)
    for folder, includes in folders.items():
        assert includes <= set(order[: order.index(folder)]), folder


@pytest.mark.parametrize("source", SOURCES, ids=lambda p: p.relative_to(ROOT / "csrc").as_posix())
def test_a_file_includes_what_its_folder_may(source: Path) -> None:
    folder = source.relative_to(ROOT / "csrc").parts[0]
    assert included_folders(source) <= allowed()[folder]


def test_files_of_tests_have_names_that_nobody_mixes_up() -> None:
    """No two of them are one letter apart, wherever they lie."""
    names = sorted(p.stem for p in (ROOT / "tests").rglob("test_*") if p.suffix in (".py", ".cc"))
    assert len(names) > 80
    for one, other in itertools.combinations(set(names), 2):
        apart = SequenceMatcher(None, one, other, autojunk=False).ratio()
        assert apart < 1 - 1.5 / max(len(one), len(other)), f"{one} and {other}"


def test_no_file_is_longer_than_a_reader_wants() -> None:
    files = [*SOURCES, *(p for d in ("commlib", "bench", "tests") for p in (ROOT / d).rglob("*.py"))]
    files += [p for p in (ROOT / "tests").rglob("*") if p.suffix in (".h", ".cc")]
    long = {
        p.relative_to(ROOT).as_posix(): n
        for p in files
        if (n := len(p.read_text().splitlines())) > MOST_LINES
    }
    assert not long
