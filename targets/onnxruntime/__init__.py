"""ONNX Runtime."""

from mtu_compile.core.vendors import Vendor

VENDOR = Vendor(
    engines={"onnxruntime": "targets.onnxruntime.engine:OnnxRuntimeEngine"},
    backends=("targets.onnxruntime.backend:backend",),
)
