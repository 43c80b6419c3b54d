"""What commlib raises besides ValueError and TypeError for wrong arguments."""

from __future__ import annotations


class CommError(RuntimeError):
    """Base of commlib's errors; by itself: the communicator is broken or closed.

    Attributes:
        peers: the ranks to blame, where that is known.
    """

    def __init__(self, *args: object, peers: list[int] | tuple[int, ...] = ()) -> None:
        super().__init__(*args)
        self.peers = list(peers)


class PeerTimeout(CommError):
    """A rank did not do its part in time, or its process is gone.

    Attributes:
        rank: the rank that waited.
        peers: the ranks to blame, all of them. A rank that is waited for and itself waits is not among them.
        op: "dispatch", "dispatch with a handle" or "combine".
        phase: what it waited for: "counts", "arrival" (of rows), "slot reuse", "call" or "network".
        epoch: number of the operation on this communicator, from 1.
    """

    def __init__(self, text: str, rank: int, peers: list[int], op: str, phase: str, epoch: int) -> None:
        super().__init__(text, peers=peers)
        self.rank = rank
        self.op = op
        self.phase = phase
        self.epoch = epoch

    def __reduce__(self) -> tuple[type, tuple]:
        return type(self), (str(self), self.rank, self.peers, self.op, self.phase, self.epoch)


class CallMismatch(CommError):
    """Ranks called different operations at the same place in their order."""


class ConfigMismatch(CommError):
    """Ranks built their ExpertParallel with different settings."""


class CapacityExceeded(CommError):
    """A rank would receive more rows than ``capacity``. Raised on all ranks before any row is sent.

    Attributes:
        receiver: the rank that would receive most, the same on all ranks.
        rows: how many.
    """

    def __init__(self, text: str, receiver: int, rows: int) -> None:
        super().__init__(text)
        self.receiver = receiver
        self.rows = rows

    def __reduce__(self) -> tuple[type, tuple]:
        return type(self), (str(self), self.receiver, self.rows)


class HandleError(CommError):
    """A handle, slot or lent buffer used in a way that its state does not allow."""


def ranks_to_blame(error: BaseException) -> list[int]:
    """The ranks to blame for an error, where that is known."""
    return error.peers if isinstance(error, CommError) else []
