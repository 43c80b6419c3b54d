"""Facts about the machine that figures depend on besides the configuration."""

from __future__ import annotations

import os
from typing import Any

import torch

from bench.harness.facts import commit, driver, slug
from bench.harness.launch import Launch
from commlib import cuda
from commlib.cli.measuring import host_facts

CUDA_ENVIRONMENT = ("CUDA_MODULE_LOADING", "CUDA_DEVICE_MAX_CONNECTIONS")


def machine(launch: Launch) -> dict[str, Any]:
    """Facts that the figures depend on besides the configuration."""
    return host() | {
        "ranks": launch.size,
        "threads_per_rank": torch.get_num_threads(),
        "mpi": _mpi_version(launch),
    }


def host() -> dict[str, Any]:
    """The part of it that every benchmark has."""
    return host_facts() | {"commit": commit()}


def gpu(index: int = 0) -> dict[str, Any]:
    """The GPU and the software that runs it."""
    properties = cuda.properties(index)
    return {
        "gpu": properties.name,
        "sms": properties.sms,
        "gpu_memory": properties.total_memory,
        "gpus": torch.cuda.device_count(),
        "cuda_of_torch": torch.version.cuda,
        "driver": driver(),
        "environment": {name: os.environ.get(name) for name in CUDA_ENVIRONMENT},
    }


def where(facts: dict[str, Any]) -> str:
    """Ranks and machine, from :func:`machine`, or :func:`host` and :func:`gpu`."""
    if "gpu" in facts:
        return f"{facts['ranks']} ranks on one {facts['gpu']} ({facts['sms']} SMs)"
    return f"{facts['ranks']} ranks on {facts['cores']} cores ({facts['cpu']})"


def device_name(facts: dict[str, Any]) -> str:
    """The device's name, for a file's name."""
    return slug(facts["gpu"]) if "gpu" in facts else "cpu"


def _mpi_version(launch: Launch) -> str | None:
    if launch.comm is None:
        return None
    from mpi4py import MPI

    return MPI.Get_library_version().split(",")[0].strip("\0 \n")
