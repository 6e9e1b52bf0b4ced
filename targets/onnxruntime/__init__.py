"""ONNX Runtime: any CPU."""

from mtu_compile.core.vendors import Vendor

VENDOR = Vendor(
    targets=("targets.onnxruntime.target:TARGETS",),
    engines={"onnxruntime": "targets.onnxruntime.engine:OnnxRuntimeEngine"},
    packages=("onnxruntime",),
    extras={"onnxruntime": "onnxruntime"},
    backends=("targets.onnxruntime.backend:backend",),
)
