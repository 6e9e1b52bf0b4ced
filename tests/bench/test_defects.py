"""Does the accuracy check see what goes wrong with quantised diffusion? Defects are seeded into a built bundle.

The bundle is the example's, INT8 for a Jetson: its graphs are ONNX, so a defect is an edit of the very file that is
shipped, and the check runs as ``mtu-compile check`` runs it where no Jetson is.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bench.defects import seen
from bench.seeding import defects, quantised_layers, spoil
from mtu_compile import bundle
from mtu_compile.accuracy.host.check import check_bundle
from mtu_compile.accuracy.verdict import TaskCheck
from mtu_compile.graph import io as graph_io
from tests.conftest import MadeOnce

MODEL = Path(__file__).parents[2] / "examples" / "emoji" / "model"
TASK, OTHER = "inpaint", "sr"

pytestmark = [pytest.mark.heavy, pytest.mark.usefixtures("shared_exports")]


@pytest.fixture(scope="session")
def built(made_once: MadeOnce) -> Path:
    """The example's inpainting task in INT8, checked on two of its samples, and another task's graph."""
    from mtu_compile.compile import BuildOptions, build

    def make(folder: Path) -> None:
        options = BuildOptions(
            MODEL,
            folder / "bundle",
            target="jetson-orin",
            tasks=(TASK, OTHER),
            steps=6,
            calibration_pictures=3,
            check_pictures=2,
            gate="off",
            fetch_wheels=False,
        )
        build(options)

    return made_once("defects", make) / "bundle"


@pytest.fixture
def spoilt(built: Path, tmp_path: Path) -> Callable[[str], TaskCheck]:
    """Factory: what the check says of a copy of the bundle with the defect of that name."""

    def make(name: str) -> TaskCheck:
        copy = tmp_path / "bundle"
        shutil.copytree(built, copy)
        manifest = bundle.read(copy)
        graphs = {task: copy / entry.engine.path for task, entry in manifest.tasks.items()}
        entry = manifest.tasks[TASK]
        found = {one.name: one for one in defects(entry.task, {OTHER: graph_io.load(graphs[OTHER])})}
        if (edit := found[name].edit) is not None:
            spoil(graphs[TASK], edit, tmp_path / "model.onnx").replace(graphs[TASK])
        bundle.write(copy, replace(manifest, tasks={TASK: entry}))
        return check_bundle(copy, everywhere=False).tasks[TASK]

    return make


def test_int8_as_built_passes_every_metric(spoilt: Callable[[str], TaskCheck]) -> None:
    task = spoilt("nothing")
    assert task.failures == ()
    summary = task.summary()
    assert summary["vif"] is not None and summary["outside_psnr_db"] is not None
    assert summary["truth"] is not None and task.thresholds["truth_drop_db"] is not None
    assert len(task.made) == task.pictures == len(task.metrics.pictures) == 2
    assert task.made[0].size == (64, 64) and "clip" in task.reasons
    assert {"text", "image"} == set(summary["guidance"])
    json.dumps(task.to_json(), allow_nan=False)


#: Defect → metrics that have to see it.
CAUGHT = {
    f"weights of task {OTHER}": {"sqnr_db", "image_pooled_guidance_ratio", "vif"},
    "prompt dropped": {"text_guidance_ratio", "text_pooled_guidance_ratio", "text_guidance_sqnr_db", "latent_psnr_db"},
    "text delta halved": {"text_guidance_ratio", "text_pooled_guidance_ratio"},
    "condition dropped": {"image_guidance_ratio", "image_pooled_guidance_ratio", "image_guidance_sqnr_db"},
    "mask all ones": {"image_guidance_sqnr_db"},
}


@pytest.mark.parametrize("name", CAUGHT)
def test_a_seeded_defect_is_seen_by_name(name: str, spoilt: Callable[[str], TaskCheck]) -> None:
    task = spoilt(name)
    found = {failure.split()[0] for failure in task.failures}
    assert CAUGHT[name] <= found, task.failures


@pytest.mark.parametrize("name", ["activation range / 8, late layer", "weights' output channels rotated, middle layer"])
def test_a_single_spoilt_layer_is_seen(name: str, spoilt: Callable[[str], TaskCheck]) -> None:
    """Which layer that is, and so which metric sees it, depends on the layers that were left in float."""
    assert spoilt(name).failures


def test_a_saturated_mask_is_seen_by_the_image_guidance(spoilt: Callable[[str], TaskCheck]) -> None:
    """The known failure of INT8 inpainting: the image direction of guidance is noise.

    A network that follows its mask closely, as the example's does, shows it in its pictures, too; one that does not
    shows it nowhere else.
    """
    task = spoilt("mask saturated at half")
    failed = {failure.split()[0] for failure in task.failures}
    assert {"image_guidance_sqnr_db", "image_pooled_guidance_ratio"} <= failed
    assert seen(task)["guidance_sqnr_db"].beyond


def test_defects_change_what_they_say_and_nothing_else(built: Path, tmp_path: Path) -> None:
    entry = bundle.read(built).tasks[TASK]
    graph = built / entry.engine.path
    layers = len(quantised_layers(graph_io.load(graph)))
    assert layers > 50
    before = {name: v.const_value.numpy() for name, v in graph_io.load(graph).graph.initializers.items()}
    changed = {}
    for defect in defects(entry.task):
        if defect.edit is None or "early" in defect.name or "late" in defect.name:
            continue
        path = spoil(graph, defect.edit, tmp_path / "model.onnx")
        after = {name: v.const_value.numpy() for name, v in graph_io.load(path).graph.initializers.items()}
        changed[defect.name] = sum(not np.array_equal(array, after[name]) for name, array in before.items())
        assert len(quantised_layers(graph_io.load(path))) == layers
    one_layer = {name: count for name, count in changed.items() if name.endswith("layer")}
    assert len(one_layer) == 4 and set(one_layer.values()) == {1}
    assert {count for name, count in changed.items() if not name.endswith("layer")} == {0}
