"""Whether a wheel has both modules, and runs wherever it may be taken: on any Linux since 2021.

    python tests/wheel_report.py build/wheel/*.whl

Exits with 1 if a module is missing, or asks for a newer C or C++ library than OLDEST names.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

MODULES = ("_core", "_cuda")
OLDEST = {"GLIBC": (2, 34), "GLIBCXX": (3, 4, 29)}  # of RHEL 9; Ubuntu 22.04 and Debian 12 have newer ones
ASKS = re.compile(r"\((GLIBC|GLIBCXX)_([\d.]+)\)\s+(\S+)")

Version = tuple[int, ...]


def needs(symbols: str) -> dict[str, tuple[Version, str]]:
    """By library, the newest version that a table of dynamic symbols asks for, and a symbol that does."""
    found: dict[str, tuple[Version, str]] = {}
    for library, version, symbol in ASKS.findall(symbols):
        parts = tuple(map(int, version.split(".")))
        found[library] = max(found.get(library, ((), "")), (parts, symbol))
    return found


def faults_of(module: str, symbols: str) -> list[str]:
    return [
        f"{module} needs {library} {'.'.join(map(str, version))} for {symbol}"
        for library, (version, symbol) in needs(symbols).items()
        if version > OLDEST[library]
    ]


def symbols_of(module: Path) -> str:
    command = ["objdump", "--dynamic-syms", str(module)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def faults(wheel: Path) -> list[str]:
    """What is wrong with a wheel."""
    found = []
    with tempfile.TemporaryDirectory() as directory, zipfile.ZipFile(wheel) as archive:
        for name in MODULES:
            members = [m for m in archive.namelist() if re.fullmatch(rf"commlib/{name}\..*\.so", m)]
            if not members:
                found.append(f"{name} is not in it: was there an nvcc (PATH, CUDA_HOME)?")
            for member in members:
                found += faults_of(name, symbols_of(Path(archive.extract(member, directory))))
    return found


def main() -> int:
    wrong = 0
    for wheel in map(Path, sys.argv[1:]):
        found = faults(wheel)
        print(f"{wheel.name}, {wheel.stat().st_size / 1e6:.1f} MB: {'; '.join(found) or 'ok'}")
        wrong += bool(found)
    return 1 if wrong or not sys.argv[1:] else 0


if __name__ == "__main__":
    sys.exit(main())
