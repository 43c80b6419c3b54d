"""Make commlib importable in this checkout, and say whether it can use a GPU.

    python tests/gpu/module.py [--wheels dist]

What is built already stays, if it was built from these sources. Else the modules are taken from a wheel that
was (`make wheel` on another machine), and if there is none, they are built here. Nothing is installed.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent.parent / "csrc"))
from digest import ROOT, digest

SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
MODULES = ("_core", "_cuda")
FILES = [
    f"{name}{suffix}" for name in MODULES for suffix in (SUFFIX, SUFFIX.removesuffix(".so") + ".sources")
]
SOURCES = [name for name in FILES if name.endswith(".sources")]


def is_there(package: Path) -> bool:
    """Whether both modules are there, for this interpreter, of these sources."""
    if not all((package / name).exists() for name in FILES):
        return False
    return all((package / name).read_text().strip() == digest() for name in SOURCES)


def take(wheels: Path, package: Path) -> bool:
    """Unpack both modules of a wheel that has them for this interpreter, of these sources."""
    for wheel in sorted(wheels.glob("commlib_ep-*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            members = [f"commlib/{name}" for name in FILES]
            if missing := sorted(set(members) - set(archive.namelist())):
                print(f"{wheel}: no {missing[0]}", flush=True)
                continue
            built = {archive.read(f"commlib/{name}").decode().strip() for name in SOURCES}
            if built != {digest()}:
                print(f"{wheel}: of other sources, {' '.join(built)}; here are {digest()}", flush=True)
                continue
            for name in FILES:
                unpack(archive, name, package)
        print(f"{wheel}: taken", flush=True)
        return True
    return False


def unpack(archive: zipfile.ZipFile, name: str, package: Path) -> None:
    """Beside the old file, then in its place: a process that has loaded the old one keeps it."""
    new = package / f"{name}.new"
    new.write_bytes(archive.read(f"commlib/{name}"))
    os.replace(new, package / name)


def build() -> None:
    print("building in place: a minute or two", flush=True)
    subprocess.run([sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"], cwd=ROOT, check=True)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--wheels", type=Path, default=ROOT / "dist")
    wheels = parser.parse_args().wheels
    if is_there(ROOT / "commlib"):
        print(f"built already, of {digest()}", flush=True)
    elif not take(wheels, ROOT / "commlib"):
        build()
    sys.path.insert(0, str(ROOT))
    import commlib
    from commlib import cuda

    print(f"{Path(commlib.__file__).parent}: {cuda.why_not() or 'ready'}", flush=True)
    return 1 if cuda.why_not() else 0


if __name__ == "__main__":
    sys.exit(main())
