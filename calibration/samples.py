"""Prompts, pictures and masks of one task, read from a data folder: what calibration and checks run on."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from mtu_compile.core.errors import CalibrationError, InputError
from mtu_compile.core.masks import random_mask
from mtu_compile.core.notices import Notice
from mtu_compile.core.rows import CHECK_SPLIT, Row, read_rows
from mtu_compile.core.tasks import Task
from mtu_compile.runtime import images
from mtu_compile.runtime.fitting import fit_mask
from mtu_compile.runtime.masks import read_mask
from mtu_compile.steps.key import NOT_CONTENT


@dataclass(frozen=True)
class Sample:
    """What a user would hand to the task.

    Attributes:
        prompt: the text.
        image: source picture (RGB), for tasks with a picture in their condition.
        mask: white where to repaint (L, the source picture's size), for tasks with a mask.
        target: the wanted picture (RGB), where the data has one.
        split: ``"check"`` for rows kept for accuracy checks.
        place: file and line it comes from, for messages.
        notices: what there is to say of how its files were read.
    """

    prompt: str
    image: Image.Image | None = None
    mask: Image.Image | None = None
    target: Image.Image | None = None
    split: str | None = None
    place: str = field(default="", metadata=NOT_CONTENT)
    notices: tuple[Notice, ...] = field(default=(), metadata=NOT_CONTENT)


def load_samples(folder: Path, task: Task, *, limit: int | None = None) -> tuple[Sample, ...]:
    """The rows of ``folder/<task>/metadata.jsonl``, with their pictures.

    A super-resolution source that is not there is made from the target, ``task.downscale`` times smaller; a mask that
    is not there is a random one, the same every time.

    Args:
        folder: data folder with one folder a task.
        task: which one.
        limit: read no more rows than this.

    Raises:
        CalibrationError: the folder has no data for the task, or a row lacks what the task needs (file and line named).
        InputError: a bad row, a picture that is not one, or a path that leaves the folder.
    """
    place = folder / task.name
    if not place.is_dir():
        raise CalibrationError(
            f"there are no samples for task {task.name!r}: {place} is not a folder",
            hint=f"write {place}/metadata.jsonl, one JSON object a line, with the pictures beside it",
        )
    return tuple(_sample(task, row) for row in read_rows(place)[:limit])


def split_samples(
    folder: Path, task: Task, *, calibrating: int, checking: int
) -> tuple[tuple[Sample, ...], tuple[Sample, ...]]:
    """Rows of ``folder/<task>`` to calibrate with, and rows to check with: those marked ``check``, else every fourth.

    Args:
        calibrating: at most this many of the first.
        checking: at most this many of the second.

    Raises:
        CalibrationError: no such folder, too few rows, or rows without a prompt of a task that is guided by text.
        InputError: as ``load_samples``.
    """
    if not folder.is_dir():
        raise CalibrationError(
            f"there are no samples for task {task.name!r}: {folder} is not a folder",
            hint=f"give --data DIR, where DIR/{task.name}/metadata.jsonl has 8 or more lines like {example_row(task)}",
        )
    rows = load_samples(folder, task)
    if task.guidance != "none" and not all(row.prompt.strip() for row in rows):
        raise CalibrationError(
            f"{folder / task.name} has rows without a prompt, and task {task.name!r} is guided by text",
            hint="give each row a prompt",
        )
    held_out = tuple(row for row in rows if row.split == CHECK_SPLIT) or rows[3::4]
    rest = tuple(row for row in rows if row not in held_out)
    if not rest or not held_out:
        raise CalibrationError(
            f"{folder / task.name} has {len(rows)} rows, too few to calibrate and to check with", hint="give 8 or more"
        )
    return rest[:calibrating], held_out[:checking]


def example_row(task: Task) -> str:
    """A line of ``metadata.jsonl`` with what ``task`` cannot do without; the pictures lie beside the file."""
    row = {} if task.guidance == "none" else {"prompt": "a red apple"}
    if "image" in task.condition and task.downscale is None:
        row["image_file_name"] = "1.png"
    elif task.condition:
        row["file_name"] = "1.png"
    return json.dumps(row)


def _sample(task: Task, row: Row) -> Sample:
    target = None if row.target is None else _open(row, row.target)
    image = None
    if {"image", "masked_image"} & set(task.condition):
        image = _source(task, row, target)
    mask, notices = None, tuple[Notice, ...]()
    if {"mask", "masked_image"} & set(task.condition):
        assert image is not None
        mask, notices = _mask(row, image.size)
    return Sample(row.prompt, image, mask, target, row.split, row.place, notices)


def _source(task: Task, row: Row, target: Image.Image | None) -> Image.Image:
    if row.image is not None:
        return _open(row, row.image)
    if target is not None and task.downscale is not None:
        return target.reduce(task.downscale)  # means over squares
    if target is not None and "image" not in task.condition:
        return target
    raise CalibrationError(
        f"{row.place}: task {task.name!r} needs a source picture", hint="add image_file_name to the row"
    )


def _mask(row: Row, size: tuple[int, int]) -> tuple[Image.Image, tuple[Notice, ...]]:
    width, height = size
    if row.mask is not None:
        selected, notices = read_mask(_open(row, row.mask, rgb=False))
        laid_over = fit_mask(selected, (height, width), "stretch")
        return Image.fromarray((laid_over * 255).astype(np.uint8)), notices
    name = (row.target or row.image or Path(row.place)).name
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
    return Image.fromarray(random_mask(np.random.default_rng(seed), height, width)), ()


def _open(row: Row, path: Path, *, rgb: bool = True) -> Image.Image:
    try:
        picture = images.open_image(path)
    except InputError as error:
        raise InputError(f"{row.place}: {error.message}", hint=error.hint) from error
    return images.flatten(picture) if rgb else picture
