"""A model's own thresholds: read before anything slow, carried by the bundle, overridden, and suggested."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mtu_compile import bundle
from mtu_compile.core.hashing import model_sha256

Run = Callable[..., Any]
QUICK = ("--fp32", "--steps", 2, "--check-pictures", 1, "--task", "t2i")


def thresholds(path: Path, **precisions: Any) -> Path:
    path.write_text(json.dumps({"format": "mtu-thresholds-1", "thresholds": precisions}))
    return path


@pytest.fixture(scope="module")
def strict_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model, of which no build can be good enough; it leaves one metric unjudged."""
    model = tmp_path_factory.mktemp("strict") / "model"
    shutil.copytree(tiny_model, model)
    row = {"ssim": 1.1, "latent_psnr_db": None}
    thresholds(model / "thresholds.json", fp32={"t2i": row, "inpaint": {}}, int8={"t2i": {"sqnr_db": 300}})
    return model


@pytest.fixture(scope="module")
def strict_bundle(strict_model: Path, tmp_path_factory: pytest.TempPathFactory, mtu: Run) -> Path:
    out = tmp_path_factory.mktemp("strict") / "bundle"
    done = mtu("build", strict_model, "--accuracy-gate", "warn", "--quiet", "-o", out, *QUICK)
    assert done.code == 0 and done.out == "", done.err
    return out


def test_a_bundle_carries_what_its_model_asks_and_is_judged_by_it(strict_bundle: Path, mtu: Run) -> None:
    entry = bundle.read(strict_bundle).tasks["t2i"]
    assert entry.thresholds == {"ssim": 1.1, "latent_psnr_db": None}
    assert entry.accuracy is not None and entry.accuracy["passed"] is False
    asked = entry.accuracy["thresholds"]
    assert asked["ssim"] == 1.1 and asked["latent_psnr_db"] is None and asked["sqnr_db"] == 60.0
    for command in (("check",), ("board", "check")):
        done = mtu(*command, strict_bundle)
        assert done.code == 3 and "t2i: ssim" in done.err and "threshold 1.1" in done.err
        assert "latent_psnr_db" not in done.err and "sqnr_db" not in done.err


def test_a_file_stands_in_for_what_the_bundle_carries(strict_bundle: Path, tmp_path: Path, mtu: Run) -> None:
    own = thresholds(tmp_path / "t.json", fp32={"t2i": {"ssim": 0.9}})
    for command in (("check",), ("board", "check")):
        done = mtu(*command, strict_bundle, "--thresholds", own, "--json")
        assert done.code == 0, done.err
        asked = json.loads(done.out)["tasks"]["t2i"]["thresholds"]
        assert asked["ssim"] == 0.9 and asked["latent_psnr_db"] == 60.0
    noisy = thresholds(tmp_path / "n.json", fp32={"t2i": {"sqnr_db": 399.0}})
    done = mtu("check", strict_bundle, "--thresholds", noisy)
    assert done.code == 3 and "t2i: sqnr_db below 399 at 2 of 2 calls" in done.err
    assert "at AVX2: t2i: sqnr_db below 399" in done.err  # the processes of other instruction sets judge by it, too


def test_suggestions_pass_the_bundle_they_were_made_from(strict_bundle: Path, tmp_path: Path, mtu: Run) -> None:
    lenient = thresholds(tmp_path / "t.json", fp32={"t2i": {}})
    done = mtu("check", strict_bundle, "--thresholds", lenient, "--suggest-thresholds")
    assert done.code == 0, done.err
    limits = json.loads(done.out)["thresholds"]["fp32"]["t2i"]
    assert limits["sqnr_db"] == 60.0 and 0.9 < limits["ssim"] < 1 and "truth_drop_db" not in limits
    file = tmp_path / "suggested.json"
    done = mtu("check", strict_bundle, "--suggest-thresholds", "-o", file)
    assert done.code == 3 and "threshold 1.1" in done.err  # what is asked now still counts
    assert json.loads(file.read_text())["thresholds"]["fp32"]["t2i"]["ssim"] == limits["ssim"]
    assert mtu("check", strict_bundle, "--thresholds", file).code == 0
    refused = mtu("check", strict_bundle, "--suggest-thresholds", "-o", file)
    assert refused.code == 2 and "--force" in refused.err
    assert mtu("check", strict_bundle, "-o", file).code == 2


@pytest.mark.parametrize(
    ("precisions", "message"),
    [
        ({"int8": {"t2i": {"sharpness": 1.0}}}, "a metric: sqnr_db"),
        ({"int9": {"t2i": {}}}, "a precision: int8"),
        ({"int8": {"paint": {}}}, "a task 'paint'"),
        ({"int8": {"t2i": {"ssim": float("nan")}}}, "NaN"),
    ],
)
def test_a_file_that_makes_no_sense_is_refused_at_once(
    precisions: Any, message: str, tiny_model: Path, tmp_path: Path, mtu: Run
) -> None:
    """Before anything is loaded: a model's own is a bad model, one given is a bad option."""
    without_torch = "import sys; sys.modules['torch'] = None"
    given = thresholds(tmp_path / "given.json", **precisions)
    done = mtu("build", tiny_model, "--thresholds", given, "-o", tmp_path / "b", before=without_torch)
    assert done.code == 2 and message in done.err and "given.json" in done.err and "hint:" in done.err
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    thresholds(model / "thresholds.json", **precisions)
    done = mtu("build", model, "-o", tmp_path / "b", before=without_torch)
    assert done.code == 5 and message in done.err and "thresholds.json" in done.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["given.json", "model"]


def test_thresholds_outside_of_the_model_are_refused(tiny_model: Path, tmp_path: Path, mtu: Run) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    (model / "thresholds.json").symlink_to(thresholds(tmp_path / "elsewhere.json", int8={}))
    done = mtu("build", model, "-o", tmp_path / "b")
    assert done.code == 5 and "points out of" in done.err
    (model / "thresholds.json").unlink()
    (model / "thresholds.json").symlink_to(tmp_path / "nowhere.json")
    assert mtu("build", model, "-o", tmp_path / "b").code == 5


def test_they_are_no_part_of_what_the_model_is(tiny_model: Path, strict_model: Path) -> None:
    """Or a calibration set would not fit any more, once its model asks for more."""
    assert model_sha256(strict_model) == model_sha256(tiny_model)


def test_other_loaders_do_not_mind_the_file(strict_model: Path, base_pipeline_dir: Path, tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline

    from mtu_compile.model.pipeline import MTUPipeline

    assert [task.name for task in MTUPipeline.from_pretrained(strict_model).unet.tasks] == ["t2i", "inpaint"]
    plain = tmp_path / "plain"
    shutil.copytree(base_pipeline_dir, plain)
    shutil.copy(strict_model / "thresholds.json", plain)
    loaded = StableDiffusionPipeline.from_pretrained(plain, local_files_only=True, safety_checker=None)
    assert loaded.unet.config["cross_attention_dim"]


def test_a_model_that_is_published_anew_keeps_its_thresholds(tmp_path: Path) -> None:
    from examples.emoji.publish import replace_model

    model, trained, samples = (tmp_path / name for name in ("model", "trained", "samples"))
    for folder in (model / "samples", trained, samples):
        folder.mkdir(parents=True)
    (trained / "new").touch()
    (model / "old").touch()
    asked = thresholds(model / "thresholds.json", int8={"t2i": {"ssim": 0.9}}).read_bytes()
    replace_model(model, trained, samples)
    assert sorted(path.name for path in model.iterdir()) == ["new", "samples", "thresholds.json"]
    assert (model / "thresholds.json").read_bytes() == asked
    own = thresholds(trained / "thresholds.json", int8={}).read_bytes()
    replace_model(model, trained, samples)
    assert (model / "thresholds.json").read_bytes() == own
