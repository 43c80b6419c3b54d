"""Open files from rank to rank: device memory of cuMemCreate is one, and a peer maps what it is sent."""

from __future__ import annotations

import os
import secrets
import socket
import threading
from collections.abc import Sequence

from commlib.group import Group

Address = tuple[int, int, int, bytes, bytes]  # as _core.Communicator.address()

_TIMEOUT = 60.0


def exchange_fds(group: Group, addresses: list[Address], near: Sequence[int]) -> list[Address]:
    """The same addresses, with file descriptors of this process in place of their owners' own.

    Ranks of this very process, of other nodes than ``near``, and addresses without a file descriptor (-1)
    stay as they are. Every rank calls it. Descriptors travel over sockets of this host (SCM_RIGHTS).

    Raises:
        OSError: a peer could not be reached, or did not send within 60 s.
    """
    own_fd = addresses[group.rank][1]
    others = [r for r in near if addresses[r][0] != os.getpid() and addresses[r][1] >= 0]
    received = dict.fromkeys(others, -1)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as mine:
        mine.settimeout(_TIMEOUT)
        mine.bind(b"\0commlib-" + secrets.token_hex(16).encode())
        names = group.allgather(mine.getsockname())
        # A thread sends meanwhile: queues are short, and all ranks send to all.
        errors: list[OSError] = []
        sender = threading.Thread(
            target=_send, args=(group.rank, own_fd, [names[r] for r in others], errors), daemon=True
        )
        sender.start()
        try:
            for _ in others:
                said, fds, _, _ = socket.recv_fds(mine, 16, 1)
                received[int(said)] = fds[0]
        except OSError as error:
            errors.append(error)
        sender.join()
        group.barrier()  # nobody closes its socket before all have sent
    if errors:
        raise errors[0]
    return [
        (pid, received.get(rank, fd), workers, handle, net)
        for rank, (pid, fd, workers, handle, net) in enumerate(addresses)
    ]


def _send(rank: int, fd: int, names: list[bytes], errors: list[OSError]) -> None:
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as out:
            out.settimeout(_TIMEOUT)
            for name in names:
                socket.send_fds(out, [str(rank).encode()], [fd], 0, name)
    except OSError as error:
        errors.append(error)
