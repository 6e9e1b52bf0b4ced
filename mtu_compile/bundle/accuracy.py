"""What a check measured of a task, and the thresholds it was held against, as a manifest keeps them.

Numbers have the type of their unit, which is the last word of their name (``mtu_compile.bundle.units``); what is listed
here has no such name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from mtu_compile.bundle.kinds import Cosine, Positive, Ratio, Text
from mtu_compile.bundle.units import UNITS, unit_of
from mtu_compile.core.schema import Entries, Rule

Object = Mapping[str, Any]

_MEASURED = {word: unit.kind | None for word, unit in UNITS.items()}
_NUMBERS = Annotated[Object, Entries(last_words=_MEASURED)]

#: By metric, the least (or, where less is better, the largest) value that passes; ``None`` leaves it unjudged.
Limits = Annotated[
    Object,
    Rule(lambda limits: all(unit_of(name) is not None for name in limits), "metrics, which end in their unit"),
    Entries(last_words=_MEASURED),
]

#: What a check measured of a task: ``mtu_compile.accuracy.verdict.TaskCheck.summary``.
Accuracy = Annotated[
    Object,
    Entries(
        needed={
            "measured_with": Text,
            "worst_sqnr_db": UNITS["db"].kind,
            "ssim": UNITS["ssim"].kind | None,
        },
        known={
            "pictures": Positive,
            "mean_sqnr_db": UNITS["db"].kind,
            "worst_cosine": UNITS["cosine"].kind,
            "guidance_ratio": tuple[Ratio, Ratio] | None,
            "guidance": Mapping[str, _NUMBERS] | None,
            "ssim_reason": Text | None,
            "region": Annotated[Object, Entries(known={"kind": Literal["mask", "edit"]}, last_words=_MEASURED)] | None,
            "truth": _NUMBERS | None,
            "clip": Annotated[Object, Entries(known=dict.fromkeys(("image", "text", "reference_text"), Cosine | None))]
            | None,
            "reasons": Mapping[str, Text],
            "thresholds": Limits,
            "step_cache": Annotated[Object, Entries(known={"thresholds": Limits}, last_words=_MEASURED)] | None,
            "passed": bool,
        },
        last_words=_MEASURED,
    ),
]
