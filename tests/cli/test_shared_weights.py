"""A bundle whose UNets share their weights is smaller, and makes the same pictures."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

import targets
from mtu_compile import bundle, runtime
from mtu_compile.cli.report import command
from mtu_compile.core.errors import BundleError
from mtu_compile.export_static import export_static
from mtu_compile.runtime.engine import open_engine
from mtu_compile.stages.share_weights import share_weights
from tests.commands import Outcome


def shared_copy(source: Path, out: Path) -> Path:
    """A bundle as it would have been built with shared weights, however little that saves."""
    shutil.copytree(source, out)
    manifest = bundle.read(out)
    entries, saved = share_weights(targets.get(manifest.target), out, manifest.tasks, least_bytes=1)
    provenance = replace(manifest.provenance, shared_weights_saved_bytes=saved)
    bundle.write(out, replace(manifest, tasks=entries, provenance=provenance))
    return out


def pictures(path: Path) -> list[bytes]:
    image = Image.effect_mandelbrot((32, 32), (-2, -1, 1, 1), 20).convert("RGB")
    given = {"t2i": {}, "inpaint": {"image": image, "mask": image.convert("L")}}
    with runtime.load(path, warn=False) as loaded:
        return [np.asarray(loaded.run(task, "disc", **more).image).tobytes() for task, more in given.items()]


@pytest.mark.parametrize("kind", ["tiny_bundle", "float_bundle"])
def test_the_bundle_is_smaller_and_its_pictures_are_the_same(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path, mtu: Callable[..., Outcome]
) -> None:
    source: Path = request.getfixturevalue(kind)
    shared = shared_copy(source, tmp_path / "shared")
    manifest = bundle.read(shared)
    saved = manifest.provenance.shared_weights_saved_bytes
    sizes = [sum((root / name).stat().st_size for name in bundle.read(root).files) for root in (source, shared)]
    assert saved == sizes[0] - sizes[1] > 100_000
    assert {entry.engine.weights for entry in manifest.tasks.values()} == {"unet/openvino_model.bin"}
    assert list(manifest.tasks) == list(bundle.read(source).tasks)
    assert pictures(shared) == pictures(source)
    assert "which saves" in mtu("inspect", shared).out
    said = json.loads(mtu("inspect", shared, "--json").out)["provenance"]
    assert said["shared_weights_saved_bytes"] == saved


def test_a_report_counts_shared_weights_once_and_says_what_they_save(float_bundle: Path, tmp_path: Path) -> None:
    shared = shared_copy(float_bundle, tmp_path / "shared")
    done = CliRunner().invoke(command, [str(shared), "-o", str(tmp_path / "page.html"), "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["bytes"] == sum((shared / name).stat().st_size for name in bundle.read(shared).files)
    assert found["other_files"]["shared weights"] == (shared / "unet" / "openvino_model.bin").stat().st_size
    assert "in one file, which saves" in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_one_task_is_exported_with_its_weights_beside_it(float_bundle: Path, tmp_path: Path) -> None:
    shared = shared_copy(float_bundle, tmp_path / "shared")
    made = export_static(shared, "inpaint", tmp_path / "out")
    assert made.pipeline == "StableDiffusionInpaintPipeline"
    config = {"INFERENCE_PRECISION_HINT": "f32"}
    alone, ours = open_engine("openvino", made.unet, config), bundle.read(shared).tasks["inpaint"].engine
    with runtime.load(float_bundle, warn=False) as loaded:
        unet = loaded.unet("inpaint")
        rng = np.random.default_rng(0)
        feed = {k: rng.standard_normal([n or 1 for n in s.shape]).astype(s.dtype) for k, s in unet.inputs.items()}
        assert ours.config["INFERENCE_PRECISION_HINT"] == "f32"
        assert alone(feed)["out_sample"].tobytes() == unet(feed)["out_sample"].tobytes()
    theirs, copied = (
        json.loads((place / "config.json").read_text()) for place in (float_bundle / "unet_inpaint", made.unet.parent)
    )
    assert theirs == copied


def test_one_unet_for_all_tasks_has_nothing_to_share(tiny_bundle: Path) -> None:
    tasks = bundle.read(tiny_bundle).tasks
    same = {name: replace(entry, engine=tasks["t2i"].engine) for name, entry in tasks.items()}
    assert share_weights(targets.get("cpu"), tiny_bundle, same, least_bytes=1) == (same, None)


@pytest.mark.parametrize("harm", ["link", "byte", "gone"])
def test_weights_that_are_not_the_bundles_are_never_opened(harm: str, float_bundle: Path, tmp_path: Path) -> None:
    shared = shared_copy(float_bundle, tmp_path / "shared")
    weights = shared / "unet" / "openvino_model.bin"
    if harm == "byte":
        weights.write_bytes(weights.read_bytes()[:-1] + b"\x00\x01")
    else:
        weights.rename(tmp_path / "elsewhere")
    if harm == "link":
        weights.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BundleError, match=r"unet/openvino_model\.bin"):
        runtime.load(shared)
    if harm != "byte":
        with runtime.load(shared, verify=False) as loaded, pytest.raises(BundleError, match=r"openvino_model\.bin"):
            loaded.unet("inpaint")
