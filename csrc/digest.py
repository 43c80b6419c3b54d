"""A name for the modules' sources, which tells whether a built module belongs to a checkout."""

import hashlib
from pathlib import Path

ROOT = Path(__file__).parent.parent
SUFFIXES = (".cc", ".cu", ".cuh", ".h")


def digest() -> str:
    """Of all compiled sources, and of the scripts that compile them."""
    found = hashlib.sha256()
    sources = sorted(
        p.relative_to(ROOT).as_posix() for p in (ROOT / "csrc").rglob("*") if p.suffix in SUFFIXES
    )
    for name in ["setup.py", "csrc/nvcc.py", *sources]:
        content = (ROOT / name).read_bytes()
        found.update(f"{name} {len(content)}\n".encode() + content)
    return found.hexdigest()[:16]
