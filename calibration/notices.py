"""What there is to say of a data folder's rows: prompts that are too long, masks that select nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any, Literal

from calibration.samples import Sample
from mtu_compile.core.fit import Fit
from mtu_compile.core.notices import Notice
from mtu_compile.runtime.fitting import fit_mask
from mtu_compile.runtime.images import shrink_mask
from mtu_compile.runtime.masks import check_selection
from mtu_compile.runtime.text import cut_by

#: What a row is used for.
Use = Literal["calibration", "check"]


@dataclass(frozen=True)
class RowNotice:
    """A notice about one row, and what the row is used for."""

    use: Use
    row: str
    notice: Notice

    def __str__(self) -> str:
        return f"{self.row} ({self.use}): {self.notice.message}"

    def to_json(self) -> dict[str, Any]:
        return {"use": self.use, "row": self.row, **self.notice.to_json()}


def row_notices(
    calibrating: Sequence[Sample],
    checking: Sequence[Sample],
    *,
    tokenizer: Any,
    size: tuple[int, int],
    latent: tuple[int, int],
    fit: Fit,
) -> tuple[RowNotice, ...]:
    """Everything there is to say of the rows a task is calibrated and checked with.

    Args:
        tokenizer: the model's, of ``transformers``.
        size: (height, width) of the pictures.
        latent: (height, width) of the latent.
        fit: what becomes of pictures of other proportions.
    """
    used: list[tuple[Use, Sample]] = [("calibration", one) for one in calibrating]
    used += [("check", one) for one in checking]
    return tuple(
        RowNotice(use, _place(sample), notice)
        for use, sample in used
        for notice in _notices(sample, tokenizer, size, latent, fit)
    )


def _notices(
    sample: Sample, tokenizer: Any, size: tuple[int, int], latent: tuple[int, int], fit: Fit
) -> Iterator[Notice]:
    if (cut := cut_by(tokenizer, sample.prompt)) is not None:
        yield cut.notice()
    yield from sample.notices
    if sample.mask is not None:
        selected = fit_mask(sample.mask, size, fit)
        yield from check_selection(selected, shrink_mask(selected, latent))


def _place(sample: Sample) -> str:
    """The row's place as the data folder has it: where that lies is nobody's business."""
    return PurePath(*PurePath(sample.place).parts[-2:]).as_posix()
