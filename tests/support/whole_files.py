"""Files that one process writes while others look for them, or while it may be killed."""

from pathlib import Path


def write_whole(path: Path, content: bytes) -> None:
    """The file is there with all of its content, or not at all, at whatever moment its writer is killed."""
    beside = path.with_name(f"writing.{path.name}")
    beside.write_bytes(content)
    beside.rename(path)
