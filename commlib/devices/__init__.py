"""Devices: the only place that asks which kind of device something is on."""

from __future__ import annotations

import torch

from commlib.devices import cuda
from commlib.devices.base import Backend, Platform, Wish
from commlib.devices.cpu import Cpu
from commlib.devices.cuda import Cuda

__all__ = ["Backend", "Platform", "Wish", "default_device", "platform_of", "resolve"]

_PLATFORMS: dict[str, Platform] = {platform.name: platform for platform in (Cpu(), Cuda())}


def platform_of(device: torch.device | str) -> Platform:
    """The kind of a device.

    Raises:
        ValueError: it is of a kind that commlib does not know, or names no device.
    """
    try:
        found = _PLATFORMS.get(torch.device(device).type)
    except RuntimeError as error:
        raise ValueError(f'device must be "cpu", "cuda" or "cuda:i", got {device!r}: {error}') from None
    if found is None:
        raise ValueError(f'device must be "cpu" or "cuda", got {device}')
    return found


def resolve(device: torch.device | str) -> torch.device:
    """The very device that is meant: a GPU with its index.

    Raises:
        ValueError: as :func:`platform_of`.
    """
    return platform_of(device).resolve(torch.device(device))


def default_device() -> str:
    """The current GPU where there is one that can be used, else the CPU."""
    return "cuda" if cuda.is_available() else "cpu"
