"""One task of a shared graph, written for tools that know no input ``task``: the same numbers, in both formats."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import passes
import targets
from mtu_compile.core.errors import ModelError
from mtu_compile.core.tasks import PAPER_TASKS
from mtu_compile.graph.one_task import bind_onnx
from mtu_compile.model import export
from mtu_compile.runtime.engine import Engine, open_engine
from mtu_compile.runtime.task_engine import TaskEngine
from targets.openvino.one_task import bind_ir
from tests.conftest import MadeOnce

TEXT, LATENT = 5, 8
F32 = {"device": "CPU", "INFERENCE_PRECISION_HINT": "f32"}
SHAPE = {"height": LATENT, "width": LATENT, "text_length": TEXT}


@pytest.fixture(scope="module")
def shared(tiny_mtu: Any, made_once: MadeOnce, shared_exports: Path) -> Path:
    """Folder with the graph of all tasks: for any batch and for one sample, as ONNX and as IR."""

    def make(folder: Path) -> None:
        dynamic = export.export_unet(tiny_mtu(), folder / "dynamic", text_length=TEXT)
        free, one = folder / "free.onnx", folder / "one.onnx"
        passes.run_pipeline(dynamic, free, passes.SHARED_PIPELINE, passes.PassContext(**SHAPE))
        passes.run_pipeline(free, one, ("mtu::freeze-shapes",), passes.PassContext(batch=1))  # just before it is built
        for graph in (free, one):
            targets.get("cpu").build(graph, folder / graph.stem, precision="fp32")

    return made_once("one-task", make)


def inputs(engine: Engine, channels: int, batch: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(channels)
    text = engine.inputs["encoder_hidden_states"].shape[-1]
    return {
        "sample": rng.standard_normal((batch, channels, LATENT, LATENT)).astype(np.float32),
        "timestep": np.array([321], engine.inputs["timestep"].dtype),
        "encoder_hidden_states": rng.standard_normal((batch, TEXT, text)).astype(np.float32),
    }


def far(ours: np.ndarray, theirs: np.ndarray) -> float:
    assert ours.shape == theirs.shape
    return float(abs(ours - theirs).max() / abs(theirs).max())


@pytest.mark.parametrize("name", ["free", "one"])
def test_a_bound_graph_computes_what_the_shared_one_does(shared: Path, tmp_path: Path, name: str) -> None:
    """Whatever number of samples that runs at a time, an IR takes those of a step at once, as a static one does."""
    whole = open_engine("openvino", shared / name / "openvino_model.xml", F32, None)
    results = {}
    for task_id, task in enumerate(PAPER_TASKS):
        channels, batch = 4 + task.condition_channels(4), task.unet_batch
        folder = tmp_path / task.name
        folder.mkdir()
        ir = bind_ir(shared / name / "openvino_model.xml", folder, task_id=task_id, channels=channels, batch=batch)
        bind_onnx(shared / "free.onnx", folder / "model.onnx", task_id=task_id, channels=channels)
        bound = open_engine("openvino", ir, F32, None)
        portable = open_engine("onnxruntime", folder / "model.onnx", {}, None)
        given = inputs(bound, channels, batch)
        expected = TaskEngine(whole, task_id, channels)(given)["out_sample"]
        assert bound.inputs["sample"].shape[0] == batch
        for engine in (bound, portable):
            assert set(engine.inputs) == set(given) and engine.inputs["sample"].shape[1] == channels
            timestep = given["timestep"].astype(engine.inputs["timestep"].dtype)
            assert far(engine({**given, "timestep": timestep})["out_sample"], expected) < 1e-5
        results[task.name] = (given, expected, bound)
    # The comparison above sees a wrong task: editing and super-resolution have the same inputs.
    given, expected, _ = results["sr"]
    three = {key: value if key == "timestep" else value.repeat(3, axis=0) for key, value in given.items()}
    assert far(results["edit"][2](three)["out_sample"][:1], expected) > 1e-2


def test_a_graph_that_knows_no_task_is_refused(shared: Path, tmp_path: Path) -> None:
    static = tmp_path / "static.onnx"
    passes.specialise(shared / "dynamic" / "model.onnx", static, task_id=0, channels=4, batch=1, **SHAPE)
    built = targets.get("cpu").build(static, tmp_path / "static", precision="fp32")
    with pytest.raises(ModelError, match="has no inputs 'sample' and 'task'"):
        bind_onnx(static, tmp_path / "out.onnx", task_id=0, channels=4)
    with pytest.raises(ModelError, match="has no inputs 'sample' and 'task'"):
        bind_ir(built.path, tmp_path, task_id=0, channels=4, batch=1)
    with pytest.raises(ModelError, match="takes 9 channels, and the task has 10"):
        bind_ir(shared / "free" / "openvino_model.xml", tmp_path, task_id=0, channels=10, batch=1)
    with pytest.raises(ModelError, match="takes 9 channels, and the task has 10"):
        bind_onnx(shared / "free.onnx", tmp_path / "out.onnx", task_id=0, channels=10)
    assert not (tmp_path / "out.onnx").exists()
