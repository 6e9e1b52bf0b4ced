"""What there is to say of training rows before they are trained on; each kind once a task, with its first row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mtu_compile.core.notices import Notice
from mtu_compile.core.progress import Progress
from mtu_compile.core.rows import Row
from mtu_compile.core.tasks import Task
from mtu_compile.model.data import Encoder, source_of
from mtu_compile.runtime import images
from mtu_compile.runtime.fitting import fit_mask
from mtu_compile.runtime.masks import check_selection, read_mask
from mtu_compile.runtime.text import cut_by

#: Masks that are opened; each costs as much as a picture, and what is wrong with a set's masks is wrong from the first.
MASKS = 100


def note_rows(task: Task, rows: Sequence[Row], encoder: Encoder, latent: tuple[int, int], progress: Progress) -> None:
    """Say which prompts lose their end, and which masks may not select what is meant.

    Args:
        task: what the rows are of.
        rows: to be trained on.
        encoder: what they will be encoded by.
        latent: (height, width) of the latent.
        progress: is told.
    """
    prompts: dict[str, Row] = {}
    tokenizer = encoder.texts.tokenizers[0]
    for row in rows:
        prompts.setdefault(row.prompt, row)
    cuts = [(row, notice) for row in prompts.values() if (notice := _cut(tokenizer, row.prompt)) is not None]
    _say(task, cuts, f"{len(prompts)} prompts", progress)
    if {"mask", "masked_image"} & set(task.condition):
        masks = {row.mask: row for row in reversed(rows) if row.mask is not None}
        looked_at = list(masks.values())[::-1][:MASKS]
        found = [(row, notice) for row in looked_at for notice in _mask_notices(task, row, encoder, latent)]
        for kind in dict.fromkeys(notice.kind for _, notice in found):
            _say(task, [one for one in found if one[1].kind == kind], f"{len(looked_at)} masks", progress)


def _say(task: Task, found: Sequence[tuple[Row, Notice]], of: str, progress: Progress) -> None:
    if found:
        row, notice = found[0]
        progress.note(f"{task.name}: {len(found)} of {of}, the first being {row.place}: {notice.message}")


def _cut(tokenizer: Any, prompt: str) -> Notice | None:
    # a token takes a byte at least, and lower case may take two for one: most prompts need no look
    if 2 * len(prompt.encode()) <= tokenizer.model_max_length - 2:
        return None
    cut = cut_by(tokenizer, prompt)
    return None if cut is None else cut.notice()


def _mask_notices(task: Task, row: Row, encoder: Encoder, latent: tuple[int, int]) -> tuple[Notice, ...]:
    assert row.mask is not None
    black_and_white, notices = read_mask(images.open_mask(row.mask))
    over = images.open_image(source_of(task, row)[0]).size
    selected = fit_mask(black_and_white, (encoder.height, encoder.width), encoder.fit, over=over)
    return (*notices, *check_selection(selected, images.shrink_mask(selected, latent)))
