"""Low latency mode, which is still to come: names and arguments only."""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor

from commlib.compat.deep_ep.errors import not_yet

_INSTEAD = (
    "it is to come. Use normal mode meanwhile, which decodes as well: get_dispatch_layout, dispatch and "
    "combine (vLLM: deepep_high_throughput; SGLang: --deepep-mode normal)"
)
_MASKS = "it leaves out no ranks: a rank that is gone is an error (commlib.PeerTimeout) on all others"
_HEADER = 16  # bytes beside a row


class LowLatency:
    """The low latency methods of ``Buffer``. All but the size hint raise NotImplementedError."""

    @staticmethod
    def get_low_latency_rdma_size_hint(
        num_max_dispatch_tokens_per_rank: int, hidden: int, num_ranks: int, num_experts: int
    ) -> int:
        """Bytes of two buffers of all ranks' bfloat16 rows for each local expert. commlib sizes itself."""
        rows = num_max_dispatch_tokens_per_rank * num_experts
        return 2 * rows * (2 * hidden + _HEADER)

    def clean_low_latency_buffer(
        self, num_max_dispatch_tokens_per_rank: int, hidden: int, num_experts: int
    ) -> NoReturn:
        not_yet("low latency mode (clean_low_latency_buffer)", _INSTEAD)

    def low_latency_dispatch(
        self,
        x: Tensor,
        topk_idx: Tensor,
        num_max_dispatch_tokens_per_rank: int,
        num_experts: int,
        cumulative_local_expert_recv_stats: Tensor | None = None,
        dispatch_wait_recv_cost_stats: Tensor | None = None,
        use_fp8: bool = True,
        round_scale: bool = False,
        use_ue8m0: bool = False,
        async_finish: bool = False,
        return_recv_hook: bool = False,
    ) -> NoReturn:
        not_yet("low latency mode (low_latency_dispatch)", _INSTEAD)

    def low_latency_combine(
        self,
        x: Tensor,
        topk_idx: Tensor,
        topk_weights: Tensor,
        handle: tuple,
        use_logfmt: bool = False,
        zero_copy: bool = False,
        async_finish: bool = False,
        return_recv_hook: bool = False,
        out: Tensor | None = None,
        combine_wait_recv_cost_stats: Tensor | None = None,
    ) -> NoReturn:
        not_yet("low latency mode (low_latency_combine)", _INSTEAD)

    def get_next_low_latency_combine_buffer(self, handle: object) -> NoReturn:
        not_yet("low latency mode (get_next_low_latency_combine_buffer)", _INSTEAD)

    def low_latency_update_mask_buffer(self, rank_to_mask: int, mask: bool = False) -> NoReturn:
        not_yet("masks of ranks (low_latency_update_mask_buffer)", _MASKS)

    def low_latency_query_mask_buffer(self, mask_status: Tensor) -> NoReturn:
        not_yet("masks of ranks (low_latency_query_mask_buffer)", _MASKS)

    def low_latency_clean_mask_buffer(self) -> NoReturn:
        not_yet("masks of ranks (low_latency_clean_mask_buffer)", _MASKS)

    def get_local_buffer_tensor(
        self,
        dtype: torch.dtype,
        size: torch.Size | None = None,
        offset: int = 0,
        use_rdma_buffer: bool = False,
    ) -> NoReturn:
        not_yet(
            "raw buffer (get_local_buffer_tensor)",
            "commlib's memory is made when it is needed, and has a layout of its own",
        )
