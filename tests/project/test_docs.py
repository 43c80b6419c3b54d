"""What docs/ says of the code. test_programs runs README's example."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from pages import follow

ROOT = Path(__file__).parents[2]
SOURCES = [
    *(ROOT / "commlib").rglob("*.py"),
    *(path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".cc", ".h", ".cu", ".cuh", ".py")),
    ROOT / "setup.py",
]
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


@pytest.mark.parametrize("page", ["overlap.md"])
def test_a_pages_snippets_run(page, tmp_path):
    snippets = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / page).read_text(), re.DOTALL)
    assert snippets
    for snippet in snippets:
        done = subprocess.run(
            [sys.executable, "-c", snippet], cwd=tmp_path, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr


def test_the_readmes_ways_to_start_a_program_run_as_they_stand(tmp_path):
    blocks = (ROOT / "README.md").read_text().split("```")[1::2]
    program = next(block for block in blocks if block.startswith("python\n"))
    commands = next(block for block in blocks if "torchrun" in block)
    assert commands.count("program.py") == 4
    (tmp_path / "program.py").write_text(program.removeprefix("python\n"))
    (tmp_path / ".venv").symlink_to(Path(sys.executable).parent.parent)
    # One line is for root and one for others: with these, Open MPI runs both as root.
    names = ("OMPI_ALLOW_RUN_AS_ROOT", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "OMP_NUM_THREADS")
    env = os.environ | dict.fromkeys(names, "1")
    shell = ["bash", "-ec", commands]
    done = subprocess.run(shell, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("torch.Size([100, 1024])") == 4 + 4 + 4 + 1


def numbers(printed, name="loss"):
    """What a program has printed as ``name 1.25``, line by line."""
    return [float(value) for value in re.findall(rf"^{name} ([\d.]+)", printed, re.MULTILINE)]


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


@pytest.mark.parametrize(
    "page", ["README.md", *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
)
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
