"""OpenVINO: Intel CPUs and GPUs."""

from mtu_compile.core.vendors import Vendor

VENDOR = Vendor(
    targets={"cpu": "targets.openvino.cpu:CPU", "intel-gpu": "targets.openvino.gpu:INTEL_GPU"},
    engines={
        "openvino": "targets.openvino.engine:OpenVINOEngine",
        "openvino-float": "targets.openvino.float_engine:OpenVINOFloatEngine",
    },
    backends=("targets.openvino.host:backend",),
)
