"""OpenVINO models on one device."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from mtu_compile.core.errors import ConfigError, TargetError, ToolchainMissing
from mtu_compile.runtime import cpu_isa
from mtu_compile.runtime.engine import Array, EngineBase, TensorSpec
from mtu_compile.runtime.task_engine import TASK_INPUT
from targets.openvino.batches import MOST, branches, is_quantised, of_batch
from targets.openvino.mapped import give_back

#: Options a bundle may set. Not all that OpenVINO has: some name folders and files to write or load.
OPENVINO_OPTIONS = frozenset(
    {
        "DYNAMIC_QUANTIZATION_GROUP_SIZE",
        "EXECUTION_MODE_HINT",
        "INFERENCE_NUM_THREADS",
        "INFERENCE_PRECISION_HINT",
        "NUM_STREAMS",
        "PERFORMANCE_HINT",
    }
)
#: OpenVINO devices that choose another device by themselves.
_VIRTUAL_DEVICES = ("AUTO", "MULTI", "HETERO", "BATCH")


#: What brings a device to OpenVINO, where it is not the vendor of the machine alone.
_DRIVERS = {
    "NPU": "an Intel NPU needs its driver: https://github.com/intel/linux-npu-driver on Linux, Intel's on Windows",
    "GPU": "an Intel GPU needs its driver: https://github.com/intel/compute-runtime on Linux, Intel's on Windows",
}

#: Bytes of weights up to which a CPU gets a network compiled for each number of samples, where any number goes. Such
#: networks share no weights. A larger one is compiled once: with a branch for each number if it is quantised, which
#: costs a small network a quarter of its speed; else for any (docs/decisions/0019-batch-of-a-shared-engine.md).
SMALL = 128 << 20

_log = logging.getLogger(__name__)


class OpenVINOEngine(EngineBase):
    """An OpenVINO model (``.xml`` and ``.bin``) on one device, from a blob compiled in advance if it fits.

    A blob its device's driver does not take (another generation, an older driver) is no reason not to run: the model is
    compiled here instead, which takes longer, and ``warnings`` and the log say so. Nothing ever runs on another device
    than the one asked for.

    A model for several tasks whose batch is free has kernels for each number of samples on a CPU: a small one is
    compiled for each when it first comes, and a large one in INT8 has a branch for each. For any number at once the
    kernels are slower.

    Args:
        path: the model.
        config: options of OpenVINO (``OPENVINO_OPTIONS``), and ``"device"`` (``"CPU"`` if not said).
        prebuilt: blob of the model for this device.
        cache: folder to keep what is compiled here in, so that the next time is quick.
        weights: the model's ``.bin``, where that is not beside it under its name.

    Raises:
        ToolchainMissing: OpenVINO is not installed.
        ConfigError: an option that is not allowed, or a device that chooses another by itself.
        TargetError: the device is not there, does not take the model, or another one was used.
    """

    def __init__(
        self,
        path: Path,
        config: Mapping[str, str],
        prebuilt: Path | None = None,
        cache: Path | None = None,
        weights: Path | None = None,
    ) -> None:
        options = dict(config)
        device = options.pop("device", "CPU")
        if device.split(":")[0].split(".")[0].upper() in _VIRTUAL_DEVICES:
            raise ConfigError(
                f"device {device!r} would leave the choice of a device to OpenVINO",
                hint="name the device itself: CPU, GPU or NPU",
            )
        if forbidden := options.keys() - OPENVINO_OPTIONS:
            raise ConfigError(f"an engine may not set the OpenVINO option {min(forbidden)!r}")
        openvino = _import_openvino()
        super().__init__(path)
        self.warnings: tuple[str, ...] = ()
        if device == "CPU" and options.get("INFERENCE_PRECISION_HINT") == "bf16" and not cpu_isa.native_bf16():
            # Else the plugin emulates it: ten times slower on AVX-512, and refused on AVX2 (OpenVINO 2026.4.1).
            options["INFERENCE_PRECISION_HINT"] = "f32"
        core = openvino.Core()
        if device not in core.available_devices:
            what = _DRIVERS.get(device.split(".")[0], "build for one of these, or install its driver")
            raise TargetError(
                f"openvino finds no device {device!r} on this machine",
                hint=f"it finds {', '.join(core.available_devices)}; {what}",
            )
        try:
            model = core.read_model(str(path)) if weights is None else core.read_model(str(path), str(weights))
            for_device(model, device)
            self._prepare(model)
            self._any_batch: Callable[[int], Any] | None = None
            branched, whole = False, model
            if device == "CPU" and _is_shared(model) and model.is_dynamic():
                if weigh(model) <= SMALL:
                    self._any_batch = lambda samples: core.compile_model(of_batch(model, samples), device, options)
                elif branched := self._branches(model):
                    whole = branches(model)
            compiled = None
            if prebuilt is not None:
                compiled = self._import(core, model, device, options, prebuilt)
            if compiled is None and self._any_batch is not None:
                compiled = self._any_batch(1)
            if compiled is None:
                compiled = core.compile_model(whole, device, {**options, **self._caching(device, cache)})
            used = list(compiled.get_property("EXECUTION_DEVICES"))
        except RuntimeError as error:
            raise TargetError(f"openvino cannot load {self.name} on {device}: {reason(error)}") from error
        if any(part.split(".")[0] != device.split(".")[0] for part in used) or not used:
            raise TargetError(f"openvino put {self.name} on {', '.join(used)} instead of {device}")
        self.device = f"{', '.join(used)}: {core.get_property(device, 'FULL_DEVICE_NAME')}"
        # Not those of the compiled model: to its ports clings what nodes that were optimised away were called.
        self.inputs = {spec.name: spec for spec in map(_spec, model.inputs)}
        if self._any_batch is not None or branched:
            self.inputs = {
                name: spec if spec.shape[0] is not None else replace(spec, most=MOST)
                for name, spec in self.inputs.items()
            }
        self.outputs = {spec.name: spec for spec in map(_spec, model.outputs)}
        #: What the CPU's kernels have copies of.
        self._copied = (weights or path.with_suffix(".bin")) if device == "CPU" else None
        self._give_back()
        #: By number of samples; under ``None`` for any.
        self._requests: dict[int | None, Any] = {
            None if self._any_batch is None else 1: compiled.create_infer_request()
        }

    def _prepare(self, model: Any) -> None:
        """Change a model that was read before it is compiled; one that runs as it is needs nothing."""

    def _branches(self, model: Any) -> bool:
        """Whether a large model that was prepared, whose batch is free, is compiled with a branch for each batch."""
        return is_quantised(model)

    def _import(self, core: Any, model: Any, device: str, options: Mapping[str, str], blob: Path) -> Any:
        """The compiled model in ``blob``, or ``None`` with a warning if it is not usable here."""
        from openvino import Tensor

        try:
            # Mapped, not read: a UNet's blob has a gigabyte, and the plugin makes its own copy.
            compiled = core.import_model(Tensor(np.memmap(blob, dtype=np.uint8, mode="c")), device, dict(options))
        except (RuntimeError, OSError, ValueError) as error:
            return self._warn(
                f"{device} does not take {blob.parent.name}/{blob.name}, so {self.name} is compiled here", error
            )
        if _interface(compiled) != _interface(model):
            return self._warn(f"{blob.parent.name}/{blob.name} is not of {self.name}, which is compiled here instead")
        return compiled

    def _caching(self, device: str, cache: Path | None) -> dict[str, str]:
        if cache is None or cache.is_symlink() or device.split(".")[0] == "CPU":
            return {}
        try:
            cache.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            self._warn(f"what is compiled for {device} cannot be kept in {cache}", error)
            return {}
        return {"CACHE_DIR": str(cache)}

    def _warn(self, text: str, error: BaseException | None = None) -> None:
        text = text if error is None else f"{text}: {reason(error)}"
        self.warnings = (*self.warnings, text)
        _log.warning(text)

    def _run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        try:
            # The inputs are read where they are; the outputs are copied, as the request writes over its own next time.
            results = self._request(inputs).infer(dict(inputs), share_inputs=True, share_outputs=False)
        except RuntimeError as error:
            raise TargetError(f"openvino cannot run {self.name}: {reason(error)}") from error
        return {name: results[index] for index, name in enumerate(self.outputs)}

    def _request(self, inputs: Mapping[str, Array]) -> Any:
        """What runs as many samples as these are; compiled if it is the first time."""
        if self._any_batch is None:
            return self._requests[None]
        samples = len(inputs["sample"])
        if samples not in self._requests:
            self._requests[samples] = self._any_batch(samples).create_infer_request()
            self._give_back()
        return self._requests[samples]

    def _give_back(self) -> None:
        if self._copied is not None:
            give_back(self._copied)

    def _free(self) -> None:
        self._requests.clear()
        self._any_batch = None


def for_device(model: Any, device: str) -> None:
    """Give a model that was read from a file the inputs it is run with on a device, in place.

    ``timestep`` becomes float32 again; and for an NPU, which takes fixed shapes only, dynamic dimensions become 1 (the
    text encoder's batch: one prompt at a time).
    """
    from openvino import Dimension, PartialShape

    fractional_timesteps(model)
    for port in model.inputs:
        if device.split(".")[0] == "NPU" and port.partial_shape.is_dynamic:
            sizes = [Dimension(1) if size.is_dynamic else size for size in port.partial_shape]
            port.get_node().set_partial_shape(PartialShape(sizes))
    model.validate_nodes_and_infer_types()


def _is_shared(model: Any) -> bool:
    """Whether the task of each sample is an input."""
    return any(TASK_INPUT in port.names for port in model.inputs)


def weigh(model: Any, types: Collection[str] | None = None) -> int:
    """Bytes of a model's constants; of those of ``types`` (``"i8"``), if given."""
    constants = (node.output(0) for node in model.get_ops() if node.get_type_name() == "Constant")
    sizes = ((math.prod(one.get_shape()), one.get_element_type()) for one in constants)
    return sum(n * int(kind.size) for n, kind in sizes if types is None or kind.get_type_name() in types)


def fractional_timesteps(model: Any) -> None:
    """Make the input ``timestep`` of a model that was read float32, as some samplers stop between two timesteps.

    Files say int64: OpenVINO GenAI gives a UNet nothing else. What they convert it to at once is float32.
    """
    from openvino import Type

    for port in model.inputs:
        if "timestep" in port.names:
            port.get_node().set_element_type(Type.f32)
    model.validate_nodes_and_infer_types()


def _interface(model: Any) -> tuple[frozenset[str], ...]:
    """Inputs and outputs in a form that compares: the same names, shapes and types in any order."""
    return tuple(frozenset(f"{s.name} {s}" for s in map(_spec, ports)) for ports in (model.inputs, model.outputs))


def _import_openvino() -> Any:
    try:
        import openvino
    except ImportError as error:
        raise ToolchainMissing(
            f"this bundle runs on OpenVINO, which is not installed ({error})",
            hint="pip install 'mtu-compile[openvino]'",
        ) from error
    return openvino


def _spec(port: Any) -> TensorSpec:
    shape = tuple(None if size.is_dynamic else size.get_length() for size in port.partial_shape)
    return TensorSpec(port_name(port), shape, np.dtype(port.element_type.to_dtype()))


def port_name(port: Any) -> str:
    """What an OpenVINO input or output is called.

    A tensor may have several names, in no fixed order: its own, and those of operations that a converter left out of
    the graph ("33").
    """
    name = str(port.node.friendly_name)
    if not port.names or name in port.names:
        return name
    return str(min(port.names, key=lambda name: (not name.isidentifier(), name)))


def reason(error: BaseException) -> str:
    """The line of an OpenVINO exception that says why; the others are headings and places in its C++ code."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if not line.startswith(("Exception from", "Check '")) and line[-1] != ":"]
    findings = [line.removeprefix("-- ") for line in telling if line.startswith("-- ")]
    return (findings or telling or lines or [type(error).__name__])[0]
