"""The programs that users run first: they start, check themselves, and leave what they say they leave."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(("launcher", "ranks"), [("mpirun", 4), ("torchrun", 2)])
def test_sharded_training_has_the_losses_of_unsharded_training(launch, tmp_path, launcher, ranks):
    arguments = [
        "--check",
        "--steps",
        "6",
        "--json",
        str(tmp_path / "l.json"),
        "--plot",
        str(tmp_path / "l.png"),
    ]
    done = launch(str(ROOT / "examples/train_moe_lm.py"), ranks, launcher, 240, arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "l.png").read_bytes().startswith(b"\x89PNG")
    losses = json.loads((tmp_path / "l.json").read_text())
    sharded, unsharded = (losses[name] for name in ("loss", "unsharded_loss"))
    assert len(sharded) == len(unsharded) == 6
    assert max(abs(a - b) for a, b in zip(sharded, unsharded, strict=True)) < 1e-4


def test_decoding_with_sharded_experts_writes_the_tokens_of_one_rank(launch):
    done = launch(str(ROOT / "examples/decode.py"), 3, "mpirun", 120, ["--check", "--steps", "12"])
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("has written the tokens of one rank alone") == 3
    assert "ms a step of 2 layers" in done.stdout


def test_the_benchmark_checks_itself_and_writes_every_sample(launch, tmp_path):
    out = tmp_path / "bench.json"
    arguments = [
        "--tokens",
        "16",
        "--hidden",
        "256",
        "--experts",
        "8",
        "--topk",
        "2",
        "--iters",
        "2",
        "--warmup",
        "1",
    ]
    done = launch(str(ROOT / "bench/dispatch_combine.py"), 2, "mpirun", 240, [*arguments, "--json", str(out)])
    assert done.returncode == 0, done.stdout + done.stderr
    systems = ("commlib zero-copy", "commlib owned", "gloo, plain", "gloo, tuned", "MPI", "MPI windows")
    for text in (*systems, "bare limit", "rank path", "layer path"):
        assert text in done.stdout
    assert json.loads(out.read_text())


def test_the_example_in_the_readme_runs_as_it_stands(launch, tmp_path):
    code = (ROOT / "README.md").read_text().split("```python\n")[1].split("```")[0]
    program = tmp_path / "example.py"
    program.write_text(code)
    done = launch(str(program), 3)
    assert done.returncode == 0, done.stdout + done.stderr
    said = re.findall(r"\d of \d torch.Size\(\[100, 1024\]\)", done.stdout)  # lines may run together
    assert sorted(said) == [f"{r} of 3 torch.Size([100, 1024])" for r in range(3)]
