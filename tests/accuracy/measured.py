"""What was measured of a task, made up for the purpose."""

from __future__ import annotations

from typing import Any

from mtu_compile.accuracy.task_metrics import PictureMetrics, RegionMetrics, TaskMetrics

#: Metrics of pictures that have no say.
PERFECT = {
    "latent_psnr_db": 60.0,
    "image_psnr_db": 60.0,
    "ssim": 1.0,
    "vif": 1.0,
    "colour_difference": 0.0,
    "truth_drop_db": 0.0,
}


def metrics_of(
    steps: tuple[Any, ...], *, inside_psnr_db: float = 60.0, outside_psnr_db: float = 60.0, **values: float
) -> TaskMetrics:
    """``steps``, and one picture that is perfect but for ``values``."""
    region = RegionMetrics("mask", 100, 100, inside_psnr_db, outside_psnr_db, 30.0, 30.0)
    return TaskMetrics(steps, (PictureMetrics({**PERFECT, **values}, region),))
