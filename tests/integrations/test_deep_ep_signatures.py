"""commlib.compat.deep_ep has DeepEP's names, and its arguments in DeepEP's order with DeepEP's defaults."""

import inspect
from operator import attrgetter

import pytest
import torch

import commlib.compat.deep_ep as deep_ep

EVENTS = "previous_event=None, async_finish=False, allocate_on_comm_stream=False"
LAYOUT = (
    "num_tokens_per_rank=None, num_tokens_per_rdma_rank=None, is_token_in_rank=None, "
    "num_tokens_per_expert=None"
)
TOP_K = "topk_idx=None, topk_weights=None, expert_alignment=1"
ELASTIC_EVENTS = (
    "previous_event=None, previous_event_before_epilogue=None, async_with_compute_stream=False, "
    "allocate_on_comm_stream=False"
)

# As the reference of version 2.1.0 has them, without self.
SIGNATURES = {
    "Buffer": (
        "group, num_nvl_bytes=0, num_rdma_bytes=0, low_latency_mode=False, num_qps_per_rank=24, "
        "allow_nvlink_for_low_latency_mode=True, allow_mnnvl=False, explicitly_destroy=False, "
        "enable_shrink=False, comm=None"
    ),
    "Buffer.destroy": "",
    "Buffer.is_sm90_compiled": "",
    "Buffer.set_num_sms": "new_num_sms",
    "Buffer.capture": "",
    "Buffer.get_low_latency_rdma_size_hint": (
        "num_max_dispatch_tokens_per_rank, hidden, num_ranks, num_experts"
    ),
    "Buffer.get_comm_stream": "",
    "Buffer.get_local_buffer_tensor": "dtype, size=None, offset=0, use_rdma_buffer=False",
    "Buffer.get_dispatch_config": "num_ranks",
    "Buffer.get_combine_config": "num_ranks",
    "Buffer.get_dispatch_layout": f"topk_idx, num_experts, {EVENTS}",
    "Buffer.dispatch": f"x, handle=None, {LAYOUT}, {TOP_K}, num_worst_tokens=0, config=None, {EVENTS}",
    "Buffer.combine": f"x, handle, topk_weights=None, bias=None, config=None, {EVENTS}",
    "Buffer.internode_dispatch": f"x, handle=None, {LAYOUT}, {TOP_K}, config=None, {EVENTS}",
    "Buffer.internode_combine": f"x, handle, topk_weights=None, bias=None, config=None, {EVENTS}",
    "Buffer.clean_low_latency_buffer": "num_max_dispatch_tokens_per_rank, hidden, num_experts",
    "Buffer.low_latency_dispatch": (
        "x, topk_idx, num_max_dispatch_tokens_per_rank, num_experts, "
        "cumulative_local_expert_recv_stats=None, "
        "dispatch_wait_recv_cost_stats=None, use_fp8=True, round_scale=False, use_ue8m0=False, "
        "async_finish=False, return_recv_hook=False"
    ),
    "Buffer.low_latency_combine": (
        "x, topk_idx, topk_weights, handle, use_logfmt=False, zero_copy=False, async_finish=False, "
        "return_recv_hook=False, out=None, combine_wait_recv_cost_stats=None"
    ),
    "Buffer.get_next_low_latency_combine_buffer": "handle",
    "Buffer.low_latency_update_mask_buffer": "rank_to_mask, mask=False",
    "Buffer.low_latency_query_mask_buffer": "mask_status",
    "Buffer.low_latency_clean_mask_buffer": "",
    "Config": (
        "num_sms=20, num_max_nvl_chunked_send_tokens=6, num_max_nvl_chunked_recv_tokens=256, "
        "num_max_rdma_chunked_send_tokens=6, num_max_rdma_chunked_recv_tokens=256"
    ),
    "Config.get_nvl_buffer_size_hint": "hidden_bytes, num_ranks",
    "Config.get_rdma_buffer_size_hint": "hidden_bytes, num_ranks",
    "EventHandle": "",
    "EventHandle.current_stream_wait": "",
    "EventOverlap": "event=None, extra_tensors=None",
    "EventOverlap.current_stream_wait": "release_handle=False",
    "EventOverlap.register_hook_after_wait": "hook_after_wait",
    "EventOverlap.__call__": "release_handle=False",
    "ElasticBuffer": (
        "group, num_bytes=None, num_cpu_bytes=0, num_max_tokens_per_rank=0, hidden=0, num_topk=0, "
        "use_fp8_dispatch=False, deterministic=False, allow_hybrid_mode=True, allow_multiple_reduction=True, "
        "prefer_overlap_with_compute=True, sl_idx=3, num_allocated_qps=0, num_cpu_timeout_secs=300, "
        "num_gpu_timeout_secs=100, explicitly_destroy=False"
    ),
    "ElasticBuffer.get_buffer_size_hint": (
        "group, num_max_tokens_per_rank, hidden, num_topk=0, use_fp8_dispatch=False, allow_hybrid_mode=True, "
        "allow_multiple_reduction=True"
    ),
    "ElasticBuffer.barrier": "use_comm_stream=True, with_cpu_sync=False, sequential=True",
    "ElasticBuffer.get_theoretical_num_sms": (
        "num_experts, num_topk, num_scaleout_topk=0, rdma_gbs=0, nvlink_gbs=0, sm_read_gbs=200, "
        "sm_write_gbs=50"
    ),
    "ElasticBuffer.get_theoretical_num_qps": "num_sms",
    "ElasticBuffer.dispatch": (
        "x, topk_idx=None, topk_weights=None, cumulative_local_expert_recv_stats=None, num_experts=None, "
        "num_max_tokens_per_rank=None, expert_alignment=None, num_sms=0, num_qps=0, "
        f"{ELASTIC_EVENTS}, handle=None, do_handle_copy=True, do_cpu_sync=None, do_expand=False, "
        "do_zero_padding=False, use_tma_aligned_col_major_sf=False"
    ),
    "ElasticBuffer.combine": (
        f"x, handle, topk_weights=None, bias=None, num_sms=0, num_qps=0, {ELASTIC_EVENTS}"
    ),
}
STATIC = [
    "Buffer.is_sm90_compiled",
    "Buffer.set_num_sms",
    "Buffer.capture",
    "Buffer.get_low_latency_rdma_size_hint",
    "Buffer.get_dispatch_config",
    "Buffer.get_combine_config",
    "ElasticBuffer.capture",
    "ElasticBuffer.get_buffer_size_hint",
]


@pytest.mark.parametrize("name", SIGNATURES)
def test_arguments_and_defaults_are_deepeps(name):
    found = inspect.signature(attrgetter(name)(deep_ep)).parameters.values()
    told = [p.name if p.default is p.empty else f"{p.name}={p.default}" for p in found if p.name != "self"]
    assert ", ".join(told) == SIGNATURES[name]
    assert all(p.kind is p.POSITIONAL_OR_KEYWORD for p in found)


@pytest.mark.parametrize("name", STATIC)
def test_what_is_static_there_is_static_here(name):
    owner, method = name.split(".")
    assert isinstance(inspect.getattr_static(getattr(deep_ep, owner), method), staticmethod)


def test_names():
    exported = {
        *("Buffer", "ElasticBuffer", "EPHandle", "EventOverlap", "EventHandle", "Config", "topk_idx_t"),
        *("get_physical_domain_size", "get_logical_domain_size", "utils"),
    }
    assert exported <= set(deep_ep.__all__)
    assert deep_ep.topk_idx_t == torch.int64
    assert deep_ep.Buffer.num_sms == 20
