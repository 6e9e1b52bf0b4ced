"""IRs with one file of weights: the same numbers as before, and the first opens as it did."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mtu_compile.graph.weight_file import ALIGNMENT
from mtu_compile.runtime.engine import open_engine
from targets.openvino.shared_ir import own_constants, share_constants

F32 = {"INFERENCE_PRECISION_HINT": "f32"}
X = np.random.default_rng(9).standard_normal((2, 64), dtype=np.float32)


def write_ir(folder: Path, own: int, common: int | None = 0, *, fp16: bool = False) -> Path:
    """y = (x · W) · V + W of a branch's body, W from the seed ``common`` and V from ``own``."""
    import openvino
    from openvino import opset13 as ops

    def weight(seed: int) -> Any:
        return ops.constant(np.random.default_rng(seed).standard_normal((64, 64), dtype=np.float32))

    x = ops.parameter([2, 64], np.float32, name="x")
    shared = own + 100 if common is None else common
    y = ops.matmul(ops.matmul(x, weight(shared), False, False), weight(own), False, False)
    chosen = ops.if_op(ops.constant(np.array(True)))
    for set_body, seed in ((chosen.set_then_body, shared + 50), (chosen.set_else_body, own + 50)):
        inner = ops.parameter([2, 64], np.float32)
        result = ops.result(ops.matmul(inner, weight(seed), False, False))
        set_body(openvino.Model([result], [inner], "body"))
    then, other = chosen.get_function(0), chosen.get_function(1)
    chosen.set_input(y.output(0), then.get_parameters()[0], other.get_parameters()[0])
    out = ops.add(y, chosen.set_output(then.get_results()[0], other.get_results()[0]))
    out.output(0).set_names({"y"})
    x.output(0).set_names({"x"})
    folder.mkdir()
    path = folder / "openvino_model.xml"
    openvino.save_model(openvino.Model([ops.result(out)], [x], "net"), str(path), compress_to_fp16=fp16)
    return path


def run(path: Path, weights: Path | None = None) -> np.ndarray[Any, Any]:
    return open_engine("openvino", path, F32, weights=weights)({"x": X})["y"]


@pytest.mark.parametrize("fp16", [False, True])
def test_shared_constants_compute_the_same_bit_for_bit(tmp_path: Path, fp16: bool) -> None:
    paths = [write_ir(tmp_path / name, seed, fp16=fp16) for seed, name in enumerate(("unet", "edit", "sr"), 1)]
    before, sizes = [run(path) for path in paths], [path.with_suffix(".bin").stat().st_size for path in paths]
    assert len({one.tobytes() for one in before}) == 3
    beginning = paths[0].with_suffix(".bin").read_bytes()
    first = paths[0].read_bytes()
    read = share_constants(paths)
    weights = paths[0].with_suffix(".bin")
    assert list(tmp_path.rglob("*.bin")) == [weights]
    weight = 64 * 64 * (2 if fp16 else 4)
    assert read is not None and all(3 * weight < one <= size for one, size in zip(read, sizes, strict=True))
    # of three IRs with two matrices each of their own, and two in common
    assert 4 * weight - 4 * ALIGNMENT < sum(sizes) - weights.stat().st_size <= 4 * weight
    for path, expected in zip(paths, before, strict=True):
        assert run(path, weights).tobytes() == expected.tobytes()
    assert paths[0].read_bytes() == first and weights.read_bytes().startswith(beginning)
    assert run(paths[0]).tobytes() == before[0].tobytes()
    (tmp_path / "alone").mkdir()
    alone = own_constants(paths[2], weights, tmp_path / "alone" / "openvino_model.xml")
    assert run(alone).tobytes() == before[2].tobytes()
    assert alone.with_suffix(".bin").stat().st_size < sizes[2] + 4 * ALIGNMENT


def test_without_enough_in_common_nothing_is_changed(tmp_path: Path) -> None:
    paths = [write_ir(tmp_path / name, seed, None) for seed, name in enumerate(("unet", "edit"), 1)]
    before = {file: file.read_bytes() for file in tmp_path.rglob("*.*")}
    assert share_constants(paths, least_bytes=64 * 64) is None
    assert {file: file.read_bytes() for file in tmp_path.rglob("*.*")} == before
