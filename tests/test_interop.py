"""Other tools open an Intel bundle as it is, and make the picture we make from the same noise."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from PIL import Image

from mtu_compile import bundle as bundles
from mtu_compile import runtime
from mtu_compile.accuracy.formulas import psnr_db
from tests.conftest import MadeOnce

MODEL = Path(__file__).parents[1] / "examples" / "emoji" / "model"
#: Where ``make interop`` installs optimum-intel, which takes older transformers than this project.
OPTIMUM = Path(__file__).parents[1] / ".venv-optimum" / "bin" / "python"
STEPS = 8
F32 = {"INFERENCE_PRECISION_HINT": "f32"}
#: OpenVINO GenAI cuts fractions off where we round to the nearest grey: half a grey apart on average (53 dB).
SAME_DB = 50.0

pytestmark = pytest.mark.heavy


def example_in_float(folder: Path, cache: Path, routing: Literal["static", "shared"]) -> Path:
    """The example's text-to-image and inpainting tasks for a CPU, in float32."""
    from mtu_compile.compile import BuildOptions, build

    tasks = ("t2i", "inpaint")
    few = {"steps": 2, "check_pictures": 1}
    options = BuildOptions(
        MODEL, folder / "bundle", precision="fp32", tasks=tasks, routing=routing, gate="off", cache=cache, **few
    )
    return build(options).path


@pytest.fixture(scope="module")
def bundle(made_once: MadeOnce, run_folder: Path, shared_exports: Path) -> Path:
    """With a UNet for each task."""
    cache = run_folder / "interop-cache"
    return made_once("interop", lambda folder: example_in_float(folder, cache, "static")) / "bundle"


@pytest.fixture(scope="module")
def ours(bundle: Path) -> Iterator[runtime.Runtime]:
    with runtime.load(bundle) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def noise() -> np.ndarray:
    return np.random.default_rng(7).standard_normal((1, 4, 16, 16), dtype=np.float32)


@pytest.fixture(scope="session")
def genai() -> Any:
    """Session-wide, so that it is asked for before the bundle is built."""
    return pytest.importorskip("openvino_genai", reason="pip install openvino-genai")


def given(genai: Any, noise: np.ndarray) -> Any:
    """A source of noise for OpenVINO GenAI: first what we start from, then, for the autoencoder's mean, zeros."""
    import openvino

    class Given(genai.Generator):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.asked = 0

        def next(self) -> float:
            raise AssertionError("single numbers are not drawn")

        def randn_tensor(self, shape: Any) -> Any:
            assert tuple(shape) == noise.shape
            self.asked += 1
            return openvino.Tensor(noise.copy() if self.asked == 1 else np.zeros_like(noise))

    return Given()


def unet_of(genai: Any, bundle: Path, task: str) -> Any:
    """A task's UNet in OpenVINO GenAI, whose weights lie with those of the first task."""
    import openvino

    manifest = bundles.read(bundle, verify=False)
    engine = manifest.tasks[task].engine
    assert engine.weights == "unet/openvino_model.bin"
    graph = bundle / engine.path
    weights = openvino.Tensor(np.memmap(bundle / engine.weights, np.uint8, "c"))
    config = genai.UNet2DConditionModel.Config(str(graph.with_name("config.json")))
    return genai.UNet2DConditionModel(graph.read_text(), weights, config, manifest.vae_scale)


def sample(task: str) -> Mapping[str, Any]:
    rows = (MODEL / "samples" / task / "metadata.jsonl").read_text().splitlines()
    return dict(json.loads(rows[0]))


def same(ours: Image.Image, theirs: np.ndarray) -> float:
    """PSNR in decibels; a flat picture would equal any other flat one."""
    picture = np.asarray(ours)
    assert picture.shape == theirs.shape and picture.std() > 20
    return psnr_db(picture / 255, theirs / 255, peak=1.0)


@pytest.mark.parametrize("prompt", ["red heart", "a very long prompt about a red heart " * 12])
def test_openvino_genai_makes_our_picture(genai, bundle, ours, noise, prompt):
    """The scheduler of the example is DDIM with v-prediction, zero terminal SNR and trailing timesteps."""
    pipeline = genai.Text2ImagePipeline(str(bundle), "CPU", **F32)
    source = given(genai, noise)
    theirs = pipeline.generate(prompt, generator=source, num_inference_steps=STEPS, guidance_scale=3.0)
    assert source.asked == 1
    expected = ours.run("t2i", prompt, steps=STEPS, guidance_scale=3.0, latents=noise).image
    assert same(expected, theirs.data[0]) > SAME_DB


def test_another_seed_or_prompt_is_another_picture(genai, bundle, ours, noise):
    pipeline = genai.Text2ImagePipeline(str(bundle), "CPU", **F32)
    theirs = pipeline.generate(
        "red heart", generator=given(genai, noise), num_inference_steps=STEPS, guidance_scale=3.0
    ).data[0]
    for prompt, latents in (("red heart", noise[..., ::-1].copy()), ("green apple", noise)):
        assert same(ours.run("t2i", prompt, steps=STEPS, latents=latents).image, theirs) < SAME_DB - 10


def test_openvino_genai_takes_the_network_at_other_batches(genai, bundle, noise):
    """Without guidance it asks one sample of a network that was built for two."""
    pipeline = genai.Text2ImagePipeline(str(bundle))
    pipeline.reshape(1, 64, 64, 1.0)
    pipeline.compile("CPU", **F32)
    alone = pipeline.generate("red heart", generator=given(genai, noise), num_inference_steps=STEPS, guidance_scale=1.0)
    guided = genai.Text2ImagePipeline(str(bundle), "CPU", **F32)
    # At a scale of almost one the unconditional sample cancels out.
    both = guided.generate("red heart", generator=given(genai, noise), num_inference_steps=STEPS, guidance_scale=1.0001)
    assert same(Image.fromarray(alone.data[0]), both.data[0]) > SAME_DB


def test_openvino_genai_repaints_as_we_do(genai, bundle, ours, noise):
    """Its inpainting has the anatomy of ours and text guidance alone, which is ours at an image scale of 1."""
    import openvino

    scheduler = genai.Scheduler.from_config(str(bundle / "scheduler" / "scheduler_config.json"))
    pipeline = genai.InpaintingPipeline.stable_diffusion(
        scheduler,
        genai.CLIPTextModel(str(bundle / "text_encoder")),
        unet_of(genai, bundle, "inpaint"),
        genai.AutoencoderKL(str(bundle / "vae_encoder"), str(bundle / "vae_decoder")),
    )
    pipeline.reshape(1, 64, 64, 2.5)
    pipeline.compile("CPU", **F32)
    row = sample("inpaint")
    folder = MODEL / "samples" / "inpaint"
    image = Image.open(folder / row["file_name"]).convert("RGB")
    # Cells of 4 pixels are all in or all out, so that how a mask is shrunk makes no difference.
    inside = np.kron(np.pad(np.ones((8, 8)), 4), np.ones((4, 4))).astype(np.uint8) * 255
    theirs = pipeline.generate(
        row["prompt"],
        openvino.Tensor(np.asarray(image)[None].copy()),
        openvino.Tensor(np.repeat(inside[None, ..., None], 3, axis=-1).copy()),
        generator=given(genai, noise),
        num_inference_steps=STEPS,
        guidance_scale=2.5,
        strength=1.0,
    )
    expected = ours.run(
        "inpaint",
        row["prompt"],
        image=image,
        mask=Image.fromarray(inside),
        steps=STEPS,
        guidance_scale=2.5,
        image_guidance_scale=1.0,
        latents=noise,
        paste_unmasked=False,
    ).image
    assert same(expected, theirs.data[0]) > SAME_DB


def test_nothing_was_changed_by_opening_it(genai, bundle):
    genai.Text2ImagePipeline(str(bundle), "CPU", **F32)
    bundles.read(bundle)


@pytest.fixture(scope="module")
def exported(made_once: MadeOnce, run_folder: Path, shared_exports: Path) -> Path:
    """The text-to-image task of a bundle with one UNet for all tasks, as ``export-static`` writes it."""
    from mtu_compile.export_static import export_static

    def make(folder: Path) -> None:
        export_static(example_in_float(folder, run_folder / "interop-cache", "shared"), "t2i", folder / "out")

    return made_once("interop-shared", make) / "out"


def test_openvino_genai_opens_one_task_of_a_shared_bundle(genai, exported, ours, noise):
    pipeline = genai.Text2ImagePipeline(str(exported), "CPU", **F32)
    source = given(genai, noise)
    theirs = pipeline.generate("red heart", generator=source, num_inference_steps=STEPS, guidance_scale=3.0)
    assert source.asked == 1
    expected = ours.run("t2i", "red heart", steps=STEPS, guidance_scale=3.0, latents=noise).image
    assert same(expected, theirs.data[0]) > SAME_DB


OPEN_WITH_OPTIMUM = """
import sys
import numpy as np
import torch
from optimum.intel import OVStableDiffusionPipeline

bundle, noise, steps, prompt, out = sys.argv[1:]
pipeline = OVStableDiffusionPipeline.from_pretrained(bundle, ov_config={"INFERENCE_PRECISION_HINT": "f32"})
latents = torch.from_numpy(np.load(noise))
made = pipeline(prompt, latents=latents, num_inference_steps=int(steps), guidance_scale=3.0, output_type="np")
np.save(out, made.images[0])
"""


@pytest.mark.slow
@pytest.mark.skipif(not OPTIMUM.exists(), reason="make interop: optimum-intel takes older transformers than we do")
def test_optimum_intel_makes_our_picture(bundle, ours, noise, tmp_path):
    np.save(tmp_path / "noise.npy", noise)
    files = [str(tmp_path / "noise.npy"), str(STEPS), "red heart", str(tmp_path / "out.npy")]
    subprocess.run([str(OPTIMUM), "-c", OPEN_WITH_OPTIMUM, str(bundle), *files], check=True, stdout=sys.stderr)
    theirs = np.round(np.load(tmp_path / "out.npy") * 255).astype(np.uint8)
    expected = ours.run("t2i", "red heart", steps=STEPS, guidance_scale=3.0, latents=noise).image
    assert same(expected, theirs) > 60
    bundles.read(bundle)
