"""What commands print of fewer whole UNet steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from mtu_compile.cli.console import table

if TYPE_CHECKING:
    from mtu_compile.accuracy.verdict import TaskCheck
    from mtu_compile.bundle import Manifest


def print_schedules(manifest: Manifest, *, quiet: bool = False) -> None:
    """Of each task that was to do with fewer whole steps, how many it needs, and how good its pictures were."""
    rows = []
    for name, entry in manifest.tasks.items():
        record, cache = entry.provenance.step_cache, entry.step_cache
        if record is None:
            continue
        if cache is None:
            rows.append((name, "all", "-", "-", str(record.reason)))
            continue
        taken = next(
            one
            for one in record.tried
            if one.passed and (len(one.whole), one.slope) == (len(cache.whole_at), cache.slope)
        )
        found = "; ".join(f"{key} {value:.4g}" for key, value in taken.metrics.items() if value is not None)
        asked = ", ".join(f"{key} {limit:g}" for key, limit in cache.limits.items() if limit is not None)
        share = f"{record.shallow_share:.0%} of the operations"
        rows.append((name, f"{len(cache.whole_at)} of {record.steps}", share, f"{cache.slope:g}", f"{found} ({asked})"))
    if rows:
        heads = ("task", "whole steps", "the others", "slope", "when it was chosen (asked)")
        table("fewer whole UNet steps", heads, rows, quiet=quiet)


def print_cached(tasks: Mapping[str, TaskCheck], *, quiet: bool = False) -> None:
    """How good the pictures are that a bundle makes with fewer whole steps."""
    rows = []
    for name, task in tasks.items():
        if (made := task.cached) is None:
            continue
        values = (made.metrics.get("ssim"), made.least_ssim, made.metrics.get("image_psnr_db"))
        shown = (
            "-" if value is None else f"{value:.{digits}f}" for value, digits in zip(values, (4, 3, 1), strict=True)
        )
        asked = ", ".join(f"{key} {limit:g}" for key, limit in made.limits.items() if limit is not None)
        rows.append((name, *shown, asked or "-", "FAIL" if made.failures else "pass"))
    if rows:
        heads = ("task", "SSIM", "least", "image dB", "asked", "verdict")
        table("pictures with fewer whole UNet steps, against the float original with all", heads, rows, quiet=quiet)
