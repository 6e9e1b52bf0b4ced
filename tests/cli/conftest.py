"""A tiny multi-task model with its samples, and a bundle built from it by the real line."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

from mtu_compile.runtime import cpu_isa
from tests.commands import Commands, Outcome, some_levels

TASKS = [
    {"name": "t2i", "guidance": "text", "guidance_scale": 2.0},
    {
        "name": "inpaint",
        "condition": ["mask", "masked_image"],
        "guidance": "text+image",
        "guidance_scale": 2.0,
        "image_guidance_scale": 1.5,
    },
]


@pytest.fixture(scope="module", autouse=True)
def few_levels() -> Iterator[None]:
    """Checks in this process try two instruction sets, as those of commands do (``tests.commands.serve``)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_isa, "up_to", some_levels)
        yield


@pytest.fixture(scope="session")
def mtu(run_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Outcome]]:
    """Run ``mtu-compile`` as a user does, in a process of its own.

    ``before`` is Python to run first, with ``fresh`` (as by default) before anything at all is imported.
    """
    commands = Commands(tmp_path_factory.mktemp("commands"), run_folder / "exports")

    def run(*arguments: object, cwd: Path | None = None, before: str = "", fresh: bool | None = None) -> Outcome:
        return commands.run(arguments, cwd, before, bool(before) if fresh is None else fresh)

    yield run
    commands.close()


def picture(seed: int, size: int = 32) -> Image.Image:
    """A coloured disc on white."""
    rng = np.random.default_rng(seed)
    image = Image.new("RGB", (size, size), "white")
    x, y, r = rng.integers(8, 24), rng.integers(8, 24), rng.integers(4, 12)
    ImageDraw.Draw(image).ellipse((x - r, y - r, x + r, y + r), fill=tuple(int(c) for c in rng.integers(0, 200, 3)))
    return image


#: The rest of a prompt, of which "long" is beyond the tiny text encoder's length.
LONG = " words too long"


def write_samples(folder: Path, tasks: Sequence[dict[str, Any]], rows: int = 6) -> None:
    for task in tasks:
        place = folder / task["name"]
        place.mkdir(parents=True)
        lines = []
        for i in range(rows):
            picture(i).save(place / f"{i}.png")
            # the last, which is for checks, is longer than the text encoder's 14 tokens
            row = {"file_name": f"{i}.png", "prompt": f"disc {chr(97 + i)}{LONG if i == rows - 1 else ''}"}
            lines.append(json.dumps(row | ({"split": "check"} if i >= rows - 2 else {})))
        (place / "metadata.jsonl").write_text("\n".join(lines) + "\n")


def tell_tasks_apart(unet: Any) -> None:
    """Change an upcycled UNet as training does: its tasks differ, and text and conditions matter to it.

    Without that, guidance has no direction that an accuracy gate could judge.
    """
    import torch

    generator = torch.Generator().manual_seed(1)
    scale = {"task_conv_in": 0.5, ".ff.": 0.1, "task_embedding": 0.1, "attn2.to_v": 0.5, "attn2.to_out": 0.5}
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            for part, size in scale.items():
                if part in name:
                    parameter += size * torch.randn(parameter.shape, generator=generator)


@pytest.fixture(scope="session")
def tiny_model(base_pipeline_dir: Path, made_once: Any, mtu: Callable[..., Outcome]) -> Path:
    """An MTU pipeline folder whose tasks differ, with samples."""

    def make(place: Path) -> None:
        from mtu_compile.model.pipeline import MTUPipeline

        tasks = place / "tasks.json"
        tasks.write_text(json.dumps(TASKS))
        fresh, model = place / "fresh", place / "tiny"
        done = mtu("upcycle", base_pipeline_dir, "-o", fresh, "--tasks", tasks, "--d-task", 16, "--router-width", 16)
        assert done.code == 0, done.err
        pipeline = MTUPipeline.from_pretrained(fresh)
        tell_tasks_apart(pipeline.unet)
        pipeline.save_pretrained(model)
        write_samples(model / "samples", TASKS)

    return made_once("model", make) / "tiny"


BUILD = ("--steps", 4, "--calibration-pictures", 3, "--check-pictures", 2)


@pytest.fixture
def stricter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thresholds that no text-to-image in INT8 meets; not in ``tmp_path``, which tests look into."""
    file = tmp_path_factory.mktemp("thresholds") / "stricter.json"
    file.write_text('{"format": "mtu-thresholds-1", "thresholds": {"int8": {"t2i": {"ssim": 1.1}}}}')
    return file


@pytest.fixture(scope="session")
def build_once(made_once: Any, mtu: Callable[..., Outcome]) -> Callable[..., Path]:
    """``build_once(model, *options)``: the bundle that ``mtu-compile build`` makes of them, made once a run.

    The bundle is everybody's: copy it to change it.
    """

    def get(model: Path, *options: object) -> Path:
        words = [str(option) for option in options]
        name = sha256(json.dumps([str(model), *words]).encode()).hexdigest()[:16]

        def make(folder: Path) -> None:
            done = mtu("build", model, "-o", folder / "bundle", *options)
            assert done.code == 0, done.err

        return made_once(f"bundle-{name}", make) / "bundle"

    return get


@pytest.fixture(scope="session")
def tiny_bundle(tiny_model: Path, build_once: Callable[..., Path]) -> Path:
    """The tiny model as an INT8 bundle; what random weights lose in INT8 is not for an accuracy gate to judge."""
    return build_once(tiny_model, "--target", "cpu", "--int8", "--accuracy-gate", "warn", *BUILD)


@pytest.fixture(scope="session")
def float_bundle(tiny_model: Path, build_once: Callable[..., Path]) -> Path:
    """The tiny model as a float32 bundle that passed its accuracy gate."""
    return build_once(tiny_model, "--target", "cpu", "--fp32", *BUILD)


SHARED = ("--routing", "shared", "--target", "cpu")


@pytest.fixture(scope="session")
def shared_float(tiny_model: Path, build_once: Callable[..., Path]) -> Path:
    """``float_bundle`` with one UNet for all tasks."""
    return build_once(tiny_model, *SHARED, "--fp32", *BUILD)


@pytest.fixture(scope="session")
def shared_int8(tiny_model: Path, build_once: Callable[..., Path]) -> Path:
    """``tiny_bundle`` with one UNet for all tasks."""
    return build_once(tiny_model, *SHARED, "--int8", "--accuracy-gate", "warn", *BUILD)
