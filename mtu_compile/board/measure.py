"""What a bundle takes of the board it lies on: time and memory, and the device that its vendor's runtime names."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from mtu_compile import bundle, runtime
from mtu_compile.accuracy.calls import Feed
from mtu_compile.accuracy.recorded import calls_of
from mtu_compile.core.errors import BundleError, TargetError
from mtu_compile.runtime.reference import Reference, Trajectory

#: UNet calls that are timed, after ``_WARM_UP`` that are not: the first ones compile, allocate and warm up.
CALLS = 10
_WARM_UP = 2
#: Seconds after which no further call is timed; there are three at least.
_ENOUGH = 20.0

_STATUS = Path("/proc/self/status")


@dataclass(frozen=True)
class TaskTiming:
    """One task on this device.

    Attributes:
        step_ms: median of UNet calls, milliseconds; all rows of guidance in one.
        calls: how many were timed.
        image_s: seconds of one picture, from the prompt to pixels, networks loaded.
        steps: its denoising steps.
        device: what ran the UNet, in the words of the vendor's runtime.
    """

    step_ms: float
    calls: int
    image_s: float
    steps: int
    device: str


@dataclass(frozen=True)
class Measured:
    """All tasks.

    Attributes:
        tasks: by name.
        peak_bytes: most memory this process had resident, all it checked included; ``None`` where the system does not
            tell.
    """

    tasks: Mapping[str, TaskTiming]
    peak_bytes: int | None

    def to_json(self) -> dict[str, Any]:
        return {"tasks": {name: asdict(task) for name, task in self.tasks.items()}, "peak_bytes": self.peak_bytes}


def measure(root: Path) -> Measured:
    """Time every task of a bundle that was verified and checked in this process.

    Raises:
        BundleError: a task has no reference.
        TargetError: a network cannot be run, or does not say what ran it.
    """
    manifest = bundle.read(root, verify=False)
    tasks = {}
    with runtime.Runtime(root, manifest) as loaded:
        for name, entry in manifest.tasks.items():
            if entry.reference is None:
                raise BundleError(f"the bundle carries no reference for task {name!r}", hint="build it again")
            reference = Reference.load(bundle.resolve(root, entry.reference))
            trajectory = reference.trajectories[0]
            unet = loaded.unet(name)
            device = str(getattr(loaded.networks.open_unet(entry), "device", ""))
            if not device:
                raise TargetError(f"the engine of task {name!r} does not say what runs it")
            times = _time(unet, next(iter(calls_of(trajectory))).inputs)
            # With another prompt: what the text encoders made of this one would be remembered.
            _picture(loaded, name, trajectory, min(_WARM_UP, reference.steps), trajectory.prompt and "something else")
            began = time.perf_counter()
            _picture(loaded, name, trajectory, reference.steps, trajectory.prompt)
            image = time.perf_counter() - began
            tasks[name] = TaskTiming(
                round(median(times) * 1e3, 3), len(times), round(image, 6), reference.steps, device
            )
    return Measured(tasks, peak_bytes())


def peak_bytes() -> int | None:
    """Most memory this process ever had resident."""
    try:
        match = re.search(r"^VmHWM:\s+(\d+) kB$", _STATUS.read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(match[1]) * 1024 if match else None


def _picture(loaded: runtime.Runtime, task: str, like: Trajectory, steps: int, prompt: str) -> None:
    loaded.run(task, prompt, image=like.image, mask=like.mask, steps=steps, seed=like.seed, latents=like.noise)


def _time(unet: Any, inputs: Feed) -> list[float]:
    times: list[float] = []
    for call in range(_WARM_UP + CALLS):
        began = time.perf_counter()
        unet(inputs)
        if call >= _WARM_UP:
            times.append(time.perf_counter() - began)
        if len(times) >= 3 and sum(times) > _ENOUGH:
            break
    return times
