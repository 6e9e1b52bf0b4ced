"""ONNX Runtime: any CPU."""

from mtu_compile.core.vendors import Vendor

VENDOR = Vendor(
    targets={"onnxruntime": "targets.onnxruntime.target:ONNXRUNTIME"},
    engines={"onnxruntime": "targets.onnxruntime.engine:OnnxRuntimeEngine"},
    backends=("targets.onnxruntime.backend:backend",),
)
