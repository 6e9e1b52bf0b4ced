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


@pytest.fixture(scope="module")
def shared_float(float_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The float bundle with shared weights; copy it to change it."""
    return shared_copy(float_bundle, tmp_path_factory.mktemp("shared") / "float")


def pictures(path: Path) -> list[bytes]:
    image = Image.effect_mandelbrot((32, 32), (-2, -1, 1, 1), 20).convert("RGB")
    given = {"t2i": {}, "inpaint": {"image": image, "mask": image.convert("L")}}
    with runtime.load(path, warn=False) as loaded:
        return [np.asarray(loaded.run(task, "disc", **more).image).tobytes() for task, more in given.items()]


@pytest.mark.parametrize("precision", ["int8", "fp32"])
def test_the_bundle_is_smaller_and_its_pictures_are_the_same(
    precision: str, request: pytest.FixtureRequest, tmp_path: Path, mtu: Callable[..., Outcome]
) -> None:
    if precision == "fp32":
        source, shared = request.getfixturevalue("float_bundle"), request.getfixturevalue("shared_float")
    else:
        source = request.getfixturevalue("tiny_bundle")
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


def test_a_report_counts_shared_weights_once_and_says_what_they_save(shared_float: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(command, [str(shared_float), "-o", str(tmp_path / "page.html"), "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["bytes"] == sum((shared_float / name).stat().st_size for name in bundle.read(shared_float).files)
    assert found["other_files"]["shared weights"] == (shared_float / "unet" / "openvino_model.bin").stat().st_size
    assert "in one file, which saves" in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_one_task_is_exported_with_its_weights_beside_it(
    float_bundle: Path, shared_float: Path, tmp_path: Path
) -> None:
    made = export_static(shared_float, "inpaint", tmp_path / "out")
    assert made.pipeline == "StableDiffusionInpaintPipeline"
    alone = open_engine("openvino", made.unet, {"INFERENCE_PRECISION_HINT": "f32"})
    rng = np.random.default_rng(0)
    feed = {k: rng.standard_normal([n or 1 for n in s.shape]).astype(s.dtype) for k, s in alone.inputs.items()}
    with runtime.load(float_bundle, warn=False) as loaded:
        assert alone(feed)["out_sample"].tobytes() == loaded.unet("inpaint")(feed)["out_sample"].tobytes()
    theirs, copied = (place / "config.json" for place in (float_bundle / "unet_inpaint", made.unet.parent))
    assert json.loads(theirs.read_text()) == json.loads(copied.read_text())


def test_one_unet_for_all_tasks_has_nothing_to_share(tiny_bundle: Path) -> None:
    tasks = bundle.read(tiny_bundle).tasks
    same = {name: replace(entry, engine=tasks["t2i"].engine) for name, entry in tasks.items()}
    assert share_weights(targets.get("cpu"), tiny_bundle, same, least_bytes=1) == (same, None)


def test_weights_that_are_not_the_bundles_are_never_opened(shared_float: Path, tmp_path: Path) -> None:
    shared = tmp_path / "copy"
    shutil.copytree(shared_float, shared)
    weights = shared / "unet" / "openvino_model.bin"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(BundleError, match=r"unet/openvino_model\.bin is not the file"):
        runtime.load(shared)
    weights.rename(tmp_path / "elsewhere")
    for _ in range(2):  # first it is gone, then a link
        with runtime.load(shared, verify=False) as loaded, pytest.raises(BundleError, match=r"openvino_model\.bin"):
            loaded.unet("inpaint")
        weights.unlink(missing_ok=True)
        weights.symlink_to(tmp_path / "elsewhere")
