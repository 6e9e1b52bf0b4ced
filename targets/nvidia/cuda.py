"""What the CUDA runtime says about this machine's GPU, through ``cuda-python``; imported only when it is asked."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any

from mtu_compile.core.errors import TargetError, ToolchainMissing

#: The CUDA runtime's Python module: cuda-python 12.8 and later, and before it.
_MODULES = ("cuda.bindings.runtime", "cuda.cudart")
_NO_DRIVER_HINT = "install NVIDIA's driver; where it works, nvidia-smi lists the GPU"


@dataclass(frozen=True)
class Device:
    """The first GPU that CUDA shows.

    Attributes:
        name: as NVIDIA writes it ("NVIDIA GeForce RTX 4090", "Orin").
        compute_capability: "8.9".
        total_bytes: its memory; on a Jetson that is the memory it shares with the CPU.
        free_bytes: what is free of it now.
        driver: newest CUDA version the driver runs ("13.0").
    """

    name: str
    compute_capability: str
    total_bytes: int
    free_bytes: int
    driver: str


def load_cudart() -> Any:
    """The Python module of the CUDA runtime; ``ToolchainMissing`` if there is none."""
    problem = ""
    for module in _MODULES:
        try:
            return import_module(module)
        except (ImportError, OSError) as error:  # OSError: a shared library it needs
            problem = problem or str(error)
    raise ToolchainMissing(f"cuda-python is not installed ({problem})", hint="pip install cuda-python")


def call(function: Any, *arguments: Any) -> Any:
    """Call a function of the CUDA runtime and return its value, a tuple if there are several, or ``None``.

    Raises:
        TargetError: it failed; the message names the function and CUDA's error.
    """
    name = getattr(function, "__name__", "cuda")
    try:
        error, *values = function(*arguments)
    except RuntimeError as missing:  # without a driver, cuda-python 12.6 raises where later ones return an error
        raise TargetError(f"no NVIDIA driver on this machine ({missing})", hint=_NO_DRIVER_HINT) from missing
    if int(error) != 0:
        raise TargetError(f"{name} failed: {error.name}")
    return values[0] if len(values) == 1 else tuple(values) or None


def device_info() -> Device:
    """The GPU that engines are built for and run on.

    Raises:
        ToolchainMissing: cuda-python is not installed.
        TargetError: there is no driver, or no GPU.
    """
    cudart = load_cudart()
    driver = call(cudart.cudaDriverGetVersion)  # 12060 for 12.6; 0 without a driver
    if driver == 0:
        raise TargetError("no NVIDIA driver on this machine", hint=_NO_DRIVER_HINT)
    try:
        count = call(cudart.cudaGetDeviceCount)
    except TargetError as error:
        raise TargetError(f"no NVIDIA GPU can be used: {error.message}", hint=_NO_DRIVER_HINT) from error
    if count == 0:
        raise TargetError("no NVIDIA GPU on this machine", hint=_NO_DRIVER_HINT)
    call(cudart.cudaSetDevice, 0)
    attributes = cudart.cudaDeviceAttr
    major = call(cudart.cudaDeviceGetAttribute, attributes.cudaDevAttrComputeCapabilityMajor, 0)
    minor = call(cudart.cudaDeviceGetAttribute, attributes.cudaDevAttrComputeCapabilityMinor, 0)
    name = call(cudart.cudaGetDeviceProperties, 0).name
    free, total = call(cudart.cudaMemGetInfo)
    return Device(
        name=name.decode(errors="replace").rstrip("\0") if isinstance(name, bytes) else str(name),
        compute_capability=f"{major}.{minor}",
        total_bytes=total,
        free_bytes=free,
        driver=f"{driver // 1000}.{driver % 1000 // 10}",
    )
