"""The ``commlib`` command. test_model tests its calibration, test_nodes its view of nodes."""

import subprocess
import sys

import pytest

import commlib
from commlib import cli, cuda


@pytest.mark.parametrize(("why_not", "said"), [("", "ready"), ("no usable driver", "no usable driver")])
def test_version_says_what_this_build_can_use(monkeypatch, capsys, why_not, said):
    monkeypatch.setattr(cuda, "why_not", lambda: why_not)
    with pytest.raises(SystemExit) as ended:
        cli.main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"commlib {commlib.__version__}, CUDA backend: {said}\n"


def test_the_module_is_the_command():
    """Also where it is built in place instead of installed."""
    command = [sys.executable, "-m", "commlib.cli", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout.startswith(f"commlib {commlib.__version__}, CUDA backend: ")
