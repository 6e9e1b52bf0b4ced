"""How far a network's numbers go, where in it, and what that means for a device that computes in float16."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import targets
from mtu_compile.accuracy.host.half_range import (
    HalfRange,
    computes_in_half,
    half_range,
    more_precise,
    part_precision,
    require_half,
)
from mtu_compile.core.errors import EXIT_ACCURACY, NotFiniteError


def layers(tmp_path: Path, *factors: float, mask: bool = False) -> Path:
    """Matrix products that multiply [1, 4] numbers by each factor in turn, with a Sigmoid behind."""
    nodes, weights, last = [], [], "x"
    for index, factor in enumerate(factors):
        weights.append(numpy_helper.from_array(np.eye(4, dtype=np.float32) * np.float32(factor), f"w{index}"))
        nodes.append(helper.make_node("MatMul", [last, f"w{index}"], [f"y{index}"], name=f"layer{index}"))
        last = f"y{index}"
    if mask:
        lowest = np.array([0, 0, 0, np.finfo(np.float32).min], np.float32)
        weights.append(numpy_helper.from_array(lowest, "mask"))
        nodes.append(helper.make_node("Add", [last, "mask"], ["masked"], name="mask"))
        nodes.append(helper.make_node("Softmax", ["masked"], ["s"], name="softmax"))
    else:
        nodes.append(helper.make_node("Sigmoid", [last], ["s"], name="sigmoid"))
    weights.append(numpy_helper.from_array(np.eye(4, dtype=np.float32), "last"))
    nodes.append(helper.make_node("MatMul", ["s", "last"], ["y"], name="last"))
    border = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 4]) for name in "xy"]
    graph = helper.make_graph(nodes, "g", border[:1], border[1:], weights)
    path = tmp_path / "model.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9), path)
    return path


def feeds(*sizes: float) -> list[dict[str, Any]]:
    return [{"x": np.array([[size, -size, 0, size / 2]], np.float32)} for size in sizes]


def test_the_largest_number_and_its_node(tmp_path: Path) -> None:
    found = half_range(layers(tmp_path, 10, 20, 0.5), feeds(3, 5), tmp_path)
    assert (found.peak, found.node, found.overflow) == (1000, "layer1", None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.onnx"]


def test_the_first_overflow_is_named_and_not_what_follows(tmp_path: Path) -> None:
    found = half_range(layers(tmp_path, 10, 1e4, 1e3, 1e3), feeds(0.1, 5), tmp_path)
    assert (found.overflow, found.overflow_type, found.overflow_at) == ("layer2", "MatMul", 0)
    found = half_range(layers(tmp_path, 10, 1e4), feeds(0.1, 5, 7), tmp_path)
    assert (found.overflow, found.overflow_at, found.peak) == ("layer1", 1, 7e5)


@pytest.mark.parametrize(("size", "overflows"), [(65504, False), (65519, False), (65521, True)])
def test_it_begins_where_rounding_gives_infinity(tmp_path: Path, size: float, overflows: bool) -> None:
    assert (half_range(layers(tmp_path, 1), feeds(size), tmp_path).overflow is not None) is overflows


def test_a_weight_too_large_for_float16_is_found_behind_its_layer(tmp_path: Path) -> None:
    found = half_range(layers(tmp_path, 1, 1e6), feeds(1), tmp_path)
    assert found.overflow == "layer1" and found.peak == 1e6


def test_a_mask_is_no_overflow(tmp_path: Path) -> None:
    found = half_range(layers(tmp_path, 30, mask=True), feeds(1), tmp_path)
    assert found.overflow is None and found.peak == 30


def test_a_unet_that_overflows_says_where_and_what_helps() -> None:
    found = HalfRange(2e5, "mid/MatMul", "mid/MatMul", "MatMul", 1)
    calls = [(1, 999.0), (4, 400.0)]
    for name, helps in (("rtx", "--bf16 or --fp32"), ("intel-gpu", "--fp32"), ("intel-npu", "float16 only")):
        with pytest.raises(NotFiniteError, match=r"'sr' overflows float16 in step 4 of 8 \(timestep 400\)") as caught:
            require_half(found, "sr", targets.get(name).spec, calls, 8)
        assert "'mid/MatMul' (MatMul)" in caught.value.message and helps in str(caught.value.hint)
        assert caught.value.exit_code == EXIT_ACCURACY
    require_half(HalfRange(100, "mid/MatMul"), "sr", targets.get("rtx").spec, calls, 8)


def test_parts_stay_in_a_type_that_holds_them() -> None:
    beyond, tight, small = HalfRange(1e6, "a", "a", "Conv", 0), HalfRange(3e4, "a"), HalfRange(900, "a")
    for name in ("rtx", "jetson-orin", "intel-gpu"):
        spec = targets.get(name).spec
        found = [part_precision("vae_decoder", one, spec) for one in (beyond, tight, small)]
        assert found == ["fp32", "fp32", "fp16"]
    npu = targets.get("intel-npu").spec
    assert part_precision("vae_decoder", tight, npu) == "fp16"
    with pytest.raises(NotFiniteError, match="the VAE decoder overflows float16, first at node 'a'") as caught:
        part_precision("vae_decoder", beyond, npu)
    assert caught.value.network == "vae_decoder"


def test_advice_for_a_task_below_its_threshold_fits_the_precision() -> None:
    rtx, gpu, npu = (targets.get(name).spec for name in ("rtx", "intel-gpu", "intel-npu"))
    assert more_precise(rtx, "bf16") == "--fp16 or --fp32" and more_precise(gpu, "fp16") == "--fp32"
    assert more_precise(npu, "int8-weights") == "--fp16"
    assert more_precise(npu, "fp16") == more_precise(rtx, "fp32") == ""


def test_which_builds_compute_in_float16() -> None:
    found = {
        (name, precision): computes_in_half(targets.get(name).spec, precision)
        for name in ("cpu", "rtx", "intel-gpu", "intel-npu")
        for precision in targets.get(name).spec.precisions
    }
    assert {name for name, half in found.items() if not half} == {
        *(("cpu", precision) for precision in targets.get("cpu").spec.precisions),
        *(("rtx", "bf16"), ("rtx", "fp32"), ("intel-gpu", "fp32")),
    }
