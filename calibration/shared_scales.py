"""Where one scale for all tasks would cost one of them.

A symmetric INT8 quantiser has 127 steps up to its range, so its noise grows with the range. Engines that serve several
tasks with one set of scales have to take the largest range, and a task whose own is smaller pays
20·log10(shared / own) dB of signal to quantisation noise: 6 dB for each bit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from calibration.ranges import ActivationRange

if TYPE_CHECKING:
    from mtu_compile.bundle import Manifest

FORMAT = "mtu-activation-ranges-1"

#: A layer is a conflict where a shared scale costs some task more than this: one of its 8 bits.
LIMIT_DB = 6.0


@dataclass(frozen=True)
class SharedScale:
    """What one scale for all tasks would mean for a layer.

    Attributes:
        layer: name of the node.
        ranges: by task, the largest magnitude of its own.
        loss_db: by task, signal to quantisation noise lost to the scale of the largest.
    """

    layer: str
    ranges: Mapping[str, float]
    loss_db: Mapping[str, float]

    @property
    def worst(self) -> tuple[str, float]:
        """The task that loses most, and how many dB."""
        task = max(self.loss_db, key=lambda name: self.loss_db[name])
        return task, self.loss_db[task]

    def __str__(self) -> str:
        task, loss = self.worst
        largest = max(self.ranges, key=lambda name: self.ranges[name])
        return (
            f"{self.layer}: the range of {largest} ({self.ranges[largest]:.3g}) costs {task} ({self.ranges[task]:.3g}) "
            f"{loss:.1f} dB"
        )


def shared_scales(ranges: Mapping[str, Mapping[str, float]]) -> tuple[SharedScale, ...]:
    """All layers that two or more tasks have, with what a shared scale costs, worst first.

    A task in which a layer sees nothing but zeros loses nothing there.

    Args:
        ranges: by task and layer, the largest magnitude.
    """
    layers = dict.fromkeys(layer for sizes in ranges.values() for layer in sizes)
    scales = []
    for layer in layers:
        own = {task: sizes[layer] for task, sizes in ranges.items() if sizes.get(layer, 0.0) > 0}
        if len(own) >= 2:
            shared = max(own.values())
            scales.append(SharedScale(layer, own, {task: 20 * math.log10(shared / size) for task, size in own.items()}))
    return tuple(sorted(scales, key=lambda scale: (-scale.worst[1], scale.layer)))


def conflicts(ranges: Mapping[str, Mapping[str, float]], *, limit_db: float = LIMIT_DB) -> tuple[SharedScale, ...]:
    """The layers of ``shared_scales`` whose scale costs some task more than ``limit_db``, worst first."""
    return tuple(scale for scale in shared_scales(ranges) if scale.worst[1] > limit_db)


def bundle_ranges(manifest: Manifest) -> dict[str, dict[str, float]]:
    """By task and layer, the INT8 ranges a bundle was built with; tasks whose build recorded none are absent."""
    ranges = {}
    for task, entry in manifest.tasks.items():
        quantisation = entry.provenance.quantisation
        if quantisation is not None and quantisation.ranges:
            ranges[task] = dict(quantisation.ranges)
    return ranges


def largest(measured: Mapping[str, Mapping[str, ActivationRange]]) -> dict[str, dict[str, float]]:
    """Measured ranges as ``shared_scales`` and ``conflicts`` take them."""
    return {task: {layer: one.absmax for layer, one in layers.items()} for task, layers in measured.items()}


def to_json(measured: Mapping[str, Mapping[str, ActivationRange]]) -> dict[str, Any]:
    """Measured ranges by task, and the conflicts between the tasks."""
    ranges = largest(measured)
    costly = [
        {
            "layer": scale.layer,
            "ranges": dict(scale.ranges),
            "loss_db": {t: round(x, 2) for t, x in scale.loss_db.items()},
        }
        for scale in conflicts(ranges)
    ]
    return {
        "format": FORMAT,
        "tasks": {task: {layer: asdict(one) for layer, one in layers.items()} for task, layers in measured.items()},
        "layers_compared": len(shared_scales(ranges)),
        "limit_db": LIMIT_DB,
        "conflicts": costly,
    }
