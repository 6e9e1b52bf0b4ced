"""Compiled networks behind one small protocol, whichever vendor's runtime runs them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mtu_compile.core.errors import ConfigError, TargetError, ToolchainMissing

Array = NDArray[Any]

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


@dataclass(frozen=True)
class TensorSpec:
    """An input or output: shape (``None`` where any size goes) and dtype."""

    name: str
    shape: tuple[int | None, ...]
    dtype: np.dtype[Any]

    def accepts(self, array: Array) -> bool:
        """Whether ``array`` has this dtype and shape."""
        fits = len(array.shape) == len(self.shape) and all(
            wanted in (None, got) for wanted, got in zip(self.shape, array.shape, strict=True)
        )
        return fits and array.dtype == self.dtype

    def __str__(self) -> str:
        return f"{self.dtype} [{', '.join('?' if size is None else str(size) for size in self.shape)}]"


class Engine(Protocol):
    """A compiled network."""

    @property
    def inputs(self) -> Mapping[str, TensorSpec]:
        """What has to be given, by name."""
        ...

    @property
    def outputs(self) -> Mapping[str, TensorSpec]:
        """What comes back, by name."""
        ...

    def __call__(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run once; the arrays returned belong to the caller. ``TargetError`` if the inputs are not what it takes."""
        ...

    def close(self) -> None:
        """Free the network's memory."""
        ...


def open_engine(kind: str, path: Path, config: Mapping[str, str]) -> Engine:
    """Open a compiled network.

    Args:
        kind: ``"openvino"``.
        path: the file the vendor's runtime opens.
        config: its options, and ``"device"`` (``"CPU"`` if not said).

    Raises:
        ToolchainMissing: the vendor's runtime is not installed.
        TargetError: an unknown kind, a device that is not there, or a file its runtime refuses.
        ConfigError: a device or an option that is not allowed.
    """
    openers: dict[str, Callable[[Path, Mapping[str, str]], Engine]] = {"openvino": OpenVINOEngine}
    if kind not in openers:
        raise TargetError(f"engines of kind {kind!r} are not known", hint=f"this mtu-compile runs {', '.join(openers)}")
    return openers[kind](path, config)


def check_inputs(name: str, specs: Mapping[str, TensorSpec], inputs: Mapping[str, Array]) -> None:
    """``TargetError`` unless ``inputs`` are exactly what ``specs`` describe; nothing is ever converted silently."""
    if missing := specs.keys() - inputs.keys():
        raise TargetError(f"{name} needs an input {min(missing)!r}, which was not given")
    if unknown := inputs.keys() - specs.keys():
        raise TargetError(f"{name} has no input {min(unknown)!r}; it takes {', '.join(specs)}")
    for key, spec in specs.items():
        array = inputs[key]
        if not spec.accepts(array):
            raise TargetError(f"{name} takes {key!r} as {spec}, and was given {array.dtype} {list(array.shape)}")


class OpenVINOEngine:
    """An OpenVINO model (``.xml`` with its ``.bin``) on one device.

    See ``open_engine`` for the arguments and what is raised.
    """

    def __init__(self, path: Path, config: Mapping[str, str]) -> None:
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
        self._name = f"{path.parent.name}/{path.name}"
        core = openvino.Core()
        if device not in core.available_devices:
            raise TargetError(
                f"openvino finds no device {device!r} on this machine",
                hint=f"it finds {', '.join(core.available_devices)}; build for one of these, or install its driver",
            )
        try:
            compiled = core.compile_model(str(path), device, options)
            used = list(compiled.get_property("EXECUTION_DEVICES"))
        except RuntimeError as error:
            raise TargetError(f"openvino cannot load {self._name} on {device}: {reason(error)}") from error
        if any(part.split(".")[0] != device.split(".")[0] for part in used) or not used:
            raise TargetError(f"openvino put {self._name} on {', '.join(used)} instead of {device}")
        self._inputs = {spec.name: spec for spec in map(_spec, compiled.inputs)}
        self._outputs = {spec.name: spec for spec in map(_spec, compiled.outputs)}
        self._request: Any = compiled.create_infer_request()

    @property
    def inputs(self) -> Mapping[str, TensorSpec]:
        return self._inputs

    @property
    def outputs(self) -> Mapping[str, TensorSpec]:
        return self._outputs

    def __call__(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        if self._request is None:
            raise TargetError(f"{self._name} is closed")
        check_inputs(self._name, self._inputs, inputs)
        try:
            # The inputs are read where they are; the outputs are copied, as the request writes over its own next time.
            results = self._request.infer(dict(inputs), share_inputs=True, share_outputs=False)
        except RuntimeError as error:
            raise TargetError(f"openvino cannot run {self._name}: {reason(error)}") from error
        return {name: results[index] for index, name in enumerate(self._outputs)}

    def close(self) -> None:
        self._request = None


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

    A tensor may have several names, in no fixed order: the one a person gave, and those a converter left ("33").
    """
    if not port.names:
        return str(port.node.friendly_name)
    return str(min(port.names, key=lambda name: (not name.isidentifier(), name)))


def reason(error: BaseException) -> str:
    """The line of an OpenVINO exception that says why; the others are headings and places in its C++ code."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if not line.startswith(("Exception from", "Check '")) and line[-1] != ":"]
    findings = [line.removeprefix("-- ") for line in telling if line.startswith("-- ")]
    return (findings or telling or lines or [type(error).__name__])[0]
