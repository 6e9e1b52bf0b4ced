"""Are a bundle's engines, on the device they run on, as good as the float original?

The comparison of ``mtu_compile.accuracy.host.check`` without what a board does not have: no torch, no Polygraphy.
Inputs and outputs of the float original are in the bundle.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mtu_compile import bundle, runtime
from mtu_compile.accuracy import instruction_sets
from mtu_compile.accuracy.metrics import StepMetrics, step_metrics
from mtu_compile.accuracy.verdict import CheckResult, check_task
from mtu_compile.bundle import TaskEntry
from mtu_compile.core.errors import AccuracyError, BundleError
from mtu_compile.core.progress import Progress
from mtu_compile.runtime import proven
from mtu_compile.runtime.engine import OUTPUT
from mtu_compile.runtime.reference import Reference, Trajectory


def check_bundle(path: Path, *, progress: Progress | None = None) -> CheckResult:
    """Run every task's engine on this machine's device, on what the float original was recorded with.

    Raises:
        BundleError: the bundle is damaged, or carries no reference for a task.
        ToolchainMissing, TargetError: an engine is not built, or cannot be opened or run here.
        AccuracyError: outputs are missing, of another shape, or not finite; a merely inaccurate engine is a failure in
            the result.
    """
    progress = progress or Progress()
    with progress.stage("verify"):
        loaded = runtime.load(path, warn=False)
    verdicts = {}
    with loaded:
        for name, entry in loaded.manifest.tasks.items():
            if entry.reference is None:
                raise BundleError(f"the bundle carries no reference for task {name!r}", hint="build the bundle again")
            reference = Reference.load(bundle.resolve(path.resolve(), entry.reference))
            if not reference.trajectories:
                raise BundleError(f"the reference of task {name!r} is empty", hint="build the bundle again")
            with progress.stage(f"check {name}", 2 * len(reference.trajectories)) as advance:
                steps: list[StepMetrics] = []
                for one in reference.trajectories:
                    steps += _compare_calls(entry, one, loaded)
                    advance(1)
                verdicts[name] = check_task(entry, reference, steps, loaded, advance)
    kinds = sorted({engine.kind for _, engine in loaded.manifest.engines()})
    proofs = instruction_sets.prove(path.resolve(), progress=progress) if proven.on_cpu(loaded.manifest) else ()
    return CheckResult(verdicts, f"{', '.join(kinds)}, on this machine's own device", proofs)


def _compare_calls(entry: TaskEntry, one: Trajectory, loaded: runtime.Runtime) -> Sequence[StepMetrics]:
    name = entry.task.name
    engine = loaded.unet(name)
    measured = []
    for inputs, output, timestep in zip(one.inputs, one.outputs, one.timesteps, strict=True):
        outputs = engine(inputs)
        if set(outputs) != {OUTPUT}:
            raise AccuracyError(f"the UNet of task {name!r} gives {', '.join(sorted(outputs))}, not {OUTPUT}")
        measured.append(step_metrics({OUTPUT: output}, outputs, timestep=timestep, guidance=entry.task.guided))
    return measured
