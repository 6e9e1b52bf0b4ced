"""Which of several pictures go through the UNet together: those that tell it the same timestep at every call."""

from __future__ import annotations

from collections.abc import Sequence

from mtu_compile.core.notices import Notice
from mtu_compile.runtime.prepare import Asked

#: UNet samples of one call, at most, unless the user says otherwise: what a call takes of memory grows with them. A
#: picture of each of the paper's tasks takes nine.
MOST_SAMPLES = 12


def group(asked: Sequence[Asked], *, shared: bool, most: int = MOST_SAMPLES) -> list[list[int]]:
    """Indices of the requests, those of a UNet call side by side.

    Args:
        asked: the requests.
        shared: their tasks share one UNet; otherwise each picture has calls of its own.
        most: samples of one call. A single picture that takes more has a call of its own all the same.
    """
    groups: list[list[int]] = []
    open_groups: dict[tuple[float, ...], tuple[list[int], int]] = {}
    for index, one in enumerate(asked):
        members, samples = open_groups.get(one.timesteps, ([], 0))
        if not members or not shared or samples + one.samples > most:
            members, samples = [], 0
            groups.append(members)
        members.append(index)
        open_groups[one.timesteps] = members, samples + one.samples
    return groups


def alone_notice(asked: Sequence[Asked], index: int, *, shared: bool) -> Notice | None:
    """What there is to say where one of several requests cannot share its UNet calls with any of the others."""
    if len(asked) == 1:
        return None
    if not shared:
        message = "each task of this bundle has a UNet of its own, so the picture has UNet calls of its own"
        return Notice("batch-alone", message, "build the bundle with --routing shared")
    if any(one.timesteps == asked[index].timesteps for i, one in enumerate(asked) if i != index):
        return None
    message = "no other request stops at the same timesteps, so the picture has UNet calls of its own"
    return Notice("batch-alone", message, "ask for the same steps and scheduler in all requests")
