"""The part of a picture that a task was to change, and what is measured of it; metrics that others hand in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from mtu_compile.accuracy.formulas import Array, picture_psnr_db, psnr_db, ssim, unit_picture
from mtu_compile.accuracy.task_metrics import ClipMetrics, RegionMetrics, TruthMetrics
from mtu_compile.core.fit import Fit
from mtu_compile.core.tasks import Task
from mtu_compile.runtime.fitting import Frame
from mtu_compile.runtime.reference import Trajectory

#: By how much of the full range a colour channel has to differ for the float original to have changed a pixel. An
#: autoencoder does not give a picture back exactly (the emoji example's: 29.8 dB, 0.03 of the range on average), and
#: that is no edit.
EDITED = 0.15
#: Reach of an edit beyond its changed pixels, as a share of the picture's shorter side: outlines are soft.
REACH = 0.03

#: VIF (image a, image b) of arrays [H, W, 3], uint8; ``None`` where it is not defined.
Vif = Callable[[Array, Array], float | None]
#: CLIP of the float original's picture, the candidate's, and the prompt.
Clip = Callable[[Image.Image, Image.Image, str], ClipMetrics]


@dataclass(frozen=True)
class Perceptual:
    """Metrics that need torch, handed in by who has it.

    Attributes:
        vif: measures visual information fidelity, or ``None``.
        reason: why there is no ``vif``, if there is none.
        clip: asks a CLIP model, or ``None``.
    """

    vif: Vif | None = None
    reason: str | None = "not measured: torch is not used here"
    clip: Clip | None = None


@dataclass(frozen=True)
class Region:
    """The part of a picture that a task was to change.

    Attributes:
        kind: ``"mask"`` or ``"edit"``, see ``RegionMetrics``.
        inside: [H, W], bool.
        source: [H, W, 3], uint8: the picture the task started from.
    """

    kind: Literal["mask", "edit"]
    inside: NDArray[np.bool_]
    source: Array


def changed_region(trajectory: Trajectory, task: Task, fit: Fit = "crop") -> Region | None:
    """What the task was to change of the source picture; ``None`` where it makes all of the picture.

    A task with a mask changes what is inside. A task that is guided by text and sees a whole picture of the output's
    size edits it, and where is known from the float original alone: pixels of which a channel differs by more than
    ``EDITED`` from the source, and all within ``REACH`` of them.
    """
    if trajectory.image is None:
        return None
    width, height = trajectory.picture.size
    frame = Frame.of(trajectory.image.size, (height, width), fit)
    source = np.asarray(frame.picture(trajectory.image))
    if trajectory.mask is not None:
        return Region("mask", frame.mask(trajectory.mask) > 0.5, source)
    if "image" not in task.condition or task.downscale is not None or task.guidance == "none":
        return None
    differing = np.abs(unit_picture(np.asarray(trajectory.picture)) - unit_picture(source)).max(axis=-1) > EDITED
    reach = 2 * max(1, round(REACH * min(width, height))) + 1
    grown = Image.fromarray((differing * 255).astype(np.uint8)).filter(ImageFilter.MaxFilter(reach))
    return Region("edit", np.asarray(grown) > 0, source)


def region_metrics(region: Region, reference: Array, candidate: Array) -> RegionMetrics:
    """Inside and outside ``region`` of two pictures [H, W, 3]."""
    want, have, source = (unit_picture(picture) for picture in (reference, candidate, region.source))
    inside, outside = region.inside, ~region.inside

    def psnr(a: Array, b: Array, where: NDArray[np.bool_]) -> float | None:
        return psnr_db(a[where], b[where], peak=1.0) if where.any() else None

    return RegionMetrics(
        kind=region.kind,
        inside_pixels=int(inside.sum()),
        outside_pixels=int(outside.sum()),
        inside_psnr_db=psnr(want, have, inside),
        outside_psnr_db=psnr(want, have, outside),
        source_psnr_db=psnr(source, have, outside),
        reference_source_psnr_db=psnr(source, want, outside),
    )


def truth_metrics(truth: Array, reference: Array, candidate: Array) -> TruthMetrics:
    """Candidate and float original against the wanted picture, all [H, W, 3]."""
    return TruthMetrics(
        picture_psnr_db(truth, candidate),
        ssim(truth, candidate),
        picture_psnr_db(truth, reference),
        ssim(truth, reference),
    )
