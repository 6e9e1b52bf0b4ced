"""Our graphs are ordinary ONNX: graphsurgeon reads and writes them, and Polygraphy's tools work on them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnx_graphsurgeon as gs
import pytest

import passes
from calibration.quant_settings import QuantSettings
from calibration.quantize import quantize_onnx

SETTINGS = {"task_id": 0, "channels": 4, "batch": 2, "height": 8, "width": 4, "text_length": 5}
KINDS = ("specialised", "qdq", "fp16", "bf16", "qdq-fp16")


@pytest.fixture(scope="module")
def graphs(exported: Any, random_feeds: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A UNet in each form that a target is given."""
    folder = tmp_path_factory.mktemp("forms")
    paths = {kind: folder / f"{kind}.onnx" for kind in KINDS}
    passes.specialise(exported("micro"), paths["specialised"], **SETTINGS)
    feeds = [random_feeds(paths["specialised"], batch=2, channels=4)]
    quantize_onnx(paths["specialised"], feeds, paths["qdq"], settings=QuantSettings(smooth_quant_alpha=None))
    for kind, source, lowering in (
        ("fp16", "specialised", ("mtu::to-fp16",)),
        ("bf16", "specialised", ("mtu::to-bf16",)),
        ("qdq-fp16", "qdq", ("mtu::legalise-qdq", "mtu::to-fp16")),
    ):
        context = passes.PassContext(original=paths["specialised"])
        passes.run_pipeline(paths[source], paths[kind], lowering, context)
    return paths


@pytest.fixture
def results(run_graph: Any, random_feeds: Any, tmp_path: Path) -> Callable[[Path], Any]:
    """Outputs of a graph; of one in bfloat16, which ONNX Runtime's CPU has not, those of its float32 simulation."""

    def run(path: Path) -> Any:
        simulated = passes.write_simulation(path, tmp_path / f"simulated-{path.name}") if "bf16" in path.name else path
        return run_graph(simulated, random_feeds(path, batch=2, channels=4))

    return run


@pytest.mark.parametrize("kind", KINDS)
def test_graphsurgeon_reads_and_writes_it_unchanged(
    kind: str, graphs: dict[str, Path], results: Any, assert_close: Any, tmp_path: Path
) -> None:
    written = tmp_path / f"{kind}.onnx"
    onnx.save(gs.export_onnx(gs.import_onnx(onnx.load(graphs[kind])).cleanup().toposort()), written)
    assert_close(results(written), results(graphs[kind]), tolerance=0)


@pytest.mark.parametrize("kind", KINDS)
def test_polygraphys_tools_work_on_it(
    kind: str,
    graphs: dict[str, Path],
    results: Any,
    assert_close: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    from polygraphy.tools import main

    def polygraphy(*arguments: str | Path) -> str:
        monkeypatch.setattr(sys, "argv", ["polygraphy", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            raise SystemExit(main())
        out, err = capfd.readouterr()
        assert not ended.value.code, out + err
        return out

    said = polygraphy("inspect", "model", graphs[kind], "--show", "layers")
    assert "ONNX Model" in said and "out_sample" in said and "MatMul" in said
    sanitised = tmp_path / f"{kind}.onnx"
    polygraphy("surgeon", "sanitize", graphs[kind], "--cleanup", "--toposort", "-o", sanitised)
    assert_close(results(sanitised), results(graphs[kind]), tolerance=0)
