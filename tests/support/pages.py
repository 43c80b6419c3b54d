"""Programs and commands of pages in docs/."""

import os
import re
import subprocess
import sys
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"
# With these, Open MPI runs as root, as in a container, without being told on the command line.
AS_ROOT = dict.fromkeys(("OMPI_ALLOW_RUN_AS_ROOT", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM"), "1")


def blocks(page, language):
    """What stands in a page between fences of this language."""
    text = (DOCS / page).read_text()
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def program_of(snippet):
    return re.match(r"# (\w+\.py)\n", snippet)


def follow(page, place):
    """Write a page's programs, named in their first lines, and run its commands; what each has printed."""
    for program in blocks(page, "python"):
        if name := program_of(program):
            (place / name[1]).write_text(program)
    env = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    env |= AS_ROOT
    said = []
    for command in "".join(blocks(page, "sh")).splitlines():
        done = subprocess.run(
            command, shell=True, cwd=place, env=env, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stdout + done.stderr
        said.append(done.stdout)
    return said
