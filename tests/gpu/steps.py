"""What `make gpu` does, step by step: the list, and nothing else.

In a command {python} is the interpreter, {make} make, {results} the results' directory and {name} the prefix
of this run's files. Paths are relative to the repository.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

TESTS = Path(__file__).parents[1]

# Ranks that share a GPU wait for each other on it: load no kernel meanwhile, and give each stream a queue.
IN_PROCESS = {"CUDA_MODULE_LOADING": "EAGER", "CUDA_DEVICE_MAX_CONNECTIONS": "32"}
# A sanitizer takes long to watch all of PyTorch's kernels being loaded. Its program's first run has one rank,
# which waits for no other, and loads all that the next run needs.
SANITIZED = {**IN_PROCESS, "CUDA_MODULE_LOADING": "LAZY"}

MODULE = "module"  # the step that makes commlib importable
LOADING = 15  # seconds: PyTorch's kernels, all of them, in each process
DEADLINE = "5"  # seconds that a rank waits for another one: on one machine, long


@dataclass(frozen=True)
class Step:
    """One command with a limit of its own.

    Attributes:
        name: unique; STEPS chooses by it.
        stage: STAGE chooses by it.
        limit: seconds.
        environment: variables in addition to those of the runner.
        needs: a step that must have passed before this one is run.
    """

    name: str
    stage: int
    limit: float
    command: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=lambda: IN_PROCESS)
    needs: str | None = MODULE


def pytest(*arguments: str) -> tuple[str, ...]:
    """After three failures the GPU, or the idea, is beyond saving; -v tells which test a hang is in."""
    options = ("-v", "-m", "gpu", "--maxfail=3", "--durations=5", "--deadline", DEADLINE)
    return ("{python}", "-m", "pytest", *options, "-o", "faulthandler_timeout=15", *arguments)


def tests(name: str, limit: float, stage: int = 2) -> Step:
    """The tests of one file, in a process of their own, which a CUDA error does not outlive."""
    (path,) = TESTS.glob(f"*/test_{name}.py")
    command = pytest(path.relative_to(TESTS.parent).as_posix())
    return Step(f"test_{name}", stage, LOADING + limit, command)


def small(ranks: int) -> Step:
    program = ("tests/programs/gpu_small.py", "cuda", str(ranks), "--timeout", DEADLINE)
    return Step(f"ranks-{ranks}", 1, 60, ("{python}", *program))


def figures(name: str, stage: int, limit: float, program: str, *arguments: str) -> Step:
    """A benchmark, whose samples go to a file of the step's name."""
    where = ("--json", f"{{results}}/{{name}}-{name}.json")
    return Step(name, stage, limit, ("{python}", f"bench/{program}.py", *arguments, *where))


def cpp(target: str, *options: str) -> tuple[str, ...]:
    """The protocol's tests in C++ (tests/cpp/gpu): they need no module, and no PyTorch."""
    return ("{make}", "--no-print-directory", target, "GPU_PYTHON={python}", "PYTHON={python}", *options)


def sanitize_cpp(tool: str) -> Step:
    return Step(f"{tool}-cpp", 4, 240, cpp("gpu-cpp-sanitize", f"TOOL={tool}"), SANITIZED, needs=None)


def sanitize_small(tool: str) -> Step:
    options = ("--tool", tool, "--error-exitcode", "1")
    program = ("{python}", "tests/programs/gpu_small.py")
    return Step(f"{tool}-small", 4, 240, ("compute-sanitizer", *options, *program), SANITIZED)


# bf16 on 1, 2 and 4 ranks.
EXACT = ("tests/gpu/test_cuda.py", "-k", "bit_for_bit and dtype0 and not 8-dtype0")
DECODING = ("--ranks", "1", "4", "8", "--tokens", "128", "--num-sms", "4", "8")
LARGE = ("--ranks", "4", "--num-sms", "4", "8", "--iters", "5")
ON_GPU = ("--device", "cuda", "--ranks", "4")

STEPS = (
    # 1. Does it run?
    Step("versions", 1, 60, ("{python}", "tests/gpu/versions.py"), needs=None),
    Step(MODULE, 1, 300, ("{python}", "tests/gpu/module.py"), needs=None),
    Step("probe", 1, 120, ("{python}", "tests/programs/gpu_probe.py", "--limit", "100"), needs=None),
    Step("cpp", 1, 240, cpp("gpu-cpp"), needs=None),
    *(small(ranks) for ranks in (1, 2, 4)),
    Step("exact", 1, 90, pytest(*EXACT)),
    figures("quick", 1, 60, "gpu", "--quick"),
    figures("first", 1, 120, "gpu", *LARGE),
    # 2. The tests.
    tests("cuda", 90),
    tests("graphs", 60),
    tests("dispatch", 60),
    tests("combine", 60),
    tests("async", 30),
    tests("peer_faults", 40),
    tests("bad_input", 40),
    tests("autograd", 45),
    tests("split", 25),
    tests("timeline", 25),
    tests("waves", 35),
    tests("throttle", 20),
    tests("memory", 25),
    tests("sharing", 40),
    tests("teams", 20),
    tests("formats", 25),
    tests("quantize", 40),
    tests("grouping", 60),
    tests("bounded", 60),
    tests("products", 20),
    tests("weighing", 30),
    tests("partition", 20),
    tests("overlap", 40),
    tests("autocast", 75),
    tests("gradients", 45),
    *(tests(name, 40) for name in ("growth", "routers", "own_experts")),
    *(
        tests(f"deep_ep{part}", 60)
        for part in ("", "_elastic", "_events", "_callers", "_programs", "_low_latency")
    ),
    tests("transformers", 60),
    tests("moe_layer", 50),  # whatever it does to the GPU, the others are done
    # 3. Figures.
    figures("gpu-r4", 3, 150, "gpu", "--ranks", "4", "--budget", "130"),
    figures("gpu-r8", 3, 150, "gpu", "--ranks", "8", "--budget", "130"),
    figures("gpu-t128", 3, 90, "gpu", *DECODING, "--budget", "70"),
    figures("overlap", 3, 150, "overlap", *ON_GPU),
    figures("link", 3, 120, "dispatch_combine", "--preset", "h800", *ON_GPU),
    # 4. Slow steps: the compiler, separate programs, sanitizers.
    tests("compile", 120, stage=4),
    tests("nodes", 60, stage=4),
    tests("gpu_benchmark", 150, stage=4),
    tests("gpu_comparison", 120, stage=4),
    tests("overlap_benchmark", 150, stage=4),
    *(sanitize_cpp(tool) for tool in ("memcheck", "racecheck")),
    *(sanitize_small(tool) for tool in ("memcheck", "racecheck")),
)
