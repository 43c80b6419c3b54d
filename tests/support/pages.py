"""Programs and commands of pages in docs/."""

import os
import re
import subprocess
import sys
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"


def follow(page, place):
    """Write a page's programs, named in their first lines, and run its commands; what each has printed."""
    text = (DOCS / page).read_text()
    for program in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        name = program.splitlines()[0].removeprefix("# ")
        (place / name).write_text(program)
    env = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    said = []
    for command in "".join(re.findall(r"```sh\n(.*?)```", text, re.DOTALL)).splitlines():
        done = subprocess.run(
            command, shell=True, cwd=place, env=env, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stdout + done.stderr
        said.append(done.stdout)
    return said
