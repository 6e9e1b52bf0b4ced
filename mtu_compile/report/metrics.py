"""A task's table of metrics, from the numbers of its check: whatever numbers there are, with names for people."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from mtu_compile.accuracy.thresholds import Thresholds
from mtu_compile.report.data import Bounds, Metric, Value

#: Names of the summary's keys; one that is not here is shown by its key.
LABELS = {
    "worst_sqnr_db": "UNet SQNR, worst call",
    "mean_sqnr_db": "UNet SQNR, mean of the calls",
    "worst_cosine": "UNet cosine, worst call",
    "guidance_ratio": "guidance deltas, norm against the original's, single calls",
    "latent_psnr_db": "final latents, PSNR",
    "image_psnr_db": "pictures, PSNR",
    "ssim": "pictures, SSIM",
    "vif": "pictures, VIF",
    "colour_difference": "pictures, mean colour difference (CIEDE2000)",
    "inside_psnr_db": "pictures, PSNR where the task changes them",
    "outside_psnr_db": "pictures, PSNR where the task leaves them alone",
    "truth_drop_db": "PSNR lost against the wanted pictures",
    "region.share": "share of the pictures that the task changes",
    "region.source_psnr_db": "PSNR to the source where the task leaves it alone",
    "region.reference_source_psnr_db": "the same of the float original",
    "truth.psnr_db": "PSNR to the wanted pictures",
    "truth.ssim": "SSIM to the wanted pictures",
    "truth.reference_psnr_db": "PSNR to the wanted pictures of the float original",
    "truth.reference_ssim": "SSIM to the wanted pictures of the float original",
    "clip": "CLIP",
    "clip.image": "CLIP, likeness of the two pictures",
    "clip.text": "CLIP, likeness to the prompt",
    "clip.reference_text": "CLIP, likeness to the prompt of the float original",
}

#: Names of what ``guidance.<direction>.<key>`` is.
GUIDANCE_LABELS = {
    "ratio": "norm against the original's, all calls together",
    "worst_ratio": "norm against the original's, worst call",
    "cosine": "cosine, worst call",
    "sqnr_db": "SQNR, all calls together",
}

#: Summary key → name of its threshold where that is another, and the same for ``guidance.<direction>.<key>``.
THRESHOLD_OF = {"worst_sqnr_db": "sqnr_db", "worst_cosine": "cosine"}
GUIDANCE_THRESHOLD_OF = {
    "ratio": "pooled_guidance_ratio",
    "worst_ratio": "guidance_ratio",
    "cosine": "guidance_cosine",
}
#: Metrics of which less is better.
LESS_IS_BETTER = frozenset({"truth_drop_db", "colour_difference"})
#: Entries of a summary that are no metrics.
NOT_METRICS = frozenset({"pictures", "passed", "thresholds", "reasons", "measured_with"})
#: Entries that hold several, and nothing where they do not apply.
GROUPS = frozenset({"guidance", "region", "truth", "clip"})


def metric_rows(
    summary: Mapping[str, Any], recorded: Mapping[str, Any] | None, thresholds: Thresholds
) -> tuple[Metric, ...]:
    """Every number of ``summary`` (``TaskCheck.summary``), beside the one ``recorded`` at the build."""
    before = dict(_flat(recorded or {}))
    asked = asdict(thresholds)
    reasons = summary.get("reasons", {})
    return tuple(
        Metric(
            key=key,
            label=label(key),
            unit="dB" if key.endswith("_db") else "",
            value=value,
            recorded=before.get(key),
            bounds=bounds(key, asked),
            reason=None if value is not None else reasons.get(key, "not measured"),
        )
        for key, value in _flat(summary)
    )


def label(key: str) -> str:
    """What a metric is called in the report."""
    parts = key.split(".")
    if parts[0] == "guidance" and len(parts) == 3:
        return f"{parts[1]} guidance, {GUIDANCE_LABELS.get(parts[2], parts[2].replace('_', ' '))}"
    return LABELS.get(key, key.replace(".", ", ").removesuffix("_db").replace("_", " "))


def bounds(key: str, asked: Mapping[str, Any]) -> Bounds | None:
    """What a metric has to be within; ``None`` where no threshold is set for it."""
    parts = key.split(".")
    name = THRESHOLD_OF.get(key, key)
    if parts[0] == "guidance" and len(parts) == 3:
        name = GUIDANCE_THRESHOLD_OF.get(parts[2], "")
    threshold = asked.get(name)
    if threshold is None or not _is_number(threshold):
        return None
    if name.endswith("guidance_ratio"):  # a delta may shrink to this, and grow to its inverse
        return threshold, 1 / threshold
    return (None, threshold) if name in LESS_IS_BETTER else (threshold, None)


def _flat(summary: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Value | None]]:
    """(dotted key, value) of the numbers, pairs of numbers and ``None`` in ``summary``."""
    for key, value in summary.items():
        if not prefix and (key in NOT_METRICS or (key in GROUPS and value is None) or key.endswith("_reason")):
            continue
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        elif value is None or _is_number(value):
            yield prefix + key, None if value is None else float(value)
        elif isinstance(value, (list, tuple)) and len(value) == 2 and all(map(_is_number, value)):
            yield prefix + key, (float(value[0]), float(value[1]))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
