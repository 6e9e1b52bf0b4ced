"""What a check measured of a task, and the thresholds it was held against, as a manifest keeps them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from mtu_compile.bundle.kinds import (
    Cosine,
    Decibels,
    Likeness,
    Magnitude,
    Positive,
    Ratio,
    Share,
    Text,
)
from mtu_compile.core.schema import Entries

Object = Mapping[str, Any]

_SPAN = tuple[Ratio, Ratio]

_GUIDANCE = Annotated[
    Object, Entries(known={"ratio": Ratio, "worst_ratio": Ratio, "cosine": Cosine, "sqnr_db": Decibels})
]
_REGION = Annotated[
    Object,
    Entries(
        known={
            "kind": Literal["mask", "edit"],
            "share": Share,
            "source_psnr_db": Decibels | None,
            "reference_source_psnr_db": Decibels | None,
        }
    ),
]
_TRUTH = Annotated[
    Object,
    Entries(
        known={
            "psnr_db": Decibels | None,
            "ssim": Likeness | None,
            "reference_psnr_db": Decibels | None,
            "reference_ssim": Likeness | None,
        }
    ),
]
_CLIP = Annotated[
    Object, Entries(known={"image": Cosine | None, "text": Cosine | None, "reference_text": Cosine | None})
]
_THRESHOLDS = Annotated[
    Object,
    Entries(
        known={
            **dict.fromkeys(("sqnr_db", "latent_psnr_db", "image_psnr_db", "guidance_sqnr_db"), Decibels | None),
            **dict.fromkeys(("inside_psnr_db", "outside_psnr_db", "truth_drop_db"), Decibels | None),
            **dict.fromkeys(("cosine", "guidance_cosine"), Cosine | None),
            **dict.fromkeys(("guidance_ratio", "pooled_guidance_ratio"), Ratio | None),
            **dict.fromkeys(("ssim", "vif"), Likeness | None),
        }
    ),
]

#: What a check measured of a task: ``mtu_compile.accuracy.verdict.TaskCheck.summary``.
Accuracy = Annotated[
    Object,
    Entries(
        needed={"measured_with": Text, "worst_sqnr_db": Decibels, "ssim": Likeness | None},
        known={
            "pictures": Positive,
            "mean_sqnr_db": Decibels,
            "worst_cosine": Cosine,
            "guidance_ratio": _SPAN | None,
            "guidance": Mapping[str, _GUIDANCE] | None,
            "latent_psnr_db": Decibels | None,
            "image_psnr_db": Decibels | None,
            "ssim_reason": Text | None,
            "colour_difference": Magnitude | None,
            "vif": Likeness | None,
            "inside_psnr_db": Decibels | None,
            "outside_psnr_db": Decibels | None,
            "region": _REGION | None,
            "truth_drop_db": Decibels | None,
            "truth": _TRUTH | None,
            "clip": _CLIP | None,
            "reasons": Mapping[str, Text],
            "thresholds": _THRESHOLDS,
            "passed": bool,
        },
    ),
]
