"""The structure of the Python package: modules import each other in layers, without a circle."""

import ast
import graphlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMPILED = {"_core", "_cuda"}
# What runs Python code when something has gone: a Ctrl-C that comes in it is lost. See commlib/weak.py.
LAST_CALL = re.compile(
    r"weakref\.(?:finalize|Weak\w+|ref\([^()]+,)|from weakref import|def __del__|gc\.callbacks"
)
# Questions about a device. A type in a signature asks none.
QUESTION = re.compile(r'torch\.cuda\.(?!Stream\b)|\.is_cuda|device\.type (?:[=!]=|in)|== "c(?:uda|pu)"')


def names_of(path: Path) -> tuple[str, list[str]]:
    """A module's name, and the package that its relative imports begin in."""
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    if parts[-1] == "__init__":
        parts.pop()
        return ".".join(parts), parts
    return ".".join(parts), parts[:-1]


MODULES = {names_of(path)[0]: path for path in (ROOT / "commlib").rglob("*.py")}


def imported(path: Path) -> set[str]:
    """Our modules that one imports: anywhere in it, for types alone as well."""
    name, package = names_of(path)
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                found |= {inner} if inner in MODULES else set() if alias.name in COMPILED else {base}
    return (found & set(MODULES)) - {name}


def test_no_module_imports_itself_by_way_of_others() -> None:
    graph = {name: imported(path) for name, path in MODULES.items()}
    assert {"commlib.ops.calling", "commlib.operations"} <= graph["commlib.ops"] | graph[
        "commlib.ops.calling"
    ]
    try:
        order = list(graphlib.TopologicalSorter(graph).static_order())
    except graphlib.CycleError as error:
        pytest.fail(" imports\n".join(reversed(error.args[1])))
    assert order.index("commlib.operations") < order.index("commlib.expert_parallel")


def test_only_devices_asks_which_device_it_is() -> None:
    """The interfaces of other software (compat, integrations), and tools, ask on its behalf."""
    elsewhere = ("devices", "compat", "integrations", "cli", "nn")
    asking = {
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in MODULES.values()
        if not set(path.relative_to(ROOT / "commlib").parts) & set(elsewhere)
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if QUESTION.search(line)
    }
    assert not asking


def test_nothing_written_in_python_runs_when_something_has_gone() -> None:
    used = {
        f"{path.relative_to(ROOT)}: {found[0]}"
        for path in MODULES.values()
        for found in LAST_CALL.finditer(path.read_text())
        if path.name != "weak.py"
    }
    assert not used
    assert LAST_CALL.search("team = weakref.ref(team, forget)") and not LAST_CALL.search("weakref.ref(a), b")
