"""ONNX → OpenVINO IR: what every OpenVINO device needs before its own compile step."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mtu_compile.core.errors import BuildError
from targets.base import Availability, require_graph
from targets.openvino.engine import reason
from targets.openvino.names import name_nodes
from targets.openvino.shared_ir import own_constants

if TYPE_CHECKING:
    import openvino

INSTALL_HINT = "pip install 'mtu-compile[openvino]'"

#: File names that optimum-intel and OpenVINO GenAI look for in a model's folder.
IR_NAME = "openvino_model.xml"

#: What a device's own compiler makes of the IR, beside it.
BLOB_NAME = "openvino_model.blob"

#: Operations that only move a tensor's elements.
_MOVES = frozenset({"Broadcast", "Reshape", "Squeeze", "Unsqueeze", "Convert"})


def probe_openvino(device: str) -> Availability:
    """Whether ``openvino`` can be imported and knows ``device`` (``"CPU"``, ``"GPU"``, ``"NPU"``)."""
    try:
        import openvino
    except ImportError as error:
        return Availability(False, "openvino", None, INSTALL_HINT, str(error))
    version = openvino.__version__.split("-")[0]
    try:
        detail = str(openvino.Core().get_property(device, "FULL_DEVICE_NAME")).strip()
    except RuntimeError as error:
        return Availability(False, "openvino", version, INSTALL_HINT, reason(error))
    return Availability(True, "openvino", version, INSTALL_HINT, detail)


def read_graph(graph: Path) -> openvino.Model:
    """Read an ONNX file (or an IR).

    Raises:
        ModelError: there is no such file.
        BuildError: OpenVINO cannot import it, with its reason.
    """
    import openvino

    require_graph(graph)
    try:
        return openvino.Core().read_model(str(graph))
    except RuntimeError as error:
        raise BuildError(f"openvino cannot import {graph.name}: {reason(error)}") from error


def write_ir(model: openvino.Model, folder: Path, *, fp16_weights: bool) -> Path:
    """Write ``openvino_model.xml`` and ``.bin`` into the existing ``folder`` and return the path of the former.

    With ``fp16_weights`` float constants are stored in half the space, except those behind ``keep_angles_precise``.
    The same graph is the same file, whatever the process did before.
    """
    import openvino

    path = folder / IR_NAME
    name_nodes(model)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        written = Path(scratch) / "wide.xml"
        try:
            openvino.save_model(model, str(written), compress_to_fp16=False)
            if fp16_weights:
                # Precision marks set from Python only become attributes that OpenVINO obeys once they were read from an
                # IR; compressing the model in memory would round the marked constants too (2026.4.1).
                wide, written = written, written.with_name("half.xml")
                openvino.save_model(openvino.Core().read_model(str(wide)), str(written), compress_to_fp16=True)
        except RuntimeError as error:
            raise BuildError(f"openvino cannot write {path}: {reason(error)}", hint="is the disk full?") from error
        return own_constants(written, written.with_suffix(".bin"), path)


def keep_angles_precise(model: openvino.Model) -> int:
    """Compute the angles of sinusoidal embeddings in float32 whatever the inference precision; returns how many.

    In bfloat16 timestep 999 is 1000, and an angle near 1000 rad is off by up to 4: on a small UNet of the Stable
    Diffusion kind the output's SQNR in bf16 falls from 39 dB at timestep 3 to 26 dB at 999; with this rewrite it is 38
    to 40 dB at every timestep (OpenVINO 2026.4.1, CPU).

    Given::

        Parameter → {Broadcast | Unsqueeze | Reshape | …}* → Multiply(constant) → Sin, Cos

    Result: the data movement, which OpenVINO insists on running in the low precision, is gone, and what is left is
    marked to keep its precision::

        Parameter [1] → Multiply(constant, repeated) → Sin, Cos          (one value, the timestep)
        Parameter → Reshape → Multiply(constant) → Sin, Cos              (as many values as the Multiply reads)

    A Multiply between other shapes, or of dynamic shape, is left as it is.
    """
    angles: dict[str, Any] = {}
    for node in model.get_ops():
        if node.get_type_name() in ("Sin", "Cos"):
            source = node.input(0).get_source_output().get_node()
            if source.get_type_name() == "Multiply":
                angles.setdefault(source.get_friendly_name(), source)
    count = sum(_rewrite_angle(multiply) for multiply in angles.values())
    if count:
        model.validate_nodes_and_infer_types()
    return count


def _rewrite_angle(multiply: Any) -> bool:
    import numpy as np
    from openvino import opset13 as ops

    sources = [port.get_source_output().get_node() for port in multiply.inputs()]
    constants = [index for index, node in enumerate(sources) if node.get_type_name() == "Constant"]
    if len(constants) != 1 or multiply.output(0).partial_shape.is_dynamic:
        return False
    constant, moved = sources[constants[0]], sources[1 - constants[0]]
    parameter = moved
    while parameter.get_type_name() in _MOVES:
        parameter = parameter.input(0).get_source_output().get_node()
    if parameter.get_type_name() != "Parameter" or parameter.output(0).partial_shape.is_dynamic:
        return False
    if str(parameter.get_output_element_type(0)) != str(multiply.get_output_element_type(0)):
        return False
    values, wanted = math.prod(parameter.output(0).shape), list(moved.output(0).shape)
    if values == 1:
        table = np.ascontiguousarray(np.broadcast_to(constant.data, tuple(multiply.output(0).shape)))
        factor: Any = ops.constant(table)
        source: Any = parameter
        extra = [factor]
    elif values == math.prod(wanted):
        factor = constant
        source = ops.reshape(parameter, ops.constant(np.array(wanted, dtype=np.int64)), False)
        extra = [source, factor]
    else:
        return False
    angle = ops.multiply(source, factor)
    angle.set_friendly_name(multiply.get_friendly_name())
    consumers = list(multiply.output(0).get_target_inputs())
    for port in consumers:
        port.replace_source_output(angle.output(0))
    for node in (*extra, angle, *(port.get_node() for port in consumers)):
        node.get_rt_info()["precise_0"] = ""
    return True


def free_batch(model: openvino.Model) -> bool:
    """Let a static model be given another batch with ``reshape``; what it computes at its own stays the same.

    OpenVINO GenAI sizes a network for its own kinds of guidance (one sample, or two), and a frozen graph has the batch
    written into every ``Reshape``, and the timestep repeated to it.

    Given::

        Reshape(x, [B, C, H, W])      Broadcast(timestep [1], [B])      GatherND(x, Concat([0 … B - 1], indices))

    Result::

        Reshape(x, [-1, C, H, W])     timestep [1]                      GatherND(x, indices, batch_dims=1)

    The additions behind the timestep's embedding repeat it.

    Returns:
        Whether the model now takes other batches. Where its anatomy does not allow that (a dynamic model, samples that
        are mixed), it is as good as it was for its own batch.
    """
    import numpy as np
    from openvino import opset13 as ops

    if any(port.partial_shape.is_dynamic for port in model.inputs):
        return False
    batches = {port.shape[0] for port in model.inputs if len(port.shape) > 1}
    if len(batches) != 1:
        return False
    batch = batches.pop()
    for node in model.get_ordered_ops():
        kind = node.get_type_name()
        if kind == "GatherND":
            _gather_by_sample(node, batch)
        if kind not in ("Reshape", "Broadcast") or node.output(0).partial_shape.is_dynamic:
            continue
        source, shape = node.input(0).get_source_output(), list(node.output(0).shape)
        if not shape or source.get_node().get_type_name() == "Constant":
            continue
        if kind == "Broadcast":
            if shape == [batch] and list(source.shape) == [1]:
                for reader in list(node.output(0).get_target_inputs()):
                    reader.replace_source_output(source)
            continue
        pattern = ops.constant(np.array([-1, *shape[1:]], dtype=np.int64))
        node.input(1).replace_source_output(pattern.output(0))
    model.validate_nodes_and_infer_types()
    return all(_takes_batch(model, other) for other in (1, batch + 1))


def _gather_by_sample(gather: Any, batch: int) -> None:
    """Let a ``GatherND`` count samples itself where a constant [0 … B - 1] tells it which one each index is for."""
    import numpy as np
    from openvino import opset13 as ops

    concat = gather.input(1).get_source_output().get_node()
    if concat.get_type_name() != "Concat" or concat.get_input_size() != 2 or gather.get_attributes()["batch_dims"]:
        return
    numbers, indices = (port.get_source_output() for port in concat.inputs())
    column = numbers.get_node()
    if column.get_type_name() != "Constant" or list(numbers.shape) != [batch, 1] or len(indices.shape) != 2:
        return
    if not np.array_equal(column.data.ravel(), np.arange(batch)):
        return
    counted = ops.gather_nd(gather.input(0).get_source_output(), indices, batch_dims=1)
    counted.set_friendly_name(gather.get_friendly_name())
    names = set(gather.output(0).names)
    gather.output(0).set_names(set())
    for reader in list(gather.output(0).get_target_inputs()):
        reader.replace_source_output(counted.output(0))
    counted.output(0).set_names(names)


def any_number_of_prompts(model: openvino.Model) -> None:
    """Leave the batch of a text encoder open, whose ``free_batch`` is done: there may be one prompt or two."""
    inputs = {port.get_any_name(): port for port in model.inputs}
    if set(inputs) == {"input_ids"}:
        model.reshape({"input_ids": [-1, inputs["input_ids"].shape[1]]})


def _takes_batch(model: openvino.Model, batch: int) -> bool:
    """Whether every output follows when the inputs are given another batch."""
    changed = model.clone()
    shapes = {port: list(port.shape) for port in changed.inputs}
    try:
        changed.reshape({port: [batch, *shape[1:]] if len(shape) > 1 else shape for port, shape in shapes.items()})
    except RuntimeError:
        return False
    return all(port.partial_shape.is_static and port.shape[0] == batch for port in changed.outputs)


def whole_timesteps(model: openvino.Model) -> bool:
    """Make the input ``timestep`` int64, converted to float32 inside; returns whether there was one to change.

    That is how optimum-intel exports a UNet, and OpenVINO GenAI gives nothing else. ``OpenVINOEngine`` turns it back
    when it opens the file, as some samplers stop between two timesteps.
    """
    import openvino
    from openvino import opset13 as ops

    for port in model.inputs:
        if "timestep" not in port.names or port.get_element_type() != openvino.Type.f32:
            continue
        parameter = port.get_node()
        readers = list(parameter.output(0).get_target_inputs())
        parameter.set_element_type(openvino.Type.i64)
        convert = ops.convert(parameter, "f32")
        # In bfloat16 timestep 999 would be 1000 (see keep_angles_precise).
        convert.get_rt_info()["precise_0"] = ""
        for reader in readers:
            reader.replace_source_output(convert.output(0))
        model.validate_nodes_and_infer_types()
        return True
    return False


def prove_compiles(path: Path, device: str, config: dict[str, str]) -> None:
    """Compile the IR once; ``BuildError`` with the plugin's reason if the device refuses it."""
    import openvino

    try:
        openvino.Core().compile_model(str(path), device, config)
    except RuntimeError as error:
        raise BuildError(f"openvino cannot compile {path.name} for {device}: {reason(error)}") from error
