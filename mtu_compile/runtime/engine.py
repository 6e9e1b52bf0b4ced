"""Compiled networks behind one small protocol, whichever vendor's runtime runs them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mtu_compile.core import vendors
from mtu_compile.core.errors import TargetError

Array = NDArray[Any]

#: The output of every UNet.
OUTPUT = "out_sample"


@dataclass(frozen=True)
class TensorSpec:
    """An input or output: shape (``None`` where any size goes) and dtype.

    Attributes:
        most: where any batch goes, the largest there is; ``None`` if memory alone sets an end to it.
    """

    name: str
    shape: tuple[int | None, ...]
    dtype: np.dtype[Any]
    most: int | None = None

    def accepts(self, array: Array) -> bool:
        """Whether ``array`` has this dtype and shape."""
        fits = len(array.shape) == len(self.shape) and all(
            wanted in (None, got) for wanted, got in zip(self.shape, array.shape, strict=True)
        )
        return fits and array.dtype == self.dtype and (self.most is None or len(array) <= self.most)

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


class EngineBase(ABC):
    """What the engines of all vendors do alike: they refuse wrong inputs, and say so when they are closed.

    Attributes:
        name: ``folder/file`` of the graph, for messages.
        inputs: what has to be given, by name; set by the engine when it is opened.
        outputs: what comes back, by name; likewise.
        device: what runs the network, in the words of the vendor's runtime, asked after it was opened; likewise.
    """

    inputs: Mapping[str, TensorSpec]
    outputs: Mapping[str, TensorSpec]
    device: str = ""

    def __init__(self, path: Path) -> None:
        self.name = f"{path.parent.name}/{path.name}"
        self._closed = False

    def __call__(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run once; see ``Engine``."""
        if self._closed:
            raise TargetError(f"{self.name} is closed")
        check_inputs(self.name, self.inputs, inputs)
        return self._run(inputs)

    def close(self) -> None:
        """Free the network's memory; a second time does nothing."""
        if not self._closed:
            self._closed = True
            self._free()

    @abstractmethod
    def _run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run on inputs that were checked."""

    @abstractmethod
    def _free(self) -> None:
        """Let go of the network."""


def open_engine(
    kind: str,
    path: Path,
    config: Mapping[str, str],
    prebuilt: Path | None = None,
    *,
    cache: Path | None = None,
    weights: Path | None = None,
) -> Engine:
    """Open a network.

    Args:
        kind: whose runtime: ``"openvino"``, ``"tensorrt"``, ``"tensorrt-rtx"``; ``"onnxruntime"`` and
            ``"openvino-float"`` stand in for the others on a machine without their device.
        path: the portable graph.
        config: the runtime's options, and for OpenVINO ``"device"`` (``"CPU"`` if not said).
        prebuilt: what was built from the graph for this device, if something was.
        cache: folder for what the vendor's runtime compiles while it opens the network, so that the next time is quick.
        weights: the graph's, where they lie in a file that serves other graphs, too.

    Raises:
        ToolchainMissing: the vendor's runtime is not installed.
        TargetError: an unknown kind, a device that is not there, or a file its runtime refuses.
        ConfigError: a device or an option that is not allowed.
    """
    known = vendors.engines()
    if kind not in known:
        raise TargetError(f"engines of kind {kind!r} are not known", hint=f"this mtu-compile runs {', '.join(known)}")
    opener: Callable[..., Engine] = vendors.load(known[kind])
    shared = {} if weights is None else {"weights": weights}
    return opener(path, config, prebuilt, cache, **shared)


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
