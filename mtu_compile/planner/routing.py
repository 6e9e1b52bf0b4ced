"""Which form of routing suits a device: an engine for each task, or one for all."""

from __future__ import annotations

from dataclasses import dataclass

from mtu_compile.core.amounts import readable
from mtu_compile.core.routing import Routing

#: Part of the memory there is for UNets that engines of their own may take. They then all stay loaded beside whatever
#: else the device does, and no step is slower than it need be.
STATIC_SHARE = 0.5


@dataclass(frozen=True)
class Recommendation:
    """A form of routing, and why: ``reason`` is for people."""

    routing: Routing
    reason: str


def recommend(
    tasks: int, static_bytes: int, shared_bytes: int | None, room: int | None, target: str, *, least: bool = False
) -> Recommendation:
    """The form of routing for a device.

    Args:
        tasks: how many there are.
        static_bytes: memory of an engine for each of them, together.
        shared_bytes: memory of one for all; ``None`` where the network has no routing to keep.
        room: memory the device has for the UNets' engines; ``None`` if unknown.
        target: name of the target.
        least: ``room`` is what the smallest machines with that device have, and this one may have more.
    """
    if tasks == 1 or shared_bytes is None:
        return Recommendation("static", "there is one task, and an engine of its own is the fastest for it")
    each, one = readable(static_bytes), readable(shared_bytes)
    who = f"the smallest machines with {target} have" if least else f"{target} has"
    if room is not None and static_bytes <= STATIC_SHARE * room:
        return Recommendation(
            "static",
            f"engines for each of the {tasks} tasks take {each}, at most half of the {readable(room)} that {who} for "
            "them: all stay loaded, and none is slower for the others",
        )
    saved = f"one engine for all {tasks} tasks takes {one} instead of {each}"
    if room is None or least:
        return Recommendation("shared", f"{saved}, and how much memory {target} has is not known")
    return Recommendation("shared", f"{saved}, which is more than half of the {readable(room)} that {who} for them")
