"""Prompts as people type them give what is meant: no other picture that the example's prompts are about is nearer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from examples.emoji import typed
from mtu_compile import runtime
from mtu_compile.compile import BuildOptions, build
from mtu_compile.model.pipeline import MTUPipeline

MODEL = Path(typed.__file__).with_name("model")
PROMPTS = ("red apple", "a happy face with sunglasses", "make it dark skin tone", "make the hair red")


def understood(maker: typed.Maker) -> list[str]:
    """Of ``PROMPTS`` those whose picture is nearest to what is meant, source and all other pictures counted."""
    rows = typed.read()
    every = np.stack([np.asarray(Image.open(path).convert("RGB")) for path in sorted(typed.FOLDER.glob("*.png"))])
    found = []
    for prompt in PROMPTS:
        (one,) = (row for row in rows if row.prompt == prompt)
        best = every[typed.nearest(maker(one.task, prompt, one.source), every)]
        if np.array_equal(best, np.asarray(one.wanted)):
            found.append(prompt)
    return found


def test_a_prompt_that_is_not_obeyed_is_not_understood() -> None:
    """An edit that leaves its source as it is, and a picture of something else."""
    red_apple = typed.read()[0].wanted
    assert understood(lambda task, prompt, source: source or red_apple) == ["red apple"]


def test_the_float_model_understands_what_people_type() -> None:
    pipeline = MTUPipeline.from_pretrained(MODEL)

    def make(task: str, prompt: str, source: Image.Image | None) -> Image.Image:
        image: Image.Image = pipeline(prompt, task=task, image=source, seed=typed.SEED).images[0]
        return image

    assert understood(make) == list(PROMPTS)


@pytest.mark.slow
def test_an_int8_bundle_does_too(tmp_path: Path) -> None:
    """As a user builds it: the model's own thresholds are of so many pictures, and of layers that stay float."""
    build(BuildOptions(MODEL, tmp_path / "b", tasks=("t2i", "edit"), precision="int8"))
    with runtime.load(tmp_path / "b") as loaded:
        made = understood(lambda task, prompt, source: loaded.run(task, prompt, image=source, seed=typed.SEED).image)
    assert made == list(PROMPTS)
