"""Any engine of the runtime as a Polygraphy runner, so that what is compared is what will run."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, cast

from polygraphy import util
from polygraphy.backend.base import BaseRunner
from polygraphy.common import TensorMetadata
from polygraphy.datatype import DataType

from mtu_compile.runtime.engine import Array, Engine


class EngineRunner(BaseRunner):  # type: ignore[misc]
    """Runs an engine.

    Args:
        engine: an engine, which stays open, or a callable that opens one, which is closed with the runner.
        name: Polygraphy's name of the runner.
    """

    def __init__(self, engine: Engine | Callable[[], Engine], *, name: str | None = None) -> None:
        super().__init__(name=name, prefix="engine-runner")
        # An engine is callable too; only an engine says what its inputs are.
        self._owned = not hasattr(engine, "inputs")
        self._opener = cast("Callable[[], Engine]", engine if self._owned else lambda: engine)
        self._engine: Engine | None = None

    @util.check_called_by("activate")  # type: ignore[untyped-decorator,unused-ignore]
    def activate_impl(self) -> None:
        """Open the engine, if it is not open."""
        self._engine = self._opener()

    @util.check_called_by("get_input_metadata")  # type: ignore[untyped-decorator,unused-ignore]
    def get_input_metadata_impl(self) -> TensorMetadata:
        """Names, types and shapes of the inputs; dynamic dimensions are ``None``."""
        assert self._engine is not None
        metadata = TensorMetadata()
        for spec in self._engine.inputs.values():
            metadata.add(spec.name, dtype=DataType.from_dtype(spec.dtype, "numpy"), shape=list(spec.shape))
        return metadata

    @util.check_called_by("infer")  # type: ignore[untyped-decorator,unused-ignore]
    def infer_impl(self, feed_dict: Mapping[str, Array]) -> OrderedDict[str, Any]:
        """Run once; sets ``inference_time``, in seconds."""
        assert self._engine is not None
        began = time.perf_counter()
        outputs = self._engine(feed_dict)
        self.inference_time = time.perf_counter() - began
        return OrderedDict(outputs)

    @util.check_called_by("deactivate")  # type: ignore[untyped-decorator,unused-ignore]
    def deactivate_impl(self) -> None:
        """Close the engine if this runner opened it."""
        if self._engine is not None and self._owned:
            self._engine.close()
        self._engine = None
