"""What an integration needs of other packages, checked when it is imported."""

from __future__ import annotations

import re
from importlib import metadata


def require(package: str, first: str, before: str) -> None:
    """Refuse to go on without a version of ``package`` that the integration was tested with.

    Args:
        package: the distribution's name, as pip knows it.
        first, before: the tested range ``first <= version < before``, numbers with dots.

    Raises:
        ImportError: it is missing, or of another version. The text says which to install.
    """
    wanted = f'"{package}>={first},<{before}"'
    try:
        found = metadata.version(package)
    except metadata.PackageNotFoundError:
        raise ImportError(f"{package} is not installed: pip install {wanted}", name=package) from None
    if not _numbers(first) <= _numbers(found) < _numbers(before):
        raise ImportError(
            f"{package} {found} is installed, but commlib is tested with >={first},<{before} and knows no "
            f"other interfaces: pip install {wanted}",
            name=package,
        )


def _numbers(version: str) -> tuple[int, ...]:
    """The release's numbers: (0, 3, 0) of "0.3.0.dev1+cpu"."""
    return tuple(int(number) for number in re.findall(r"\d+", re.split(r"[^\d.]", version)[0]))
