"""One picture of a candidate against the float original's, by every metric of pictures."""

from __future__ import annotations

import numpy as np

from mtu_compile.accuracy import metrics
from mtu_compile.accuracy.pictures import Perceptual, changed_region, region_metrics, truth_metrics
from mtu_compile.accuracy.readings import PerPicture
from mtu_compile.accuracy.task_metrics import PictureMetrics
from mtu_compile.core.fit import Fit
from mtu_compile.core.tasks import Task
from mtu_compile.runtime import Result
from mtu_compile.runtime.reference import Trajectory


def measure_picture(
    trajectory: Trajectory, candidate: Result, task: Task, perceptual: Perceptual, fit: Fit = "crop"
) -> PictureMetrics:
    """Everything about one picture.

    Args:
        trajectory: what the float original did.
        candidate: what it made from the same noise, nothing pasted back.
        task: says which parts of the picture were to change.
        perceptual: the metrics that need torch.
        fit: how both fitted a picture of other proportions.

    Raises:
        AccuracyError: pictures or latents of different shapes, or not finite.
    """
    want, have = np.asarray(trajectory.picture), np.asarray(candidate.image)
    region, truth = changed_region(trajectory, task, fit), trajectory.target
    return PictureMetrics(
        {
            metric.name: metric.draw.measure(trajectory, candidate, perceptual)
            for metric in metrics.METRICS
            if isinstance(metric.draw, PerPicture)
        },
        region=None if region is None else region_metrics(region, want, have),
        truth=None if truth is None else truth_metrics(np.asarray(truth), want, have),
        clip=perceptual.clip and perceptual.clip(trajectory.picture, candidate.image, trajectory.prompt),
    )
