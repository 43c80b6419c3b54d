"""What DeepEP takes as a group, and how it sees the ranks: as one domain."""

from __future__ import annotations

from typing import Any

from commlib.startup.group import Group, in_process_group, resolve_group


def group_of(group: Any, comm: Any = None) -> tuple[Any, Group]:
    """The group that a caller means, and commlib's of the same ranks.

    Args:
        group: a ProcessGroup of any backend; also a 1-D DeviceMesh or a commlib.Group. None: ``comm``.
        comm: an mpi4py communicator. Both None: the ranks of :func:`commlib.run_ranks`, inside it.

    Raises:
        ValueError: there is no group.
        TypeError: it is something else.
    """
    given = comm if group is None else group
    given = in_process_group() if given is None else given
    if given is None:
        raise ValueError(
            "Either 'group' or 'comm' must be provided (inside commlib.run_ranks neither is needed)"
        )
    return given, resolve_group(given)


def get_physical_domain_size(group: Any = None) -> tuple[int, int]:
    """(RDMA ranks, NVLink ranks) of a group: 1 and all, as commlib itself finds what connects ranks."""
    return 1, group_of(group)[1].size


def get_logical_domain_size(group: Any = None, allow_hybrid_mode: bool = True) -> tuple[int, int]:
    """(scale-out ranks, scale-up ranks) of a group: 1 and all."""
    return 1, group_of(group)[1].size
