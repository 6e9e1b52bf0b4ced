"""Quantised OpenVINO models, computed in float32: what the numbers of a graph give, whatever the CPU can multiply.

A CPU stands in for a device that is not here. Its own INT8 kernels are another matter: without AMX, OpenVINO's
convolutions halve the resolution of signed activations, and without VNNI sums of products overflow. So here every
number is rounded where the graph says so, and multiplied and added in float32, which holds products of two bytes
exactly.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mtu_compile.core.amounts import readable
from mtu_compile.core.errors import TargetError
from mtu_compile.core.host_memory import host_memory
from targets.openvino.engine import OpenVINOEngine, weigh

#: How often weights are held in float32 while a model is compiled (measured at Stable Diffusion 1.5's size: 11.6 GB
#: of memory of the process's own, for 3.44 GB).
COPIES = 3.0

_BYTES = ("i8", "u8")


class OpenVINOFloatEngine(OpenVINOEngine):
    """An OpenVINO model whose INT8 layers run in float32 on rounded numbers; see ``OpenVINOEngine``.

    Raises:
        TargetError: this machine has not the memory, which is known before any is taken.
    """

    def _prepare(self, model: Any) -> None:
        needed, memory = int(COPIES * 4 * weigh(model, _BYTES)), host_memory()
        if memory is not None and needed > memory:
            raise TargetError(
                f"{self.name} takes about {readable(needed)} of memory where its INT8 weights are computed with in "
                f"float32, and this machine has {readable(memory)}",
                hint="its device takes a quarter of that or less: run it there",
            )
        multiply_in_float(model)

    def _branches(self, model: Any) -> bool:
        # Branches share weights of 8 bits, and not those of float32: 22 GB at Stable Diffusion 1.5's size.
        return False


def multiply_in_float(model: Any) -> int:
    """Let no layer of a model find integers to multiply, in place; returns how many places changed.

    *Given*::

        FakeQuantize(x) → Convert(i8) → Convert(f32) → …    Constant(i8) → Convert(f32) → Subtract? → Multiply(scale)

    *Result*: the same numbers without the detour over a type of 8 bits::

        FakeQuantize(x) → …                                 Constant(f32)
    """
    from openvino import opset13 as ops

    places = 0
    for node in model.get_ordered_ops():
        if node.get_type_name() != "Convert" or str(node.get_element_type().get_type_name()) not in ("f32", "f16"):
            continue
        integers = node.input(0).get_source_output()
        source = integers.get_node()
        if integers.get_element_type().get_type_name() not in _BYTES:
            continue
        if source.get_type_name() == "Convert":
            before = source.input(0).get_source_output()
            if before.get_node().get_type_name() == "FakeQuantize" and _levels(before.get_node()) <= 256:
                node.input(0).replace_source_output(before)
                places += 1
        elif source.get_type_name() == "Constant":
            numbers, last = _dequantised(node, source.data)
            constant = ops.constant(numbers.astype(last.get_element_type().to_dtype()))
            constant.set_friendly_name(last.get_friendly_name())
            _replace(last, constant.output(0))
            places += 1
    if places:
        model.validate_nodes_and_infer_types()
    return places


def _dequantised(convert: Any, integers: Any) -> tuple[Any, Any]:
    """The numbers behind integers and the node they come out of: the last one that only subtracts or scales them."""
    numbers, node = integers.astype(np.float32), convert
    while True:
        readers = list(node.output(0).get_target_inputs())
        following = readers[0].get_node() if len(readers) == 1 else None
        if following is None or following.get_type_name() not in ("Subtract", "Multiply"):
            return numbers, node
        other = _constant(following.input(1).get_source_output().get_node())
        if other is None or readers[0].get_index() != 0:
            return numbers, node
        numbers = numbers - other if following.get_type_name() == "Subtract" else numbers * other
        node = following


def _constant(node: Any) -> Any:
    """The float32 numbers of a constant, perhaps behind a Convert; ``None`` for anything else."""
    while node.get_type_name() == "Convert":
        node = node.input(0).get_source_output().get_node()
    return node.data.astype(np.float32) if node.get_type_name() == "Constant" else None


def _levels(quantise: Any) -> int:
    return int(quantise.get_attributes()["levels"])


def _replace(node: Any, output: Any) -> None:
    for reader in list(node.output(0).get_target_inputs()):
        reader.replace_source_output(output)
