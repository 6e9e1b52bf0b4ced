"""NVIDIA Jetson boards, through the TensorRT that JetPack brings.

No TensorRT builds for these GPUs anywhere else, so what is made on the build machine is the lowered graph and the
recipe; ``mtu-compile board build`` makes the engines on the board.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from mtu_compile.core.precision import WEIGHTS_ONLY
from targets.base import GIB, MIB, Precision
from targets.costs.roofline import Speed
from targets.nvidia.target import LOWERING, SHARED_BATCH, TensorRTSpec, TensorRTTarget

#: Oldest and newest TensorRT the builder is written for; JetPack's own are ``JETPACK_6`` and ``JETPACK_7`` below.
TENSORRT = ("10.3", "11.4")


@dataclass(frozen=True)
class JetPack:
    """What one line of JetPack releases brings.

    Attributes:
        version: first and last release of the line.
        tensorrt, cuda: of the first release.
        python: the system's CPython, for which TensorRT's bindings are installed.
        glibc: the system's; it decides which wheels fit.
        machine: the wheels' architecture.
        packages: requirements beside mtu-compile's own. The CUDA bindings are those of the line's oldest CUDA, which
            every later driver runs.
        source: where this stands.
    """

    version: tuple[str, str]
    tensorrt: str
    cuda: str
    python: str
    glibc: str
    packages: tuple[str, ...]
    source: str
    machine: str = "aarch64"


JETPACK_6 = JetPack(
    version=("6.1", "6.2"),
    tensorrt="10.3",
    cuda="12.6",
    python="3.10",
    glibc="2.35",
    packages=("cuda-python==12.6.*",),
    source="JetPack SDK 6.1 and 6.2 pages, developer.nvidia.com/embedded/jetpack-sdk-62 (CUDA 12.6, TensorRT 10.3); "
    "Ubuntu 22.04: Python 3.10, glibc 2.35",
)
#: On Thor from 7.0, on Orin from 7.2.
JETPACK_7 = JetPack(
    version=("7.0", "7.2"),
    tensorrt="10.13",
    cuda="13.0",
    python="3.12",
    glibc="2.39",
    packages=("cuda-python==13.0.*",),
    source="JetPack 7.1 download archive, developer.nvidia.com/embedded/jetpack/downloads/archive-7.1 (CUDA 13.0, "
    "TensorRT 10.13.3); JetPack 7.2 brings CUDA 13.2 and TensorRT 10.16.2 to Orin and Thor "
    "(OE4T/meta-tegra#2224, and roboflow/inference#2531, read off a board); Ubuntu 24.04: Python 3.12, glibc 2.39",
)


@dataclass(frozen=True)
class JetsonSpec(TensorRTSpec):
    """A board; ``jetpacks`` are the systems it may run."""

    jetpacks: tuple[JetPack, ...] = ()

    def board_systems(self) -> tuple[JetPack, ...]:
        return self.jetpacks

    def board_requirements(self) -> Mapping[str, Any]:
        """What ``mtu-compile board build`` asks of the board before it builds; goes into the manifest."""
        return {
            "device": self.device,
            "compute_capability": self.compute_capabilities[0],
            "tensorrt": list(TENSORRT),
            "python": [jetpack.python for jetpack in self.jetpacks],
            "jetpack": [
                {**asdict(jetpack), "version": list(jetpack.version), "packages": list(jetpack.packages)}
                for jetpack in self.jetpacks
            ],
        }


_WEIGHTS_SOURCE = (
    ". Weights only: parsed and built with TensorRT-RTX 1.7.1 by this project, on no board; INT4 weights of matrix "
    "products and INT4 in the ONNX parser are new in TensorRT 10.0 (its release notes, onnx-tensorrt's changelog)"
)

_SOURCES = {
    "shared_batch": SHARED_BATCH,
    "reserved_bytes": "estimate, not measured here: the module's memory less what tegrastats shows as the total on "
    "boards of others, and 1,313 MiB in use at idle on one of them (NVIDIA, 'Maximizing Memory Efficiency to Run "
    "Bigger Models on NVIDIA Jetson', Table 7, read second-hand: 1.1 GB); the desktop takes up to 865 MB more",
    "workspace_bytes": "chosen, not measured: a quarter of the memory, at most 8 GiB. TensorRT's own default, all of "
    "it, leaves nothing to the CPU that shares it",
    "kind": "JetPack brings TensorRT; TensorRT-RTX 1.7 refuses compute capabilities 8.7 and 11.0",
}
_ORIN_SOURCES = {
    **_SOURCES,
    "opset": "TensorRT 10.3 reads the operators of ONNX opsets 9 to 20, and with INT4 numbers the quantisers of 21, "
    "which is all that INT4 weights need of it (onnx-tensorrt 10.0 to 10.5: docs/operators.md and changelog). 22, "
    "which bf16 needs, came with ONNX 1.17 in 10.6. Read by no board here",
    "compute_capabilities": "developer.nvidia.com/cuda-gpus: Jetson AGX Orin, Orin NX, Orin Nano 8.7",
    "precisions": "CUDA C++ Programming Guide, technical specifications per compute capability: tensor cores take "
    "int8, fp16 and (from 8.0) bf16; fp8 from 8.9 on, so not on 8.7. bf16 is left out: its graphs need opset 22, which "
    "JetPack 6 does not read" + _WEIGHTS_SOURCE,
    "jetpacks": f"{JETPACK_6.source}; {JETPACK_7.source}",
}


#: In use at idle, without a desktop; see the source of ``reserved_bytes``.
_IDLE_MIB = 1313


def _reserved(gib: int, shown_mib: int) -> int:
    """What firmware keeps back of the module's memory, and what the system uses at idle."""
    return gib * GIB - (shown_mib - _IDLE_MIB) * MIB


def _orin(name: str, device: str, gib: int, shown_mib: int, source: str, speed: Speed) -> JetsonSpec:
    return JetsonSpec(
        name=name,
        vendor="NVIDIA (TensorRT)",
        device=device,
        precisions=("int8", *WEIGHTS_ONLY, "fp16", "fp32"),
        opset=21,
        memory_bytes=gib * GIB,
        reserved_bytes=_reserved(gib, shown_mib),
        shared_batch=None,
        lowering=LOWERING,
        sources={**_ORIN_SOURCES, "memory_bytes": source, "speed": speed.source},
        kind="tensorrt",
        built="board",
        compute_capabilities=("8.7",),
        workspace_bytes=min(gib // 4, 8) * GIB,
        jetpacks=(JETPACK_6, JETPACK_7),
        speed=speed,
    )


_ORIN_DATA = "{} module data sheet: {} LPDDR5, shared by CPU and GPU"

#: The GPU alone, without the accelerators (DLA) that the advertised TOPS include; fp16 runs at half the rate of INT8.
_ORIN_SPEED = "{} module data sheet: {} sparse INT8 TOPS of the GPU, of which half are dense; {} GB/s"

ORIN = _orin(
    "jetson-orin",
    "Jetson AGX Orin 64GB",
    64,
    62841,
    _ORIN_DATA.format("Jetson AGX Orin Series", "64 GB 256-bit"),
    Speed("Jetson AGX Orin 64GB", 42.5, 85, 204.8, _ORIN_SPEED.format("Jetson AGX Orin Series", 170, 204.8)),
)
ORIN_NX = _orin(
    "jetson-orin-nx",
    "Jetson Orin NX 16GB",
    16,
    15656,
    _ORIN_DATA.format("Jetson Orin NX Series", "16 GB 128-bit"),
    Speed("Jetson Orin NX 16GB", 15, 30, 102.4, _ORIN_SPEED.format("Jetson Orin NX Series", 60, 102.4)),
)
ORIN_NANO = _orin(
    "jetson-orin-nano",
    "Jetson Orin Nano 8GB",
    8,
    7620,
    _ORIN_DATA.format("Jetson Orin Nano Series", "8 GB 128-bit"),
    Speed("Jetson Orin Nano 8GB", 10, 20, 68, _ORIN_SPEED.format("Jetson Orin Nano Series", 40, 68)),
)

_THOR_PRECISIONS: tuple[Precision, ...] = ("int8", "fp8", *WEIGHTS_ONLY, "fp16", "bf16", "fp32")

_THOR_SPEED = Speed(
    "Jetson AGX Thor 128GB",
    258,
    517,
    273,
    "Jetson T5000 data sheet: 2070 sparse FP4 TFLOPS, 273 GB/s; dense FP8 is a quarter, fp16 an eighth. INT8 is taken "
    "to run as fast as FP8",
)

THOR = JetsonSpec(
    name="jetson-thor",
    vendor="NVIDIA (TensorRT)",
    device="Jetson AGX Thor 128GB (T5000)",
    precisions=_THOR_PRECISIONS,
    opset=22,
    memory_bytes=128 * GIB,
    reserved_bytes=_reserved(128, 125772),
    shared_batch=None,
    lowering=LOWERING,
    sources={
        **_SOURCES,
        "opset": "JetPack 7 brings TensorRT 10.13; the parser has read ONNX 1.17, whose opset is 22, since 10.6 "
        "(onnx-tensorrt's changelog). Read by no board here",
        "memory_bytes": "Jetson AGX Thor and T5000 data sheet: 128 GB 256-bit LPDDR5X, shared by CPU and GPU",
        "compute_capabilities": "developer.nvidia.com/cuda-gpus: Jetson T5000 11.0 (10.1 before CUDA 13.0)",
        "precisions": "TensorRT support matrix for Thor (DRIVE OS 7.0.3 release properties, then numbered 10.1): FP32, "
        "FP16, FP8, BF16, INT8" + _WEIGHTS_SOURCE,
        "jetpacks": JETPACK_7.source,
        "speed": _THOR_SPEED.source,
    },
    kind="tensorrt",
    built="board",
    compute_capabilities=("11.0",),
    workspace_bytes=8 * GIB,
    jetpacks=(JETPACK_7,),
    speed=_THOR_SPEED,
)

JETSON_ORIN = TensorRTTarget(ORIN)
JETSON_ORIN_NX = TensorRTTarget(ORIN_NX)
JETSON_ORIN_NANO = TensorRTTarget(ORIN_NANO)
JETSON_THOR = TensorRTTarget(THOR)

#: In the order they are shown.
TARGETS = (JETSON_ORIN, JETSON_ORIN_NX, JETSON_ORIN_NANO, JETSON_THOR)
