"""Sets made as others make them: what they lack is really lacking, and no build would take them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from PIL import Image

from calibration.baselines import prompts_only, random_set
from calibration.capture import capture
from calibration.samples import Sample
from mtu_compile.core.errors import CalibrationError
from mtu_compile.core.tasks import PAPER_TASKS, Task
from mtu_compile.model.pipeline import MTUPipeline

T2I, EDIT, SR, INPAINT = PAPER_TASKS
OPTIONS: dict[str, Any] = {"model_sha256": "m", "steps": 8, "calls": 6}


@pytest.fixture(scope="module")
def pipeline(mtu_pipeline_dir: Path, tiny_mtu: Any) -> MTUPipeline:
    return MTUPipeline.from_pretrained(mtu_pipeline_dir, unet=tiny_mtu())


@pytest.fixture(scope="module")
def samples() -> tuple[Sample, ...]:
    picture = Image.fromarray(np.random.default_rng(2).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    mask = Image.new("L", (32, 32))
    mask.paste(255, (8, 8, 24, 20))
    return tuple(Sample(prompt, picture, mask) for prompt in ("a cat", "a dog"))


@pytest.mark.parametrize("task", [EDIT, SR, INPAINT], ids=lambda task: task.name)
def test_prompts_only_has_the_prompts_and_no_pictures(
    pipeline: MTUPipeline, samples: tuple[Sample, ...], task: Task
) -> None:
    with_pictures = capture(pipeline, task, samples, **OPTIONS)
    without = prompts_only(pipeline, task, samples, **OPTIONS)
    assert without.strategy == "prompts only" and without.prompts == ("a cat", "a dog")
    for seen, blind in zip(with_pictures.inputs, without.inputs, strict=True):
        assert seen["sample"][:, 4:].any() and not blind["sample"][:, 4:].any()
        assert np.array_equal(seen["encoder_hidden_states"], blind["encoder_hidden_states"])
    # The UNet itself saw none: denoising went another way.
    assert not np.allclose(with_pictures.inputs[5]["sample"][:, :4], without.inputs[5]["sample"][:, :4])
    with pytest.raises(CalibrationError, match="without pictures"):
        without.verify(task=task.name, model_sha256="m")
    # And the pipeline is as it was.
    assert capture(pipeline, task, samples, **OPTIONS).sha256 == with_pictures.sha256


def test_without_a_condition_prompts_are_all_there_is(pipeline: MTUPipeline, samples: tuple[Sample, ...]) -> None:
    ours, others = capture(pipeline, T2I, samples, **OPTIONS), prompts_only(pipeline, T2I, samples, **OPTIONS)
    for a, b in zip(ours.inputs, others.inputs, strict=True):
        assert all(np.array_equal(a[name], b[name]) for name in a)
    assert ours.sha256 != others.sha256


def write_graph(path: Path, height: int | str) -> Path:
    """Inputs as a static UNet graph of the editing task has them; what it computes does not matter."""
    shapes = {"sample": [3, 8, height, 8], "timestep": [1], "encoder_hidden_states": [3, 16, 32]}
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()]
    output = helper.make_tensor_value_info("out_sample", TensorProto.FLOAT, shapes["sample"])
    graph = helper.make_graph([helper.make_node("Identity", ["sample"], ["out_sample"])], "unet", inputs, [output])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)]), str(path))
    return path


def test_random_numbers_fit_the_graph_and_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="dynamic shape"):
        random_set(write_graph(tmp_path / "dynamic.onnx", "height"), task="edit", model_sha256="m", calls=1)
    graph = write_graph(tmp_path / "edit.onnx", 8)
    made = random_set(graph, task="edit", model_sha256="m", calls=20)
    assert made.sha256 == random_set(graph, task="edit", model_sha256="m", calls=20).sha256
    assert made.sha256 != random_set(graph, task="edit", model_sha256="m", calls=20, seed=1).sha256
    values = np.stack([call["sample"] for call in made.inputs])
    assert values.shape == (20, 3, 8, 8, 8) and abs(values.mean()) < 0.05 and abs(values.std() - 1) < 0.05
    assert made.inputs[0]["encoder_hidden_states"].shape == (3, 16, 32)
    assert len(set(made.timesteps)) > 15 and all(0 <= t < 1000 and t == int(t) for t in made.timesteps)
    with pytest.raises(CalibrationError, match="not from a denoising trajectory"):
        made.verify(task="edit", model_sha256="m")
