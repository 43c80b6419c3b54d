"""docs/deepep.md: its programs run, and it speaks of every argument."""

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
from pages import follow

import commlib.compat.deep_ep as deep_ep

PAGE = (Path(__file__).parents[2] / "docs/deepep.md").read_text()
WAYS = ("same", "ignored", "refused", "to come")
TABLES = dict(re.findall(r"^### `([\w.]+)`\n\n((?:\|.*\n)+)", PAGE, re.MULTILINE))


def rows_of(name):
    """Arguments and their descriptions, in order."""
    for line in TABLES.get(name, "").splitlines()[2:]:
        arguments, way, _ = (cell.strip() for cell in line.strip("|").split("|"))
        assert way in WAYS, line
        yield from re.findall(r"`(\w+)`", arguments)


def public():
    """Names of public callables, with the arguments that each takes."""
    for name in deep_ep.__all__:
        thing = getattr(deep_ep, name)
        if inspect.isclass(thing) and not issubclass(thing, Exception):
            yield name, thing
            for method, member in inspect.getmembers(thing, callable):
                if not method.startswith("_"):
                    yield f"{name}.{method}", member
        elif inspect.isfunction(thing):
            yield name, thing


def arguments_of(call):
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    given = inspect.signature(call).parameters.values()
    return [p.name for p in given if p.kind not in kinds and p.name != "self" and not p.name.startswith("_")]


@pytest.mark.parametrize("name", [name for name, _ in public()])
def test_the_page_speaks_of_every_argument(name):
    arguments = arguments_of(dict(public())[name])
    assert f"`{name}`" in PAGE
    assert sorted(rows_of(name)) == sorted(arguments)


def test_the_page_speaks_of_nothing_else():
    assert set(TABLES) <= {name for name, _ in public()}
    assert len(TABLES) > 20


def test_the_pages_programs_and_commands_run_as_they_stand(tmp_path):
    threads, processes = follow("deepep.md", tmp_path)
    assert len(list(tmp_path.glob("*.py"))) == 3
    assert threads.count("of 4: as it should be") == 4
    assert processes.count("of 2: as it should be") == 2


def test_either_way_of_the_page_makes_the_switch(tmp_path):
    ways = [way for way in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL) if way[0] != "#"]
    assert len(ways) == 2
    for way in ways:
        program = f"{way}\nimport sys\nassert 'commlib.compat.deep_ep' in sys.modules"
        done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, timeout=60)
        assert done.returncode == 0, done.stderr
