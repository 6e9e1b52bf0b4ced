"""Intel NPUs, by OpenVINO and Intel's NPU compiler."""

from mtu_compile.core.vendors import Vendor

VENDOR = Vendor(
    targets={
        "intel-npu": "targets.npu.target:INTEL_NPU",
        "intel-npu-3720": "targets.npu.target:INTEL_NPU_3720",
        "intel-npu-4000": "targets.npu.target:INTEL_NPU_4000",
        "intel-npu-5010": "targets.npu.target:INTEL_NPU_5010",
    }
)
