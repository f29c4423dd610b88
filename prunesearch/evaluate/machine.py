"""The machine an evaluation runs on: its devices, and the versions of libraries that can change results."""

from __future__ import annotations

import platform
import socket
from functools import lru_cache
from importlib import metadata

import timm
import torch

from prunesearch.errors import ResourceError


def find_device(name: str) -> torch.device:
    """The device of that name; "auto" is CUDA, else Apple's MPS, else the CPU. Raises ResourceError."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return torch.device(next(kind for kind, has in available.items() if has))
    try:
        device = torch.device(name)
        is_there = available.get(device.type, False)
        if is_there and device.index:
            is_there = device.type == "cuda" and device.index < torch.cuda.device_count()
    except RuntimeError:  # no name of a device
        is_there = False
    if not is_there:
        possible = ", ".join(["auto", *(kind for kind, has in available.items() if has)])
        host = socket.gethostname()
        raise ResourceError(f"device: {name!r} is not available on {host}. Possible: {possible}. Write one of them.")
    return device


def describe(device: torch.device) -> str:
    """The device as text for people, with what its speed depends on."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"cpu (threads: {torch.get_num_threads()})" if device.type == "cpu" else str(device)


@lru_cache(maxsize=1)
def versions() -> tuple[tuple[str, str], ...]:
    """Versions of everything that can change results."""
    try:
        own = metadata.version("prunesearch")
    except metadata.PackageNotFoundError:
        own = "not installed"
    libraries = (("torch", str(torch.__version__)), ("timm", str(timm.__version__)), ("prunesearch", own))
    return (("python", platform.python_version()), *libraries)
