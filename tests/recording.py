"""Calls of a stand-in for a UNet as a reference holds them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mtu_compile.accuracy.recorded import RecordedCall


def recorded_calls(inputs: Sequence[Mapping[str, Any]], outputs: Sequence[Mapping[str, Any]]) -> list[RecordedCall]:
    """Inputs and outputs by name, call by call; the timestep is the input of that name, if there is one."""
    return [
        RecordedCall(feed, answer, float(np.ravel(feed["timestep"])[0]) if "timestep" in feed else None)
        for feed, answer in zip(inputs, outputs, strict=True)
    ]
