"""Finds UCX, which carries rows between nodes."""

from __future__ import annotations

import hashlib
import importlib.util
import os
from pathlib import Path

from commlib import _core
from commlib.errors import CommError

ADVICE = (
    "Install UCX: the cluster's own, which knows its network (a module, HPC-X, or a package of the "
    "distribution; UCX_HOME says where its lib folder is, if it is not on the library path), or "
    "pip install 'commlib-ep[nodes]', which has TCP and shared memory. `commlib topo` tries it."
)


def message_keys(secret: str, rank: int, size: int) -> list[tuple[bytes, bytes]]:
    """For each rank, the key that messages to it show, and the one that messages from it must show.

    One key for each ordered pair of ranks, from a secret (in hexadecimal) that only the ranks of a
    communicator know: seeing some of the keys reveals none of the others.
    """

    def key(source: int, to: int) -> bytes:
        return hashlib.blake2b(f"{source} {to}".encode(), key=bytes.fromhex(secret), digest_size=16).digest()

    return [(key(rank, peer), key(peer, rank)) for peer in range(size)]


def candidates() -> list[str]:
    """Libraries to try, in order: UCX_HOME's, the system's, that of the libucx package."""
    homes = [os.environ.get("UCX_HOME")]
    found = [str(Path(home) / "lib" / "libucp.so.0") for home in homes if home] + ["libucp.so.0"]
    package = importlib.util.find_spec("libucx")
    if package is not None and package.origin is not None:
        found.append(str(Path(package.origin).parent / "lib" / "libucp.so.0"))
    return found


def load() -> str:
    """Load UCX, once for all, and return its version.

    Raises:
        CommError: no UCX works; the text says what was tried and what to do.
    """
    try:
        return _core.load_ucx(candidates())
    except RuntimeError as error:
        raise CommError(
            f"ranks lie on several nodes, and rows go between nodes through UCX, but {error}\n{ADVICE}"
        ) from None
