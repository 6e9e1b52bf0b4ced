"""Do a network's numbers fit float16? Asked of real inputs, before an engine is built that would give NaN.

float16 ends at 65504. Where a graph goes beyond it, what follows is Inf and then NaN, and which node began cannot be
seen from the output. Here the graph that rounds (``passes.simulate_half``) says how large each number is before it is
rounded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

import passes
from mtu_compile.core.errors import NotFiniteError
from mtu_compile.graph import io as graph_io
from mtu_compile.graph import qdq
from mtu_compile.graph.edit import constant_tensor
from mtu_compile.graph.sessions import lean_options
from passes.keep_float import MOVES
from passes.simulate_half import simulate_half
from targets.base import Precision, TargetSpec

Feed = Mapping[str, NDArray[Any]]

#: What rounds to Inf in float16 (half a step above its largest number, 65504).
OVERFLOW = 65520.0

#: What masks attention in float16, instead of float32's lowest number.
LOWEST = float(np.finfo(np.float16).min)

#: How a mask gets to where it masks.
_MASKING = ("Add", "Cast", "Where")

#: How much of float16's range a part of the pipeline may use up on the pictures it is measured on, so that others fit
#: as well. Autoencoders that overflow do so by far: SDXL's reaches 1e5 and more where Stable Diffusion 1.5's stays
#: within hundreds.
MARGIN = 4.0

#: Float types that hold what float16 does not, the more precise first.
WIDE: tuple[Precision, ...] = ("fp32", "bf16")


@dataclass(frozen=True)
class HalfRange:
    """How far the numbers of one graph go.

    Attributes:
        peak: largest magnitude that has to be rounded to float16, on the inputs that were tried.
        node: the ONNX node it comes from, or the graph input.
        overflow: the first node, in graph order, that float16 has no numbers for; ``None`` if all fit.
        overflow_type: its operator.
        overflow_at: which of the inputs it was seen on first.
    """

    peak: float
    node: str
    overflow: str | None = None
    overflow_type: str | None = None
    overflow_at: int | None = None

    def to_json(self) -> dict[str, Any]:
        """For the manifest; all numbers are finite."""
        return {**asdict(self), "peak": min(self.peak, float(np.finfo(np.float32).max))}


def computes_in_half(spec: TargetSpec, precision: Precision) -> bool:
    """Whether a device computes in float16 what a network in ``precision`` does not quantise."""
    return precision == "fp16" or (precision not in WIDE and spec.rest == "fp16")


def half_range(graph: Path, feeds: Sequence[Feed], work: Path) -> HalfRange:
    """Run ``graph`` on each of ``feeds``, rounding to float16 where a device does; else as ``half_ranges``."""
    with half_ranges(graph, work) as measure:
        return measure(feeds)


@contextmanager
def half_ranges(graph: Path, work: Path) -> Iterator[Callable[[Sequence[Feed]], HalfRange]]:
    """What is ``half_range`` for several groups of inputs of one graph, which is opened once.

    Args:
        graph: static ONNX file, float, quantised, or lowered to float16 already.
        work: existing folder for the graph that rounds; what is written there is removed.

    Yields:
        A function of inputs, each of them arrays by input name.

    Raises:
        ModelError, PassError: a graph that cannot be read, or lowered to float16.
    """
    import onnxruntime

    model, probes = _probed(graph)
    path = graph_io.save(model, work / "probed.onnx")
    del model

    def measure(feeds: Sequence[Feed]) -> HalfRange:
        found = HalfRange(0.0, "")
        for index, feed in enumerate(feeds):
            values = session.run([probe.output for probe in probes], dict(feed))
            found = _wider(found, probes, [float(value) for value in values], index)
        return found

    # What is optimised away or fused cannot be looked at.
    options = lean_options(in_files=path.with_name(f"{path.name}.data").exists(), optimise=False)
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        yield measure
    finally:
        path.unlink()
        path.with_name(f"{path.name}.data").unlink(missing_ok=True)


def require_half(found: HalfRange, task: str, spec: TargetSpec, calls: Sequence[tuple[int, float]], steps: int) -> None:
    """``NotFiniteError`` if the UNet of ``task`` overflows float16; names the node, the step, and what helps.

    Args:
        found: measured on the UNet calls of ``calls``.
        calls: step (from 1) and timestep of each of them.
        steps: of the denoising.
    """
    if found.overflow is None or found.overflow_at is None:
        return
    step, timestep = calls[found.overflow_at]
    raise NotFiniteError(
        f"the UNet of task {task!r} overflows float16 in step {step} of {steps} (timestep {timestep:g}): first at node "
        f"{found.overflow!r} ({found.overflow_type}); its numbers reach {found.peak:.3g}, and float16 ends at 65504",
        network="unet",
        task=task,
        step=step,
        hint=what_holds_more(spec),
    )


def part_precision(name: str, found: HalfRange, spec: TargetSpec) -> Precision:
    """What a part of the pipeline is built in on a device whose type is float16: that, or one that holds its numbers.

    The config's ``force_upcast`` does not decide: diffusers sets it for every autoencoder unless told otherwise.

    Raises:
        NotFiniteError: the part overflows, and the target has no wider type.
    """
    if found.peak * MARGIN < OVERFLOW:
        return "fp16"
    wider = next((precision for precision in WIDE if precision in spec.precisions), None)
    if wider is not None or found.overflow is None:
        return wider or "fp16"
    raise NotFiniteError(
        f"the {name.replace('vae_', 'VAE ').replace('_', ' ')} overflows float16, first at node {found.overflow!r} "
        f"({found.overflow_type}); its numbers reach {found.peak:.3g}, and float16 ends at 65504",
        network=name,
        hint=f"target {spec.name!r} has no wider type: take a model whose autoencoder was made to fit (SDXL has one "
        "called fp16-fix), or another target",
    )


def what_holds_more(spec: TargetSpec) -> str:
    """The options of ``build`` that help a target."""
    options = [f"--{precision}" for precision in ("bf16", "fp32") if precision in spec.precisions]
    if options:
        return f"build with {' or '.join(options)}, whose numbers go to 3.4e38"
    return f"target {spec.name!r} computes in float16 only; `mtu-compile targets` lists those with bf16 or fp32"


def more_precise(spec: TargetSpec, precision: str) -> str:
    """The options of ``build`` that are more precise than ``precision`` on a target; empty where there are none."""
    order = ("int4-weights", "int8-weights", "bf16", "fp16", "fp32")
    finer = order[order.index(precision) + 1 :] if precision in order else ()
    return " or ".join(f"--{one}" for one in finer if one in spec.precisions)


@dataclass(frozen=True)
class _Probe:
    """A number that is about to be rounded: who made it, and the output that tells its largest magnitude."""

    node: str
    op_type: str
    output: str


def _probed(graph: Path) -> tuple[ir.Model, list[_Probe]]:
    model = graph_io.load(graph)
    if not any(value.dtype == ir.DataType.FLOAT16 for node in model.graph for value in node.outputs):
        run = passes.builtin().pipeline(("mtu::to-fp16",))
        passes.run_passes(model, run, passes.PassContext())
    # Not once a run: Stable Diffusion 1.5's size has 0.86 billion of them.
    qdq.fold_weights(model)
    simulate_half(model)
    probes: list[_Probe] = []
    seen = _masks(model)
    for cast in list(model.graph):
        source = cast.inputs[0] if cast.op_type == "Cast" else None
        if source is None or cast.outputs[0].dtype != ir.DataType.FLOAT16 or source in seen or source.is_initializer():
            continue
        seen.add(source)
        producer = source.producer()
        probes.append(_probe(model, source, producer, len(probes)))
    return model, probes


def _masks(model: ir.Model) -> set[ir.Value]:
    """What an attention mask of the lowest float has gone into, up to the softmax: it may be -Inf as well."""
    found = {
        value
        for value in model.graph.initializers.values()
        if (tensor := constant_tensor(value)) is not None
        and tensor.dtype == ir.DataType.FLOAT
        and tensor.size
        and float(tensor.numpy().min()) <= LOWEST
    }
    for node in model.graph:
        if (node.op_type in MOVES or node.op_type in _MASKING) and any(value in found for value in node.inputs):
            found.update(node.outputs)
    return found


def _probe(model: ir.Model, source: ir.Value, producer: ir.Node | None, number: int) -> _Probe:
    """Add ReduceMax(Abs(source)) as an output."""
    size = ir.Value(name=f"probe.{number}.abs", type=ir.TensorType(ir.DataType.FLOAT), shape=source.shape)
    most = ir.Value(name=f"probe.{number}", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([]))
    model.graph.append(ir.Node("", "Abs", [source], outputs=[size], name=f"probe.{number}/Abs"))
    keep = [ir.AttrInt64("keepdims", 0)]
    model.graph.append(ir.Node("", "ReduceMax", [size], keep, outputs=[most], name=f"probe.{number}/ReduceMax"))
    model.graph.outputs.append(most)
    assert most.name is not None
    if producer is None:
        return _Probe(source.name or "", "input", most.name)
    return _Probe(producer.name or "", producer.op_type, most.name)


def _wider(found: HalfRange, probes: Sequence[_Probe], values: Sequence[float], index: int) -> HalfRange:
    """``found`` with the magnitudes of one more run."""
    peak, node = found.peak, found.node
    overflow = None
    for probe, value in zip(probes, values, strict=True):
        if overflow is None and not value < OVERFLOW:
            overflow = probe
            # Behind the first overflow there are Inf and NaN only: this is the number that tells something.
            peak, node = (value, probe.node) if math.isfinite(value) and value > peak else (peak, node)
        if overflow is None and value > peak:
            peak, node = value, probe.node
    if overflow is None or found.overflow is not None:
        return HalfRange(peak, node, found.overflow, found.overflow_type, found.overflow_at)
    return HalfRange(peak, node, overflow.node, overflow.op_type, index)
