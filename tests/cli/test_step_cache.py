"""``build --step-cache``: two UNets that share weights, a schedule a task, and pictures that are judged with it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

import targets
from mtu_compile import bundle, runtime
from mtu_compile.bundle import StepCache
from mtu_compile.cli.build import command as build_command
from mtu_compile.core.errors import BundleError
from mtu_compile.runtime import Request
from mtu_compile.runtime.step_cache import DEEP
from mtu_compile.stages.share_weights import share_weights
from mtu_compile.stages.step_cache import largest_interval, spread
from tests.cli.conftest import BUILD, SHARED, picture
from tests.commands import Outcome

#: Whatever a random network's pictures are like, they pass; but for inpainting, where none can.
LENIENT = {
    "format": "mtu-thresholds-1",
    "thresholds": {"step-cache": {"t2i": {"ssim": 0.0}, "inpaint": {"ssim": 0.0, "image_psnr_db": 199.0}}},
}


@pytest.fixture(scope="module")
def thresholds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("thresholds") / "thresholds.json"
    path.write_text(json.dumps(LENIENT))
    return path


@pytest.fixture(scope="module")
def cached(tiny_model: Path, build_once: Callable[..., Path], thresholds: Path) -> Path:
    """The tiny model with one UNet for all tasks and a step cache, in float32."""
    options = (*SHARED, "--fp32", "--step-cache", 2, "--thresholds", thresholds)
    return build_once(tiny_model, *options, *BUILD)


def requests() -> list[Request]:
    image = picture(1)
    return [
        Request("t2i", "disc a", seed=3, steps=4),
        Request("inpaint", "disc b", image=image, mask=image.convert("L"), seed=4, steps=4),
    ]


@pytest.mark.heavy
def test_a_task_gets_the_schedule_of_fewest_whole_steps(cached: Path) -> None:
    manifest = bundle.read(cached)
    entry = manifest.tasks["t2i"]
    assert entry.step_cache is not None and entry.provenance.step_cache is not None
    assert len(entry.step_cache.whole_at) == 2  # of four, with at most two from one to the next
    tried = entry.provenance.step_cache
    assert tried.tried[-1].passed and 0 < tried.shallow_share < 0.6 and tried.reason is None
    assert [one.id for one in entry.passes[-2:]] == ["mtu::emit-deep-feature", "mtu::take-deep-feature"]
    assert entry.accuracy is not None
    assert entry.accuracy["step_cache"]["thresholds"] == {"ssim": 0.0}
    assert entry.accuracy["step_cache"]["ssim"] < entry.accuracy["ssim"]  # it changes the picture


@pytest.mark.heavy
def test_a_task_for_which_none_is_good_enough_keeps_its_steps_whole(cached: Path) -> None:
    entry = bundle.read(cached).tasks["inpaint"]
    assert entry.step_cache is None and entry.provenance.step_cache is not None
    assert entry.provenance.step_cache.reason == (
        "no schedule with an interval of at most 2 reaches ssim 0, image_psnr_db 199: every step is whole"
    )
    assert entry.accuracy is not None and "step_cache" not in entry.accuracy


@pytest.mark.heavy
def test_pictures_are_the_same_without_the_cache_and_together(cached: Path, shared_float: Path) -> None:
    t2i, inpaint = requests()
    with runtime.load(cached) as loaded, runtime.load(shared_float) as plain:
        assert DEEP not in loaded.unet("t2i").outputs
        alone = [loaded.run_batch([one])[0].latents for one in (t2i, inpaint)]
        expected = [plain.run_batch([one])[0].latents for one in (t2i, inpaint)]
        np.testing.assert_allclose(
            loaded.run_batch([replace(t2i, step_cache=False)])[0].latents, expected[0], atol=1e-4
        )
        np.testing.assert_allclose(alone[1], expected[1], atol=1e-4)
        assert np.abs(alone[0] - expected[0]).max() > 1e-3
        together = loaded.run_batch([t2i, inpaint])
        for ours, theirs in zip(together, alone, strict=True):
            np.testing.assert_array_equal(ours.latents, theirs)
        for sampler in ("dpm++", "euler", "heun"):
            made = loaded.run("t2i", "disc a", seed=3, steps=6, scheduler=sampler)
            assert np.isfinite(made.latents).all()


@pytest.mark.heavy
def test_the_command_runs_checks_and_inspects_it(
    cached: Path, thresholds: Path, mtu: Callable[..., Outcome], tmp_path: Path
) -> None:
    checked = mtu("check", cached, "--thresholds", thresholds)
    assert checked.code == 0, checked.err
    assert "fewer whole UNet steps" in checked.err + checked.out
    strict = json.loads(json.dumps(LENIENT))
    strict["thresholds"]["step-cache"]["t2i"]["ssim"] = 1.0
    (tmp_path / "strict.json").write_text(json.dumps(strict))
    failed = mtu("check", cached, "--thresholds", tmp_path / "strict.json")
    assert failed.code == 3 and "t2i: with the step cache ssim" in failed.err
    said = mtu("inspect", cached).out
    assert "2 of 4" in said and "unet.shallow" in said
    made = {}
    for option in ("--step-cache", "--no-step-cache"):
        out = tmp_path / f"{option}.png"
        assert mtu("run", cached, "--task", "t2i", "--prompt", "disc", "-o", out, option).code == 0
        made[option] = out.read_bytes()
    assert made["--step-cache"] != made["--no-step-cache"]


@pytest.mark.heavy
def test_both_unets_keep_their_weights_in_one_file(cached: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(cached, tmp_path / "copy"))
    manifest = bundle.read(copy)
    t2i = requests()[0]
    with runtime.load(copy) as loaded:
        expected = loaded.run_batch([t2i])[0].latents
    entries, saved = share_weights(targets.get("cpu"), copy, manifest.tasks, least_bytes=1)
    bundle.write(copy, replace(manifest, tasks=entries))
    again = bundle.read(copy)
    refs = dict(again.engines())
    assert refs["unet"].weights == refs["unet.shallow"].weights is not None
    assert saved is not None and saved > 0.9 * refs["unet.shallow"].weights_bytes  # all it has, the whole one has
    with runtime.load(copy) as loaded:
        np.testing.assert_array_equal(loaded.run_batch([t2i])[0].latents, expected)


@pytest.mark.heavy
def test_a_manifest_that_contradicts_itself_is_refused(cached: Path, shared_float: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(cached, tmp_path / "copy"))
    manifest = bundle.read(copy)
    entry = manifest.tasks["t2i"]
    assert entry.step_cache is not None
    other = StepCache(manifest.vae_decoder, entry.step_cache.whole_at)
    both = {
        name: replace(one, step_cache=other if name == "inpaint" else entry.step_cache)
        for name, one in manifest.tasks.items()
    }
    with pytest.raises(BundleError, match=r"step_cache\.engine differ"):
        bundle.write(copy, replace(manifest, tasks=both))
    bundle.write(copy, replace(manifest, tasks={**manifest.tasks, "t2i": replace(entry, step_cache=other)}))
    with runtime.load(copy) as loaded, pytest.raises(BundleError, match="has no input 'deep_feature'"):
        loaded.run("t2i", "disc")
    bundle.write(copy, replace(manifest, tasks={**manifest.tasks, "t2i": entry}))
    shutil.copytree(shared_float / "unet_shared", copy / "unet_shared", dirs_exist_ok=True)
    bundle.write(copy, manifest)
    with runtime.load(copy) as loaded, pytest.raises(BundleError, match="has no output 'deep_feature'"):
        loaded.run("t2i", "disc")


@pytest.mark.parametrize("value", ["1", "0", "-3", "1.5", "often", "1001"])
def test_what_is_no_interval_is_refused(value: str) -> None:
    done = CliRunner().invoke(build_command, ["--step-cache", value])
    assert done.exit_code == 2 and "from 2 to 1000" in done.output


def test_whole_steps_are_spread() -> None:
    assert spread(20, 5, 1.0) == (0, 4, 8, 12, 16)
    assert spread(20, 5, 1.3) == (0, 2, 6, 10, 15)
    for power in (1.0, 1.3, 2.0):
        for whole in range(1, 20):
            places = spread(20, whole, power)
            assert len(set(places)) == whole and places[0] == 0 and max(places) < 20
    assert largest_interval((0, 4, 8, 12, 16), 20) == 4
    assert largest_interval((0, 2), 20) == 18
