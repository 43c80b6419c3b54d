"""CUDA graphs of ranks that are threads of one process."""

import threading
from contextlib import contextmanager

import torch

one_at_a_time = threading.Lock()  # PyTorch captures one graph of a process at a time


@contextmanager
def captured(graph):
    """As torch.cuda.graph, which would wait for the whole device: for kernels that wait for this rank."""
    torch.cuda.current_stream().synchronize()
    with one_at_a_time:
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            yield
        finally:
            graph.capture_end()
