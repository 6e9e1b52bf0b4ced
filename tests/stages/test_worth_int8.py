"""A network of which INT8 serves no layer is refused, instead of a quantised one without quantisers."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import targets
from mtu_compile.core.errors import BuildError
from mtu_compile.stages import precision
from mtu_compile.stages.job import QuantRecipe


def test_where_every_layer_is_slower_in_int8_the_build_says_so(tmp_path: Path) -> None:
    unet: Any = SimpleNamespace(graph=tmp_path / "model.onnx", label="t2i", shared=False)
    report = SimpleNamespace(layers={"Conv": (2, 3), "MatMul": (1, 1)})
    chosen = {"t2i": SimpleNamespace(float_layers=("conv_1", "conv_2", "linear"))}
    results = {
        "int8_unet": SimpleNamespace(graph=tmp_path / "int8.onnx", report=report),
        "known_errors": None,
        "chosen_layers": chosen,
    }
    steps: Any = SimpleNamespace(run=lambda call: results[call.step.name])
    with pytest.raises(BuildError, match="no layer of t2i is worth INT8 on onnxruntime") as caught:
        precision.quantise(steps, targets.get("onnxruntime"), "int8", unet, {}, QuantRecipe())
    assert "--no-mixed-precision" in str(caught.value.hint)
