"""``build --routing shared``: one engine for all tasks, as good as an engine for each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from mtu_compile import bundle, runtime
from tests.commands import Outcome


def unet_bytes(root: Path) -> int:
    paths = {entry.engine.path for entry in bundle.read(root).tasks.values()}
    folders = {(root / path).parent for path in paths}
    return sum(file.stat().st_size for folder in folders for file in folder.iterdir())


def latents(loaded: runtime.Runtime, task: str) -> Any:
    picture = Path(__file__).parents[2] / "examples" / "emoji" / "model" / "samples" / "inpaint"
    source = sorted(picture.glob("*.png"))[0]
    given = {} if task == "t2i" else {"image": source, "mask": source}
    return loaded.run(task, "disc a", seed=3, steps=3, **given).latents


def test_a_shared_bundle_has_one_unet(shared_float: Path) -> None:
    manifest = bundle.read(shared_float)
    assert manifest.routing == "shared"
    (engine,) = {entry.engine.path for entry in manifest.tasks.values()}
    assert [folder.name for folder in shared_float.glob("unet*")] == [Path(engine).parent.name]
    assert {entry.task_id for entry in manifest.tasks.values()} == set(range(len(manifest.tasks)))
    # pipelines of other tools would find a UNet with an input they do not know
    assert not (shared_float / "model_index.json").exists()


def test_its_pictures_are_those_of_an_engine_for_each_task(shared_float: Path, float_bundle: Path) -> None:
    with runtime.load(shared_float) as shared, runtime.load(float_bundle) as static:
        for task in static.manifest.tasks:
            expected = latents(static, task)
            error = np.abs(latents(shared, task) - expected).max() / np.abs(expected).max()
            assert error < 1e-4
        wrong = np.abs(latents(shared, "t2i") - latents(static, "inpaint")).max()
        assert wrong > 0.1  # a comparison that cannot fail says nothing


def test_int8_is_calibrated_on_every_task(shared_int8: Path, tiny_bundle: Path) -> None:
    shared, static = bundle.read(shared_int8), bundle.read(tiny_bundle)
    sets = {name: entry.calibration for name, entry in shared.tasks.items()}
    assert sets == {name: entry.calibration for name, entry in static.tasks.items()}
    for entry in shared.tasks.values():
        assert entry.accuracy is not None
        quantised = entry.provenance.quantisation
        assert quantised is not None and quantised.activations > 0
    assert unet_bytes(shared_int8) < 0.75 * unet_bytes(tiny_bundle)


def test_a_plain_pipeline_has_nothing_to_share(mtu: Callable[..., Outcome], base_pipeline_dir: Path) -> None:
    done = mtu("build", base_pipeline_dir, "--as-task", "t2i", "--routing", "shared", "--fp32")
    assert done.code == 2
    assert "--routing static" in done.err
