"""An OpenVINO model that rounds to float16 where a device that computes in it would: how a CPU judges a GPU's graph.

Run in float32, a graph says nothing of what a GPU or an NPU makes of it: numbers above 65504 are infinite there. The
CPU plugin computes in float32 whatever a graph's types say (it drops a Convert to f16 and back, OpenVINO 2026.4.1), so
the rounding is an operation of its own here. ``passes.simulate_half`` is the same for ONNX graphs.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import torch
from numpy.typing import NDArray
from openvino import Op
from openvino import opset13 as ops

from targets.openvino.engine import OpenVINOEngine
from targets.openvino.host import HOST_CONFIG

#: Operations that move numbers and compute nothing.
_MOVES = frozenset(
    {"Broadcast", "Concat", "Gather", "GatherND", "Pad", "Reshape", "Select", "Slice", "Split", "Squeeze"}
    | {"StridedSlice", "Tile", "Transpose", "Unsqueeze", "VariadicSplit"}
)

#: What OpenVINO marks operations with whose float32 no device rounds (see ``keep_angles_precise``).
_PRECISE = "DisablePrecisionConversion_0"

#: Largest number of float16; OpenVINO cuts constants off there.
_MOST = float(np.finfo(np.float16).max)


class RoundHalf(Op):  # type: ignore[misc]
    """Float32 in, the nearest numbers of float16 out, in float32; Inf above 65504."""

    def __init__(self, inputs: Any = None) -> None:
        super().__init__(self, inputs)

    def validate_and_infer_types(self) -> None:
        self.set_output_type(0, self.get_input_element_type(0), self.get_input_partial_shape(0))

    def clone_with_new_inputs(self, new_inputs: Any) -> RoundHalf:
        return RoundHalf(new_inputs)

    def has_evaluate(self) -> bool:
        return True

    def evaluate(self, outputs: Any, inputs: Any) -> bool:
        # torch has vector instructions for it, numpy has not on every CPU.
        torch.from_numpy(outputs[0].data).copy_(torch.from_numpy(inputs[0].data).half())
        return True


def simulate_half_ir(model: openvino.Model) -> int:
    """Let ``model`` round, in place; returns the number of values that are rounded.

    Given::

        a = Convolution(x, w) → y = Sigmoid(a)

    Result::

        x' = RoundHalf(x), a = Convolution(x', w) → a' = RoundHalf(a) → y = Sigmoid(a') → RoundHalf

    Every float32 value that is computed is rounded, but for what only moves numbers or is made of constants, quantised
    values, which are whole numbers, and what is marked to keep its precision. Float constants are rounded too, except
    the ranges and scales of quantisers. What INT8 layers read is rounded as well, 30 dB below their own error, and so
    they run in float32 here, on the very numbers: no CPU's INT8 arithmetic is part of the verdict.
    """
    constant = _constants(model)
    places = 0
    for node in list(model.get_ordered_ops()):
        kind = node.get_type_name()
        if kind in ("Result", "FakeQuantize") or kind in _MOVES:
            continue
        if kind == "Constant":
            places += _round_constant(node)
        elif node not in constant:
            places += sum(_round(output) for output in node.outputs())
    model.validate_nodes_and_infer_types()
    return places


class HalfEngine(OpenVINOEngine):
    """An IR on this machine's CPU that rounds to float16 (``simulate_half_ir``); see ``OpenVINOEngine``."""

    def __init__(self, path: Path, config: Mapping[str, str] = HOST_CONFIG, weights: Path | None = None) -> None:
        super().__init__(path, config, weights=weights)

    def _prepare(self, model: Any) -> None:
        simulate_half_ir(model)


def _constants(model: openvino.Model) -> set[Any]:
    """Operations that compute with constants alone, and so before the first inference."""
    found: set[Any] = set()
    for node in model.get_ordered_ops():
        kind = node.get_type_name()
        if kind == "Constant" or (
            kind not in ("Parameter", "Result") and all(v.get_node() in found for v in node.input_values())
        ):
            found.add(node)
    return found


def _precise(node: Any) -> bool:
    return _PRECISE in node.get_rt_info()


def _round(output: Any) -> bool:
    """Put a ``RoundHalf`` behind a float32 value, for all but what keeps its precision."""
    if output.get_element_type() != openvino.Type.f32:
        return False
    readers = [port for port in output.get_target_inputs() if not _precise(port.get_node())]
    if not readers or (_precise(output.get_node()) and output.get_node().get_type_name() == "Convert"):
        return False
    names = set(output.names)
    rounded = RoundHalf([output])
    for port in readers:
        port.replace_source_output(rounded.output(0))
    if any(port.get_node().get_type_name() == "Result" for port in readers):
        output.set_names(set())
        rounded.output(0).set_names(names)
    return True


def _round_constant(node: Any) -> bool:
    """Give whoever computes with a float32 constant the nearest numbers of float16; a copy, the others keep theirs."""
    if node.get_output_element_type(0) != openvino.Type.f32:
        return False
    readers = [port for port in node.output(0).get_target_inputs() if _rounds(port.get_node(), port.get_index())]
    if not readers:
        return False
    rounded = ops.constant(_half(node.data))
    for port in readers:
        port.replace_source_output(rounded.output(0))
    return True


def _rounds(reader: Any, index: int) -> bool:
    """Whether a device would have a float constant that ``reader`` takes in float16."""
    kind = reader.get_type_name()
    if kind == "FakeQuantize" or _precise(reader):
        return False
    return not (kind in ("Multiply", "Subtract") and _dequantises(reader.input_value(1 - index).get_node()))


def _dequantises(node: Any) -> bool:
    """Whether a value is whole numbers of a quantised tensor, less a zero point perhaps."""
    if node.get_type_name() == "Subtract":
        node = node.input_value(0).get_node()
    return node.get_type_name() == "Convert" and not node.get_input_element_type(0).is_real()


def _half(array: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.clip(array, -_MOST, _MOST).astype(np.float16).astype(np.float32)
