"""Rows of a data folder as samples: sources, seeded masks, splits, and every kind of bad row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from calibration.notices import row_notices
from calibration.samples import load_samples, split_samples
from mtu_compile.core.errors import CalibrationError, InputError, MtuError
from mtu_compile.core.tasks import PAPER_TASKS, Task

T2I, EDIT, SR, INPAINT = PAPER_TASKS


def write(folder: Path, task: Task, *rows: Any) -> Path:
    place = folder / task.name
    place.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(1)
    for name in ("a.png", "b.png"):
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(place / name)
    Image.fromarray(np.tril(np.full((64, 64), 255, np.uint8))).save(place / "mask.png")
    (place / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return place


def test_prompts_alone_are_enough_for_text_to_image(tmp_path: Path) -> None:
    write(tmp_path, T2I, {"prompt": "a cat"}, {"file_name": "a.png", "split": "check"}, {"prompt": "a dog"})
    first, second, _ = load_samples(tmp_path, T2I)
    assert first.prompt == "a cat" and first.image is first.mask is first.target is first.split is None
    assert second.prompt == "" and second.split == "check" and second.target is not None
    assert len(load_samples(tmp_path, T2I, limit=2)) == 2


def test_edit_has_its_source(tmp_path: Path) -> None:
    place = write(tmp_path, EDIT, {"file_name": "a.png", "image_file_name": "b.png", "prompt": "make it blue"})
    (sample,) = load_samples(tmp_path, EDIT)
    assert sample.image is not None and sample.target is not None and sample.mask is None
    assert np.array_equal(np.asarray(sample.image), np.asarray(Image.open(place / "b.png")))
    assert np.array_equal(np.asarray(sample.target), np.asarray(Image.open(place / "a.png")))


def test_super_resolution_starts_from_means_of_the_target(tmp_path: Path) -> None:
    place = write(tmp_path, SR, {"file_name": "a.png"}, {"image_file_name": "b.png"})
    made, given = load_samples(tmp_path, SR)
    pixels = np.asarray(Image.open(place / "a.png")).astype(float)
    means = pixels.reshape(8, 4, 8, 4, 3).mean(axis=(1, 3))
    assert made.image is not None and np.abs(np.asarray(made.image) - means).max() <= 0.5
    assert given.image is not None and given.image.size == (32, 32)


def test_masks_are_read_or_drawn_the_same_every_time(tmp_path: Path) -> None:
    rows = [{"file_name": "a.png", "mask_file_name": "mask.png"}, {"file_name": "a.png"}, {"file_name": "b.png"}]
    write(tmp_path, INPAINT, *rows)
    read, drawn, other = load_samples(tmp_path, INPAINT)
    _, again, _ = load_samples(tmp_path, INPAINT)
    masks = [np.asarray(sample.mask) for sample in (read, drawn, other, again)]
    assert all(mask.shape == (32, 32) and set(np.unique(mask)) == {0, 255} for mask in masks)
    assert abs(masks[0].mean() / 255 - 0.5) < 0.05 and masks[0][31, 0] == 255 and masks[0][0, 31] == 0
    assert np.array_equal(masks[1], masks[3]) and not np.array_equal(masks[1], masks[2])
    assert 0.1 <= masks[1].mean() / 255 <= 0.6
    assert read.image is not None and read.image == read.target


def test_transparent_pictures_are_on_white(tmp_path: Path) -> None:
    place = write(tmp_path, EDIT, {"image_file_name": "clear.png"})
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(place / "clear.png")
    (sample,) = load_samples(tmp_path, EDIT)
    assert sample.image is not None and sample.image.mode == "RGB" and np.asarray(sample.image).min() == 255


@pytest.mark.parametrize(
    ("row", "named"),
    [
        ({"image_file_name": "gone.png"}, "gone.png"),
        ({"image_file_name": "../a.png"}, "outside"),
        ({"image_file_name": "/etc/hostname"}, "outside"),
        ({"image_file_name": "metadata.jsonl"}, "not a picture"),
        ({"image_file_name": 1}, "image_file_name is 1, expected text"),
        ({"prompt": ["a"], "image_file_name": "a.png"}, 'prompt is \\["a"\\], expected text'),
        ({"file_name": "a.png"}, "needs a source picture"),
        ("a.png", "expected an object"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(tmp_path: Path, row: Any, named: str) -> None:
    (tmp_path / "a.png").touch()
    place = write(tmp_path, EDIT, {"image_file_name": "a.png"}, row)
    with pytest.raises(MtuError, match=named) as error:
        load_samples(tmp_path, EDIT)
    assert f"{place / 'metadata.jsonl'} line 2" in error.value.message and error.value.exit_code == 5


def test_a_link_that_leaves_the_folder_is_refused(tmp_path: Path) -> None:
    place = write(tmp_path, EDIT, {"image_file_name": "link.png"})
    (place / "a.png").rename(tmp_path / "a.png")
    (place / "link.png").symlink_to(tmp_path / "a.png")
    with pytest.raises(InputError, match="outside"):
        load_samples(tmp_path, EDIT)


def test_missing_and_empty_folders(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="no samples for task 'edit'") as error:
        load_samples(tmp_path, EDIT)
    assert error.value.hint
    write(tmp_path, EDIT)
    with pytest.raises(InputError, match="no rows"):
        load_samples(tmp_path, EDIT)
    (tmp_path / "edit" / "metadata.jsonl").write_bytes(b"\xff\xfe{}")
    with pytest.raises(InputError, match="cannot be read"):
        load_samples(tmp_path, EDIT)
    (tmp_path / "edit" / "metadata.jsonl").write_text('{"a": \n')
    with pytest.raises(InputError, match="line 1: not JSON"):
        load_samples(tmp_path, EDIT)


def prompts(folder: Path, *splits: str | None) -> Path:
    write(folder, T2I, *({"prompt": f"{i}", "split": split} for i, split in enumerate(splits)))
    return folder


def test_marked_rows_are_kept_for_checks_else_every_fourth(tmp_path: Path) -> None:
    marked = prompts(tmp_path / "marked", None, "check", "calibration", None, "check", None)
    rest, held_out = split_samples(marked, T2I, calibrating=3, checking=9)
    assert [one.prompt for one in rest] == ["0", "2", "3"] and [one.prompt for one in held_out] == ["1", "4"]
    plain = prompts(tmp_path / "plain", *[None] * 9)
    rest, held_out = split_samples(plain, T2I, calibrating=9, checking=1)
    assert [one.prompt for one in rest] == ["0", "1", "2", "4", "5", "6", "8"]
    assert [one.prompt for one in held_out] == ["3"]


@pytest.mark.parametrize("splits", [(None,) * 3, ("check",) * 4], ids=["few", "only checks"])
def test_too_few_rows_are_an_error(tmp_path: Path, splits: tuple[str | None, ...]) -> None:
    with pytest.raises(CalibrationError, match=f"{len(splits)} rows, too few") as error:
        split_samples(prompts(tmp_path, *splits), T2I, calibrating=4, checking=1)
    assert error.value.hint and error.value.exit_code == 5


def test_a_guided_task_wants_prompts_and_another_does_not(tmp_path: Path) -> None:
    for task in (T2I, SR):
        write(tmp_path, task, *[{"file_name": "a.png"}, {"file_name": "b.png"}] * 3)
    with pytest.raises(CalibrationError, match="rows without a prompt"):
        split_samples(tmp_path, T2I, calibrating=4, checking=1)
    split_samples(tmp_path, SR, calibrating=4, checking=1)
    with pytest.raises(CalibrationError, match="is not a folder"):
        split_samples(tmp_path / "gone", SR, calibrating=4, checking=1)


def test_a_mask_selects_by_its_transparency_if_it_has_any_and_by_ones(tmp_path: Path) -> None:
    rows = [{"file_name": "a.png", "mask_file_name": name} for name in ("white.png", "clear.png", "ones.png")]
    place = write(tmp_path, INPAINT, *rows)
    hole = np.tril(np.ones((32, 32), np.uint8))
    Image.fromarray(hole * 255).save(place / "white.png")
    Image.fromarray(np.dstack([np.asarray(Image.open(place / "a.png")), 255 - hole * 255])).save(place / "clear.png")
    Image.fromarray(hole).save(place / "ones.png")
    white, clear, ones = load_samples(tmp_path, INPAINT)
    for sample in (white, clear, ones):
        assert sample.mask is not None and np.array_equal(np.asarray(sample.mask), hole * 255)
    assert [[notice.kind for notice in sample.notices] for sample in (white, clear, ones)] == [
        [],
        [],
        ["mask-zero-one"],
    ]


def test_what_may_not_be_meant_in_the_rows_is_said_with_their_place(tmp_path: Path, base_pipeline_dir: Path) -> None:
    from transformers import CLIPTokenizer

    rows = [
        {"file_name": "a.png", "mask_file_name": "mask.png", "prompt": "a cat"},
        {"file_name": "a.png", "mask_file_name": "black.png", "prompt": "a cat that is much too long"},
        {"file_name": "a.png", "mask_file_name": "left.png"},
    ]
    place = write(tmp_path, INPAINT, *rows)
    Image.new("L", (32, 32)).save(place / "black.png")
    left = Image.new("L", (64, 32))
    left.paste(255, (0, 0, 8, 32))
    left.save(place / "left.png")
    Image.new("RGB", (64, 32), "red").save(place / "a.png")
    fine, bad, cropped = load_samples(tmp_path, INPAINT)
    tokenizer = CLIPTokenizer.from_pretrained(base_pipeline_dir / "tokenizer")
    given = {"tokenizer": tokenizer, "size": (32, 32), "latent": (8, 8)}
    found = row_notices([fine, bad], [cropped], **given, fit="crop")
    said = [(one.use, one.row, one.notice.kind) for one in found]
    second, third = ("inpaint/metadata.jsonl line 2", "inpaint/metadata.jsonl line 3")
    assert said == [
        ("calibration", second, "prompt-cut"),
        ("calibration", second, "mask-empty"),
        ("check", third, "mask-empty"),
    ]
    assert "'too long' has no effect" in str(found[0]) and found[0].to_json()["dropped"] == "too long"
    assert len(row_notices([], [cropped], **given, fit="pad")) == 0
