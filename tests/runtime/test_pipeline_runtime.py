"""The runtime on real engines, against a straightforward computation in torch and diffusers."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import diffusers
import numpy as np
import openvino
import pytest
import torch
from PIL import Image, ImageDraw

from mtu_compile import bundle, runtime
from mtu_compile.bundle.files import _sealed
from mtu_compile.core.errors import EXIT_ACCURACY, BundleError, ConfigError, InputError, NotFiniteError
from mtu_compile.runtime import Runtime, networks

SCHEDULERS = {
    "ddim": diffusers.DDIMScheduler,
    "euler": diffusers.EulerDiscreteScheduler,
    "dpm++": diffusers.DPMSolverMultistepScheduler,
}


@pytest.fixture(scope="module")
def parts(tiny_bundle: Any) -> Any:
    return tiny_bundle[1]


@pytest.fixture(scope="module")
def loaded(tiny_bundle: Any) -> Runtime:
    return runtime.load(tiny_bundle[0])


@pytest.fixture
def copied(tiny_bundle: Any, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_bundle[0], tmp_path / "copied")


def picture(size: tuple[int, int] = (32, 32), seed: int = 0) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)


def left_half(size: tuple[int, int] = (32, 32)) -> Image.Image:
    mask = Image.new("L", size, 0)
    ImageDraw.Draw(mask).rectangle((0, 0, size[0] // 2 - 1, size[1] - 1), fill=255)
    return mask


class Expected:
    """The same pipeline, written down plainly, one UNet sample at a time."""

    def __init__(self, parts: Any) -> None:
        self.parts = parts

    def text(self, prompt: str) -> torch.Tensor:
        ids = self.parts.tokenizer(prompt, padding="max_length", max_length=16, truncation=True, return_tensors="pt")
        return self.parts.text_encoder(ids.input_ids)[0]

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.parts.vae.encode(pixels).latent_dist.mean * self.parts.vae.config.scaling_factor

    def predict(self, task: str, x: torch.Tensor, t: Any, condition: torch.Tensor, prompt: str) -> torch.Tensor:
        return self.parts.unets[task](torch.cat([x, condition], 1), torch.tensor([float(t)]), self.text(prompt))

    def denoise(self, task: str, config: Any, name: str, steps: int, seed: int, guided: Any) -> torch.Tensor:
        scheduler = SCHEDULERS[name].from_config(config)
        scheduler.set_timesteps(steps)
        noise = np.random.Generator(np.random.PCG64(seed)).standard_normal((1, 4, 8, 8), dtype=np.float32)
        x = torch.from_numpy(noise) * scheduler.init_noise_sigma
        for t in scheduler.timesteps:
            x = scheduler.step(guided(scheduler.scale_model_input(x, t), t), t, x).prev_sample
        return x

    def decode(self, latents: torch.Tensor) -> np.ndarray:
        decoded = self.parts.vae.decode(latents / self.parts.vae.config.scaling_factor).sample[0]
        return ((decoded / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()


def pixels(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 127.5 - 1


def assert_close(result: Any, latents: torch.Tensor, image: np.ndarray) -> None:
    scale = float(latents.abs().max())
    assert np.abs(result.latents - latents.numpy()).max() <= 2e-4 * scale
    assert np.abs(np.asarray(result.image).astype(int) - image.astype(int)).max() <= 1


@torch.no_grad()
@pytest.mark.parametrize("name", SCHEDULERS)
def test_text_to_image(loaded: Runtime, parts: Any, name: str) -> None:
    own = Expected(parts)
    nothing = torch.zeros(1, 0, 8, 8)

    def guided(x: torch.Tensor, t: Any) -> torch.Tensor:
        without = own.predict("t2i", x, t, nothing, "blurry")
        return without + 3.5 * (own.predict("t2i", x, t, nothing, "a cat") - without)

    latents = own.denoise("t2i", loaded.manifest.scheduler, name, 4, 7, guided)
    result = loaded.run("t2i", "a cat", negative_prompt="blurry", seed=7, steps=4, guidance_scale=3.5, scheduler=name)
    assert_close(result, latents, own.decode(latents))


@torch.no_grad()
def test_edit_is_guided_by_text_and_image(loaded: Runtime, parts: Any) -> None:
    own, source = Expected(parts), picture()
    condition = own.encode(pixels(source))
    zeros = torch.zeros_like(condition)

    def guided(x: torch.Tensor, t: Any) -> torch.Tensor:
        nothing = own.predict("edit", x, t, zeros, "")
        image = own.predict("edit", x, t, condition, "")
        full = own.predict("edit", x, t, condition, "make it red")
        return nothing + 1.6 * (image - nothing) + 7.5 * (full - image)  # the task's own scales

    latents = own.denoise("edit", loaded.manifest.scheduler, "ddim", 5, 0, guided)
    assert_close(loaded.run("edit", "make it red", image=source), latents, own.decode(latents))


@torch.no_grad()
def test_super_resolution_is_not_guided(loaded: Runtime, parts: Any) -> None:
    own, small = Expected(parts), picture((8, 8))
    condition = own.encode(pixels(small.resize((32, 32), Image.Resampling.BICUBIC)))
    latents = own.denoise(
        "sr", loaded.manifest.scheduler, "ddim", 5, 3, lambda x, t: own.predict("sr", x, t, condition, "")
    )
    assert_close(loaded.run("sr", image=small, seed=3), latents, own.decode(latents))


@torch.no_grad()
def test_inpainting_masks_and_pastes(loaded: Runtime, parts: Any) -> None:
    own, source, mask = Expected(parts), picture(), left_half()
    selected = torch.zeros(1, 1, 32, 32)
    selected[..., :16] = 1
    condition = torch.cat([selected[..., ::4, ::4], own.encode(pixels(source) * (1 - selected))], 1)
    zeros = torch.zeros_like(condition)

    def guided(x: torch.Tensor, t: Any) -> torch.Tensor:
        nothing = own.predict("inpaint", x, t, zeros, "")
        image = own.predict("inpaint", x, t, condition, "")
        full = own.predict("inpaint", x, t, condition, "a hat")
        return nothing + 1.2 * (image - nothing) + 2.0 * (full - image)

    latents = own.denoise("inpaint", loaded.manifest.scheduler, "ddim", 5, 0, guided)
    options = {"image": source, "mask": mask, "guidance_scale": 2.0, "image_guidance_scale": 1.2}
    decoded = own.decode(latents)
    assert_close(loaded.run("inpaint", "a hat", paste_unmasked=False, **options), latents, decoded)
    pasted = np.asarray(loaded.run("inpaint", "a hat", **options).image)
    np.testing.assert_array_equal(pasted[:, 16:], np.asarray(source)[:, 16:])
    assert np.abs(pasted[:, :16].astype(int) - decoded[:, :16].astype(int)).max() <= 1


def test_guidance_scale_one_is_the_conditional_prediction(loaded: Runtime, parts: Any) -> None:
    own, nothing = Expected(parts), torch.zeros(1, 0, 8, 8)
    with torch.no_grad():
        latents = own.denoise(
            "t2i", loaded.manifest.scheduler, "ddim", 5, 0, lambda x, t: own.predict("t2i", x, t, nothing, "dog")
        )
        assert_close(loaded.run("t2i", "dog", guidance_scale=1), latents, own.decode(latents))


def test_pictures_may_be_files_of_any_size(loaded: Runtime, tmp_path: Path) -> None:
    large, mask = picture((50, 70)), left_half((64, 10))
    large.save(tmp_path / "a.png")
    mask.save(tmp_path / "m.png")
    files = loaded.run("inpaint", "x", image=tmp_path / "a.png", mask=str(tmp_path / "m.png"), steps=2)
    opened = loaded.run("inpaint", "x", image=large, mask=mask, steps=2)
    assert files.image.size == (32, 32)
    np.testing.assert_array_equal(files.latents, opened.latents)


def test_noise_is_the_seeds_or_given(loaded: Runtime) -> None:
    noise = np.random.Generator(np.random.PCG64(5)).standard_normal((1, 4, 8, 8), dtype=np.float32)
    given = loaded.run("t2i", "a", latents=noise, seed=99)
    np.testing.assert_array_equal(given.latents, loaded.run("t2i", "a", seed=5).latents)
    assert not np.array_equal(given.latents, loaded.run("t2i", "a", seed=6).latents)
    with pytest.raises(ConfigError, match="latents have the shape"):
        loaded.run("t2i", "a", latents=noise[:, :3])
    with pytest.raises(ConfigError, match="-1 is not a seed"):
        loaded.run("t2i", "a", seed=-1)


def test_tasks_do_not_leave_traces_in_each_other(loaded: Runtime) -> None:
    first = loaded.run("t2i", "a", steps=3).latents
    loaded.run("edit", "b", image=picture(), steps=2)
    loaded.run("sr", image=picture(), steps=2)
    np.testing.assert_array_equal(loaded.run("t2i", "a", steps=3).latents, first)


def test_progress_and_default_steps(loaded: Runtime) -> None:
    seen: list[tuple[int, int]] = []
    loaded.run("t2i", "a", progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 5), (2, 5), (3, 5), (4, 5), (5, 5)]
    assert (loaded.steps("t2i"), loaded.steps("t2i", 9)) == (5, 9)


def test_engines_are_opened_when_needed_and_kept(tiny_bundle: Any) -> None:
    with runtime.load(tiny_bundle[0]) as fresh:
        assert fresh.networks.engines == {}
        fresh.run("t2i", "a", steps=1)
        opened = dict(fresh.networks.engines)
        assert {path.split("/")[0] for path in opened} == {"text_encoder", "unet", "vae_decoder"}
        fresh.run("t2i", "b", steps=1)
        assert fresh.networks.engines == opened
    assert fresh.networks.engines == {}


def test_a_prompt_is_encoded_once_and_by_itself(tiny_bundle: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with runtime.load(tiny_bundle[0]) as fresh:
        encoder = fresh.networks.open(fresh.manifest.text.engine)
        run = Mock(wraps=encoder._run)  # type: ignore[attr-defined]
        monkeypatch.setattr(encoder, "_run", run)
        first = fresh.run("t2i", "red", steps=1).latents
        assert run.call_count == 2  # the prompt and the empty one
        fresh.run("t2i", "blue", steps=1)
        assert run.call_count == 3
        np.testing.assert_array_equal(fresh.run("t2i", "red", steps=1).latents, first)
        assert run.call_count == 3
        for other in range(networks.PROMPTS):
            fresh.run("t2i", str(other), steps=1)
        np.testing.assert_array_equal(fresh.run("t2i", "red", steps=1).latents, first)
        assert run.call_count == 3 + networks.PROMPTS + 1  # forgotten, unlike the empty one that every picture needs


@pytest.mark.parametrize("guidance_batch", [1, 2, None])
def test_the_text_encoder_may_have_any_batch(copied: Path, loaded: Runtime, guidance_batch: int | None) -> None:
    path = copied / "text_encoder/openvino_model.xml"
    model = openvino.Core().read_model(path)
    model.reshape([-1 if guidance_batch is None else guidance_batch, 16])
    other = path.with_name("other.xml")
    openvino.save_model(model, other, compress_to_fp16=False)
    del model
    for suffix in (".xml", ".bin"):
        other.with_suffix(suffix).replace(path.with_suffix(suffix))
    bundle.write(copied, bundle.read(copied, verify=False))
    changed = runtime.load(copied)
    expected = loaded.run("edit", "red", image=picture(), steps=2).latents
    np.testing.assert_allclose(changed.run("edit", "red", image=picture(), steps=2).latents, expected, atol=1e-5)


CAT, MASK = picture(), left_half()


@pytest.mark.parametrize(
    ("task", "arguments", "words"),
    [
        ("paint", {"prompt": "a"}, "unknown task 'paint'"),
        ("t2i", {}, "'t2i' needs a prompt"),
        ("t2i", {"prompt": "  \n"}, "'t2i' needs a prompt"),
        ("edit", {"image": CAT}, "'edit' needs a prompt"),
        ("edit", {"prompt": "a"}, "'edit' needs a picture"),
        ("edit", {"prompt": "a", "image": CAT, "mask": MASK}, "'edit' has no use for a mask"),
        ("inpaint", {"prompt": "a", "image": CAT}, "'inpaint' needs a mask"),
        ("inpaint", {"prompt": "a", "mask": MASK}, "'inpaint' needs a picture"),
        ("t2i", {"prompt": "a", "image": CAT}, "'t2i' has no use for a picture"),
        ("sr", {"image": CAT, "guidance_scale": 2.0}, "--guidance has no effect"),
        ("sr", {"image": CAT, "negative_prompt": "x"}, "--negative-prompt has no effect"),
        ("t2i", {"prompt": "a", "image_guidance_scale": 2.0}, "--image-guidance has no effect"),
        ("t2i", {"prompt": "a", "guidance_scale": float("nan")}, "guidance scale of nan"),
        ("t2i", {"prompt": "a", "steps": 0}, "0 steps"),
        ("t2i", {"prompt": "a", "scheduler": "plms"}, "unknown sampler 'plms'"),
    ],
)
def test_impossible_requests(loaded: Runtime, task: str, arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        loaded.run(task, **arguments)
    assert words in caught.value.message
    assert caught.value.hint
    if task == "paint":
        assert "t2i, edit, sr, inpaint" in caught.value.hint


def test_a_file_that_is_not_a_picture(loaded: Runtime, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("hello")
    with pytest.raises(InputError, match="is not a picture"):
        loaded.run("edit", "x", image=tmp_path / "a.png")


def test_nan_in_the_unet_names_the_step(copied: Path) -> None:
    """An engine whose output overflows below timestep 700: steps 1 and 2 of 5 are fine, step 3 is not."""
    from openvino import opset13 as ops

    path = copied / "unet/openvino_model.xml"
    model = openvino.Core().read_model(path)
    timestep = next(node for node in model.get_parameters() if "timestep" in node.output(0).names)
    late = ops.convert(ops.less(timestep, ops.constant(np.float32(700))), "f32")
    result = model.get_results()[0]
    broken = ops.divide(result.input_value(0), ops.subtract(ops.constant(np.float32(1)), late))
    names = set(result.input_value(0).names)
    result.input_value(0).set_names(set())
    result.input(0).replace_source_output(broken.output(0))
    broken.output(0).set_names(names)
    openvino.save_model(model, copied / "unet/new.xml", compress_to_fp16=False)
    del model
    for suffix in (".xml", ".bin"):
        (copied / "unet/new").with_suffix(suffix).replace(path.with_suffix(suffix))
    bundle.write(copied, bundle.read(copied, verify=False))
    broken_bundle = runtime.load(copied)
    broken_bundle.run("t2i", "a", steps=1)
    found = r"UNet of task 't2i' gave 512 NaN or Inf values of 512 in step 3 of 5 \(timestep 599\)"
    with pytest.raises(NotFiniteError, match=found) as caught:
        broken_bundle.run("t2i", "a", steps=5)
    assert (caught.value.network, caught.value.task, caught.value.step) == ("unet", "t2i", 3)
    assert caught.value.exit_code == EXIT_ACCURACY
    assert "a wider type does not help" in str(caught.value.hint)  # the bundle is float32 already


def test_an_engine_of_another_task_is_refused(copied: Path) -> None:
    raw = json.loads((copied / "manifest.json").read_text())
    raw["tasks"]["edit"]["engine"]["path"] = "unet/openvino_model.xml"
    (copied / "manifest.json").write_bytes(_sealed(raw))
    with pytest.raises(BundleError, match=r"unet/openvino_model\.xml takes 'sample' as float32 \[2, 4, 8, 8\]"):
        runtime.load(copied).run("edit", "x", image=picture())


def test_a_tampered_bundle_is_not_opened(copied: Path) -> None:
    weights = copied / "unet_sr/openvino_model.bin"
    content = bytearray(weights.read_bytes())
    content[17] ^= 1
    weights.write_bytes(content)
    with pytest.raises(BundleError, match=r"unet_sr/openvino_model\.bin"):
        runtime.load(copied)
    runtime.load(copied, verify=False).run("t2i", "a", steps=1)


def test_a_link_that_is_switched_keeps_the_verified_bundle(copied: Path, tiny_bundle: Any) -> None:
    link = copied.with_name("current")
    link.symlink_to(tiny_bundle[0])
    opened = runtime.load(link)
    link.unlink()
    link.symlink_to(copied)
    shutil.rmtree(copied)
    opened.run("t2i", "a", steps=1)


def test_a_bundle_without_a_vae_encoder(copied: Path) -> None:
    raw = json.loads((copied / "manifest.json").read_text())
    raw["vae_encoder"] = None
    (copied / "manifest.json").write_bytes(_sealed(raw))
    without = runtime.load(copied)
    without.run("t2i", "a", steps=1)
    with pytest.raises(BundleError, match="no VAE encoder"):
        without.run("edit", "x", image=picture())


def half_transparent(size: tuple[int, int]) -> Image.Image:
    layer = picture(size).convert("RGBA")
    layer.putalpha(Image.eval(left_half(size), lambda value: 255 - value))
    return layer


@pytest.mark.parametrize("size", [(64, 32), (32, 64), (90, 40)])
def test_a_picture_of_other_proportions_is_the_same_as_its_fitted_self(loaded: Runtime, size: tuple[int, int]) -> None:
    source, mask = picture(size), left_half(size)
    middle = ((size[0] - min(size)) // 2, (size[1] - min(size)) // 2)
    square = (*middle, middle[0] + min(size), middle[1] + min(size))
    cropped = loaded.run("inpaint", "red", image=source, mask=mask, steps=2, fit="crop")
    by_hand = loaded.run("inpaint", "red", image=source.crop(square), mask=mask.crop(square), steps=2)
    np.testing.assert_allclose(cropped.latents, by_hand.latents, atol=1e-3)  # the filter sees beyond the crop
    stretched = loaded.run("inpaint", "red", image=source, mask=mask, steps=2, fit="stretch")
    small = source.resize((32, 32), Image.Resampling.BICUBIC), mask.resize((32, 32), Image.Resampling.NEAREST)
    by_hand = loaded.run("inpaint", "red", image=small[0], mask=small[1], steps=2)
    np.testing.assert_allclose(stretched.latents, by_hand.latents, atol=1e-5)
    padded = loaded.run("inpaint", "red", image=source, mask=mask, steps=2, fit="pad")
    assert padded.frame is not None and padded.image.size == (32, 32)  # of the engine's size, borders and all
    left, top, right, bottom = padded.frame.place
    assert (right - left) * (bottom - top) < 32 * 32
    assert len({result.latents.tobytes() for result in (cropped, stretched, padded)}) == 3


def test_the_bundle_says_how_pictures_are_fitted(copied: Path) -> None:
    made = bundle.read(copied)
    assert made.fit == "stretch"  # as a bundle that says nothing of it
    bundle.write(copied, replace(made, fit="crop"))
    wide = picture((64, 32))
    with runtime.load(copied) as changed:
        default = changed.run("edit", "red", image=wide, steps=1).latents
        np.testing.assert_array_equal(default, changed.run("edit", "red", image=wide, steps=1, fit="crop").latents)
        assert not np.array_equal(default, changed.run("edit", "red", image=wide, steps=1, fit="stretch").latents)


def test_transparency_repaints_as_white_does(loaded: Runtime) -> None:
    white = loaded.run("inpaint", "red", image=CAT, mask=MASK, steps=2)
    clear = loaded.run("inpaint", "red", image=CAT, mask=half_transparent((32, 32)), steps=2)
    np.testing.assert_array_equal(white.image, clear.image)
    other = loaded.run("inpaint", "red", image=CAT, mask=half_transparent((32, 32)), mask_mode="white", steps=2)
    assert not np.array_equal(white.image, other.image)


def test_what_may_not_be_meant_is_said_before_the_first_step_and_in_the_result(loaded: Runtime) -> None:
    said: list[str] = []

    def run(task: str = "inpaint", prompt: str = "red", **arguments: Any) -> list[str]:
        said.clear()
        result = loaded.run(
            task,
            prompt,
            steps=1,
            notify=lambda notice: said.append(notice.kind),
            progress=lambda done, total: said.append("step"),
            **arguments,
        )
        found = [notice.kind for notice in result.notices]
        assert said == [*found, "step"]
        return found

    long = "words that go on and on and on"
    assert run(image=CAT, mask=MASK) == []
    assert run("t2i", long) == ["prompt-cut"]
    assert run("t2i", long, negative_prompt=long) == ["prompt-cut", "prompt-cut"]
    assert run("sr", "", image=CAT) == []
    assert run(image=CAT, mask=Image.new("L", (32, 32))) == ["mask-empty"]
    assert run(image=CAT, mask=Image.new("L", (32, 32), 255)) == ["mask-full"]
    assert run(image=CAT, mask=Image.new("L", (32, 32), 1)) == ["mask-zero-one", "mask-full"]
    edge = Image.new("L", (96, 32))
    edge.paste(255, (0, 0, 9, 32))  # outside of the middle
    assert run(image=picture((96, 32)), mask=edge, fit="crop") == ["mask-empty"]
    assert run(image=picture((96, 32)), mask=edge, fit="pad") == []


def test_unknown_ways_are_refused(loaded: Runtime) -> None:
    for wrong in ({"fit": "zoom"}, {"mask_mode": "black"}):
        with pytest.raises(ConfigError):
            loaded.run("inpaint", "red", image=CAT, mask=MASK, **wrong)
