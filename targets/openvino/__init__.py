"""OpenVINO: Intel CPUs and GPUs."""

from mtu_compile.core.vendors import Vendor

VENDOR = Vendor(
    targets=("targets.openvino.cpu:TARGETS", "targets.openvino.gpu:TARGETS"),
    engines={
        "openvino": "targets.openvino.engine:OpenVINOEngine",
        "openvino-float": "targets.openvino.float_engine:OpenVINOFloatEngine",
    },
    packages=("openvino",),
    extras={"openvino": "openvino", "openvino-float": "openvino"},
    backends=("targets.openvino.host:backend",),
)
