"""NVIDIA GPUs and Jetson boards, by TensorRT and TensorRT-RTX."""

from mtu_compile.core.vendors import Vendor

VENDOR = Vendor(
    targets={
        "jetson-orin": "targets.nvidia.jetson:JETSON_ORIN",
        "jetson-orin-nx": "targets.nvidia.jetson:JETSON_ORIN_NX",
        "jetson-orin-nano": "targets.nvidia.jetson:JETSON_ORIN_NANO",
        "jetson-thor": "targets.nvidia.jetson:JETSON_THOR",
        "rtx": "targets.nvidia.target:RTX",
        "rtx-ampere": "targets.nvidia.target:RTX_AMPERE",
        "rtx-ada": "targets.nvidia.target:RTX_ADA",
        "rtx-blackwell": "targets.nvidia.target:RTX_BLACKWELL",
        "tensorrt": "targets.nvidia.target:TENSORRT",
    },
    engines={
        "tensorrt": "targets.nvidia.engine:TensorRTEngine",
        "tensorrt-rtx": "targets.nvidia.engine:TensorRTRTXEngine",
    },
    builders={
        "tensorrt": "targets.nvidia.board:BUILDER",
        "tensorrt-rtx": "targets.nvidia.board:BUILDER",
    },
)
