"""The tests for a GPU that `make test-gpu-simulated` leaves out, and why."""

from collections.abc import Iterator

NO_TRITON = "torch.compile's code for a GPU is Triton's, which needs a driver"
A_BENCHMARK = "a benchmark: its figures would mean nothing, and it takes a minute"
TOO_LARGE = "takes too long in a simulation; the C++ tests have the same with fewer rows"

# By file::function; where a case is named, in brackets, it alone is left out.
NOT_RUN = {
    "test_autocast.py::test_autocast_compiles": NO_TRITON,
    "test_compile.py::test_a_compiled_graph_keeps_its_communicator": NO_TRITON,
    "test_compile.py::test_a_compiled_layer_gives_the_same_values_and_gradients": NO_TRITON,
    "test_compile.py::test_an_operation_whose_result_is_not_used_is_not_left_out[cuda-inductor]": NO_TRITON,
    "test_compile.py::test_checkpointing_inside_of_compiled_code[cuda-inductor]": NO_TRITON,
    "test_compile.py::test_compiled_code_writes_out": NO_TRITON,
    "test_compile.py::test_layers_with_a_communicator_each_share_one_graph": NO_TRITON,
    "test_compile.py::test_operations_are_chained_in_the_programs_order": NO_TRITON,
    "test_cuda.py::test_cupy_in_cupy_out": "CuPy needs CUDA's libraries and a driver",
    "test_cuda.py::test_more_rows_than_fit_into_shared_memory_at_once": TOO_LARGE,
    "test_gpu_benchmark.py::test_the_gpu_benchmark_runs_and_writes_every_sample": A_BENCHMARK,
    "test_gpu_comparison.py::test_one_rank_on_a_gpu_compares_with_nccl": "NCCL needs a driver",
    "test_gpu_comparison.py::test_two_ranks_on_one_gpu_are_told_that_each_needs_its_own": A_BENCHMARK,
    "test_graphs.py::test_a_bounded_layer_may_be_captured": "a CPU's grouped products read offsets",
    "test_memory.py::test_repeated_operations_do_not_grow": TOO_LARGE,
    "test_moe_layer.py::test_it_compiles_without_a_graph_break": NO_TRITON,
    "test_quantize.py::test_a_compiled_layer_gives_the_same": NO_TRITON,
    "test_overlap_benchmark.py::test_on_a_gpu_they_run_on_threads": A_BENCHMARK,
    "test_routers.py::test_a_router_compiles_with_all_its_options": NO_TRITON,
}
_NAME = "test_transformers.py::test_logits_losses_and_gradients_are_those_of_the_unsharded_model"
for _model in ("mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss"):
    NOT_RUN[f"{_NAME}[cuda-{_model}-batched_mm]"] = NO_TRITON


def reason_for(item) -> str:
    """Why this case is left out, or an empty string."""
    file = item.path.name
    names = (f"{file}::{item.originalname}", f"{file}::{item.name}")
    return next((NOT_RUN[name] for name in names if name in NOT_RUN), "")


def functions() -> Iterator[tuple[str, str]]:
    """File and function of each."""
    for name in NOT_RUN:
        file, _, function = name.partition("[")[0].partition("::")
        yield file, function
