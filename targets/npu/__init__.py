"""Intel NPUs, by OpenVINO and Intel's NPU compiler."""

from mtu_compile.core.vendors import Vendor

VENDOR = Vendor(targets=("targets.npu.target:TARGETS",))
