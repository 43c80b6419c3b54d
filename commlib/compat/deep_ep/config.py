"""Config: how DeepEP's kernels are tuned. commlib tunes itself, so only the checks and the hints remain."""

from __future__ import annotations

from commlib.compat.deep_ep.errors import require

_NODE = 8  # ranks of one node, to DeepEP
_ALIGNMENT = 128  # bytes, of a buffer
_BYTES_BESIDE_A_ROW = 32 * (8 + 4) + 16  # of the largest top-k: ids and weights; source


class Config:
    """Accepted wherever DeepEP takes one, checked as DeepEP does, and ignored by dispatch and combine.

    Args:
        num_sms: SMs of a kernel.
        num_max_nvl_chunked_send_tokens, num_max_nvl_chunked_recv_tokens: of a queue in a node; send < recv.
        num_max_rdma_chunked_send_tokens, num_max_rdma_chunked_recv_tokens: of a queue between nodes. recv is
            rounded up to a multiple of send; send <= recv / 2.

    Raises:
        Refused: numbers that DeepEP asserts against.
    """

    def __init__(
        self,
        num_sms: int = 20,
        num_max_nvl_chunked_send_tokens: int = 6,
        num_max_nvl_chunked_recv_tokens: int = 256,
        num_max_rdma_chunked_send_tokens: int = 6,
        num_max_rdma_chunked_recv_tokens: int = 256,
    ) -> None:
        nvl = (num_max_nvl_chunked_send_tokens, num_max_nvl_chunked_recv_tokens)
        send, recv = (num_max_rdma_chunked_send_tokens, num_max_rdma_chunked_recv_tokens)
        require(num_sms >= 0, f"num_sms must not be negative, got {num_sms}")
        require(
            0 < nvl[0] < nvl[1], f"nvl tokens: 0 < send < recv is needed, got send {nvl[0]}, recv {nvl[1]}"
        )
        require(send > 0 and recv > 0, f"rdma tokens must be positive, got send {send}, recv {recv}")
        recv = -(-recv // send) * send
        require(2 * send <= recv, f"rdma tokens: send <= recv / 2 is needed, got send {send}, recv {recv}")
        self._num_sms, self._nvl, self._rdma = num_sms, nvl, (send, recv)

    def get_nvl_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        """Bytes: the queues' rows from all ranks, with what travels beside them. commlib sizes itself."""
        return _hint(hidden_bytes, num_ranks, num_ranks, self._nvl[1])

    def get_rdma_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        """The same between nodes; 0 up to 8 ranks."""
        nodes = num_ranks // _NODE if num_ranks > _NODE else 0
        return _hint(hidden_bytes, num_ranks, nodes, self._rdma[1])


def _hint(hidden_bytes: int, num_ranks: int, senders: int, tokens: int) -> int:
    require(hidden_bytes > 0, f"hidden_bytes must be positive, got {hidden_bytes}")
    require(
        0 < num_ranks < _NODE or (num_ranks > 0 and num_ranks % _NODE == 0),
        f"num_ranks must be less than {_NODE} or a multiple of it, got {num_ranks}",
    )
    size = senders * tokens * (hidden_bytes + _BYTES_BESIDE_A_ROW)
    return -(-size // _ALIGNMENT) * _ALIGNMENT
