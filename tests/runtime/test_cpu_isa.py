from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from mtu_compile.runtime import cpu_isa

ZEN4 = cpu_isa.LEVELS["AVX512_CORE_BF16"] | {"avx2", "fma"}
ALDER_LAKE = cpu_isa.LEVELS["AVX2_VNNI"]
SAPPHIRE_RAPIDS = frozenset().union(*cpu_isa.LEVELS.values())


@pytest.mark.parametrize(
    ("features", "machine", "level"),
    [
        (SAPPHIRE_RAPIDS, "x86_64", "AVX512_CORE_AMX"),
        (ZEN4, "amd64", "AVX512_CORE_BF16"),
        (ALDER_LAKE, "x86_64", "AVX2_VNNI"),
        ({"avx2", "fma"}, "x86_64", "AVX2"),
        ({"sse4_2"}, "x86_64", cpu_isa.BELOW),
        (set(), "x86_64", "unknown"),
        ({"asimd"}, "aarch64", "aarch64"),
    ],
)
def test_a_cpu_is_known_by_its_features(features: set[str], machine: str, level: str) -> None:
    assert cpu_isa._level(features, machine) == level


@pytest.mark.parametrize(
    ("own", "features", "limit", "level"),
    [
        ("AVX512_CORE_AMX", SAPPHIRE_RAPIDS, "AVX2", "AVX2"),
        ("AVX512_CORE_AMX", SAPPHIRE_RAPIDS, "avx512_core_vnni", "AVX512_CORE_VNNI"),
        ("AVX512_CORE_AMX", SAPPHIRE_RAPIDS, "AVX512_CORE_FP16", "AVX512_CORE_BF16"),
        ("AVX512_CORE_AMX", SAPPHIRE_RAPIDS, "SSE41", cpu_isa.BELOW),
        ("AVX512_CORE_AMX", SAPPHIRE_RAPIDS, "DEFAULT", "AVX512_CORE_AMX"),
        ("AVX512_CORE_AMX", SAPPHIRE_RAPIDS, None, "AVX512_CORE_AMX"),
        ("AVX512_CORE_BF16", ZEN4, "AVX2_VNNI", "AVX2"),  # which has no VNNI for 256 bits
        ("AVX2", {"avx2", "fma"}, "AVX512_CORE", "AVX2"),
        ("aarch64", set(), "AVX2", "aarch64"),
    ],
)
def test_onednns_limit_is_obeyed(own: str, features: set[str], limit: str | None, level: str) -> None:
    assert cpu_isa._limited(own, features, limit) == level


def test_the_levels_a_cpu_can_stand_in_for_end_with_the_one_asked_for() -> None:
    known = cpu_isa.imitable()
    assert list(known) == [name for name in cpu_isa.LEVELS if name in known]
    if known:
        assert cpu_isa.up_to(known[0]) == known[:1]
        assert cpu_isa.up_to(known[-1]) == known
    assert cpu_isa.up_to("aarch64") == ("aarch64",)


PROBE = """
import json, sys
import numpy as np, openvino as ov
from openvino import opset13 as ops
from mtu_compile.runtime import cpu_isa
x = ops.parameter([1, 64, 16, 16], np.float32, name="x")
w = np.random.default_rng(0).standard_normal((64, 64, 3, 3)).astype(np.float32)
y = ops.convolution(x, ops.constant(w), [1, 1], [1, 1], [1, 1], [1, 1])
compiled = ov.Core().compile_model(ov.Model([y], [x], "m"), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
kinds = [op.get_rt_info()["primitiveType"].astype(str) for op in compiled.get_runtime_model().get_ordered_ops()]
print(json.dumps([cpu_isa.level(), kinds]))
"""


@pytest.mark.skipif(
    cpu_isa.up_to(cpu_isa.level())[0] != "AVX2" or len(cpu_isa.imitable()) < 2, reason="no better x86 CPU"
)
def test_a_limit_changes_the_kernels_that_run() -> None:
    """Else what is said to be proven at a level was proven at another."""
    found = {}
    for limit in ("AVX2", "DEFAULT"):
        done = subprocess.run(
            [sys.executable, "-c", PROBE],
            env={**os.environ, cpu_isa.LIMIT: limit},
            capture_output=True,
            text=True,
            check=True,
        )
        found[limit] = json.loads(done.stdout)
    level, kinds = found["AVX2"]
    assert level == "AVX2" and any("avx2" in kind for kind in kinds) and not any("avx512" in kind for kind in kinds)
    if cpu_isa.imitable()[-1].startswith("AVX512"):
        assert any("avx512" in kind for kind in found["DEFAULT"][1])
