"""Cost of every layer on an OpenVINO device, by the device's own counters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mtu_compile.core.errors import BuildError, ConfigError
from targets.base import LayerCosts
from targets.costs.layers import Kernel, Layers, attribute
from targets.costs.timing import undisturbed
from targets.openvino.engine import for_device, reason

#: Inferences before the first that counts: the first one packs weights, and takes three times as long as the others.
WARM_UP = 3

#: The kinds of kernels that compute a layer, in OpenVINO's runtime models. Others may carry a layer's name too: a bias
#: that was fused into the next addition instead.
_PRODUCTS = ("Convolution", "Deconvolution", "FullyConnected", "GroupConvolution", "MatMul", "ScaledDotProduct")


@dataclass(frozen=True)
class IR:
    """A graph as its target builds it.

    Attributes:
        path: the IR.
        config: what its engine is opened with, ``"device"`` included.
        layers: of the ONNX graph it was written from.
    """

    path: Path
    config: Mapping[str, str]
    layers: Layers


def measure(irs: Sequence[IR], rounds: int, source: str) -> tuple[LayerCosts, ...]:
    """Run each IR ``rounds`` times, in turns, and attribute the time of each kernel to layers.

    Raises:
        ConfigError: no rounds.
        BuildError: the device does not take an IR, or cannot run it.
    """
    if rounds < 1:
        raise ConfigError(f"{rounds} rounds are too few to measure anything")
    try:
        meters = [_Meter(ir) for ir in irs]
        for index in range(WARM_UP + rounds):
            for meter in meters:
                meter.infer(counts=index >= WARM_UP - 1)
    except RuntimeError as error:
        raise BuildError(f"openvino cannot time the layers: {reason(error)}") from error
    return tuple(meter.costs(source) for meter in meters)


class _Meter:
    """One network compiled with counters on."""

    def __init__(self, ir: IR) -> None:
        import openvino

        config = dict(ir.config)
        device = config.pop("device")
        core = openvino.Core()
        model = core.read_model(str(ir.path))
        for_device(model, device)
        compiled = core.compile_model(model, device, {**config, "PERF_COUNT": "YES"})
        self._averages = device == "CPU"
        self._layers = ir.layers
        self._kernels = read_kernels(compiled.get_runtime_model(), ir.layers)
        self._request = compiled.create_infer_request()
        self._inputs = _inputs(compiled)
        self._runs = 0
        self._shown: list[list[float]] = []

    def infer(self, *, counts: bool) -> None:
        """Run once; with ``counts`` the counters are read afterwards."""
        self._request.infer(self._inputs, share_inputs=True)
        self._runs += 1
        if counts:
            from openvino import ProfilingInfo

            shown = {
                info.node_name: info.real_time.total_seconds() * 1e6
                for info in self._request.profiling_info
                if info.status == ProfilingInfo.Status.EXECUTED
            }
            self._shown.append([shown.get(kernel.name, 0.0) for kernel in self._kernels])

    def costs(self, source: str) -> LayerCosts:
        shown = np.array(self._shown)
        if self._averages:
            spent = undisturbed(*of_each_run(shown, self._runs))
        else:  # each reading is of the last inference
            spent = undisturbed(shown[1:], np.zeros(len(shown) - 1))
        return attribute(self._kernels, (spent / 1e3).tolist(), self._layers, source=source, measured=True)


def of_each_run(averages: NDArray[np.float64], runs: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Microseconds of each run but the first, from averages since the beginning, and how wrong each may be.

    The CPU's counters are such averages, rounded down to whole microseconds (OpenVINO 2026.4.1). Sums over neighbouring
    runs are not more wrong than one run is: the errors cancel.

    Args:
        averages: [read-outs, kernels] after each of the last inferences.
        runs: inferences before the last read-out.
    """
    counts = np.arange(runs - len(averages) + 1, runs + 1, dtype=np.float64)[:, None]
    # n times an average that was rounded down is between 0 and n - 1 too little.
    totals = counts * averages + np.where(averages > 0, (counts - 1) / 2, 0)
    return np.diff(totals, axis=0), counts[1:, 0]


def _inputs(compiled: Any) -> dict[Any, Any]:
    """Numbers of the right shapes: noise, and a timestep in the middle."""
    rng = np.random.default_rng(0)
    found = {}
    for port in compiled.inputs:
        shape = [1 if size.is_dynamic else size.get_length() for size in port.partial_shape]
        dtype = port.element_type.to_dtype()
        if "timestep" in port.names:
            found[port] = np.full(shape, 500, dtype)
        elif np.issubdtype(dtype, np.floating):
            found[port] = rng.standard_normal(shape).astype(dtype)
        else:
            found[port] = np.zeros(shape, dtype)
    return found


def read_kernels(runtime: Any, layers: Layers) -> list[Kernel]:
    """The kernels of a compiled model, by its runtime model (``CompiledModel.get_runtime_model``)."""
    operations = list(runtime.get_ordered_ops())
    multiplies = [_kind(operation).startswith(_PRODUCTS) for operation in operations]
    computed = [
        _original(operation, layers) or (_by_weights(operation, layers) if product else ())
        for operation, product in zip(operations, multiplies, strict=True)
    ]
    # A layer is where its product is; only where no kernel says so, wherever it is named.
    products = {layer for found, product in zip(computed, multiplies, strict=True) if product for layer in found}
    named = [
        found if product else tuple(layer for layer in found if layer not in products)
        for found, product in zip(computed, multiplies, strict=True)
    ]
    return link(operations, named)


def _original(operation: Any, layers: Layers) -> tuple[str, ...]:
    return layers.of(_info(operation, "originalLayersNames").split(","))


def _by_weights(operation: Any, layers: Layers) -> tuple[str, ...]:
    """The layer whose weights a kernel reads.

    A product loses its name where its scale is merged with a Multiply behind it, as query and key have one; the
    rearranged weights keep it ("to_q/MatMul/transpose_b").
    """
    sources = [port.get_source_output().get_node() for port in operation.inputs()[1:]]
    return layers.of(str(source.get_friendly_name()) for source in sources if _constant(source))


def _constant(operation: Any) -> bool:
    """Whether what an operation makes depends on constants alone."""
    sources = [port.get_source_output().get_node() for port in operation.inputs()]
    return all(_constant(source) for source in sources) if sources else _kind(operation) in ("Const", "Constant")


def link(operations: Sequence[Any], layers: Sequence[tuple[str, ...]]) -> list[Kernel]:
    """Kernels of an OpenVINO model's operations, given the layers each computes; constants are left out."""
    places: dict[str, int] = {}
    kernels: list[Kernel] = []
    for operation, found in zip(operations, layers, strict=True):
        name = str(operation.get_friendly_name())
        sources = [port.get_source_output().get_node().get_friendly_name() for port in operation.inputs()]
        reads = tuple(dict.fromkeys(places[source] for source in sources if source in places))
        is_input = not sources and _kind(operation) in ("Parameter", "Input")
        if reads or is_input:
            places[name] = len(kernels)
            kernels.append(Kernel(name, found, reads))
    return kernels


def _kind(operation: Any) -> str:
    return _info(operation, "layerType") or str(operation.get_type_name())


def _info(operation: Any, key: str) -> str:
    """A text OpenVINO wrote on an operation; empty if there is none."""
    information = operation.get_rt_info()
    return str(information[key].astype(str)) if key in information else ""
