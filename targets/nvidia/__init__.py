"""NVIDIA GPUs and Jetson boards, by TensorRT and TensorRT-RTX."""

from mtu_compile.core.vendors import Vendor

VENDOR = Vendor(
    targets=("targets.nvidia.jetson:TARGETS", "targets.nvidia.target:TARGETS"),
    engines={
        "tensorrt": "targets.nvidia.engine:TensorRTEngine",
        "tensorrt-rtx": "targets.nvidia.engine:TensorRTRTXEngine",
    },
    packages=("tensorrt", "tensorrt-rtx-cu13"),
    extras={"tensorrt-rtx": "rtx"},
    builders={
        "tensorrt": "targets.nvidia.board:BUILDER",
        "tensorrt-rtx": "targets.nvidia.board:BUILDER",
    },
)
