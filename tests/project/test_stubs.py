"""The stubs of the compiled modules, which type checkers and editors read: each is what its module gives."""

from pathlib import Path

import pytest

pytest.importorskip("pybind11_stubgen")
pytest.importorskip("ruff")

ROOT = Path(__file__).parents[2]


@pytest.fixture
def stubs(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "csrc/bindings"))
    import stubs

    return stubs


@pytest.mark.parametrize("module", ["_core", "_cuda"])
def test_a_stub_is_what_its_module_gives(stubs, module):
    if not stubs.is_built(module):
        pytest.skip(f"{module} is not built here")
    assert (ROOT / f"commlib/{module}.pyi").read_text() == stubs.stub_of(module)
