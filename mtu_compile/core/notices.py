"""What is no error, and yet not what its user may have meant: told while there is time, and kept in the result."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

#: ``prompt-cut``: words beyond the text encoder's length have no effect. ``mask-empty``, ``mask-full``: nothing, or
#: everything, is selected. ``mask-lost``: what is selected is too small for the latent. ``mask-zero-one``: 1 was taken
#: for white. ``mask-alpha``: transparent was taken for selected, where white may have been meant.
#: ``guidance-samples``: the guidance of this run is not what the graph's batch was made for. ``batch-alone``: one of
#: several requests cannot share its UNet calls.
NoticeKind = Literal[
    "prompt-cut",
    "mask-empty",
    "mask-full",
    "mask-lost",
    "mask-zero-one",
    "mask-alpha",
    "guidance-samples",
    "batch-alone",
]


@dataclass(frozen=True)
class Notice:
    """One such thing.

    Attributes:
        kind: for programs.
        message: for people, in one sentence without a full stop.
        hint: what to do about it.
        facts: what the message says, as JSON data.
    """

    kind: NoticeKind
    message: str
    hint: str
    facts: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind, "message": self.message, "hint": self.hint, **self.facts}
