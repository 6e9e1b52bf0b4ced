"""How slow and how large a version may be on a board, as whoever runs the board says. Python's own library alone.

Accuracy has thresholds in the bundle, as it is the same everywhere; time and memory are each board's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from mtu_compile.core.amounts import readable
from mtu_compile.core.schema import Range


@dataclass(frozen=True)
class Limits:
    """The most that a version may take; ``None`` sets no limit.

    Attributes:
        step_ms: of one UNet call of any task, milliseconds (``measure.TaskTiming.step_ms``).
        image_s: of one picture of any task with its default steps, seconds.
        memory_mb: the peak of resident memory, 10^6 bytes.
    """

    step_ms: Annotated[float, Range(0.001, 1e9)] | None = None
    image_s: Annotated[float, Range(1e-6, 1e9)] | None = None
    memory_mb: Annotated[float, Range(0.001, 1e9)] | None = None

    def judge(self, measured: Mapping[str, Any]) -> tuple[str, ...]:
        """Each limit that was exceeded, in words.

        Args:
            measured: ``measure.Measured.to_json``.
        """
        found = []
        for task, timing in measured["tasks"].items():
            if self.step_ms is not None and timing["step_ms"] > self.step_ms:
                found.append(f"{task}: a step takes {timing['step_ms']:g} ms here, and {self.step_ms:g} are allowed")
            if self.image_s is not None and timing["image_s"] > self.image_s:
                found.append(f"{task}: a picture takes {timing['image_s']:g} s here, and {self.image_s:g} are allowed")
        if self.memory_mb is not None:
            peak, most = measured["peak_bytes"], int(self.memory_mb * 1e6)
            if peak is None:
                found.append("this board does not say how much memory it took, and there is a limit to it")
            elif peak > most:
                found.append(f"it takes {readable(peak)} of memory here, and {readable(most)} are allowed")
        return tuple(found)
