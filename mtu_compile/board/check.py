"""Are a bundle's engines, on the device they run on, as good as the float original?

The comparison of ``mtu_compile.accuracy.host.check`` (``accuracy.recorded``, ``accuracy.verdict``) without what a board
does not have: no torch, no Polygraphy. Inputs and outputs of the float original are in the bundle.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mtu_compile import bundle, runtime
from mtu_compile.accuracy import instruction_sets
from mtu_compile.accuracy.calls import StepMetrics
from mtu_compile.accuracy.recorded import calls_of, compare_recorded
from mtu_compile.accuracy.threshold_file import judged_by, read_thresholds
from mtu_compile.accuracy.verdict import CheckResult, check_task, pictures_of
from mtu_compile.bundle.keys import PublicKey
from mtu_compile.core.errors import BundleError
from mtu_compile.core.progress import Progress
from mtu_compile.runtime import proven
from mtu_compile.runtime.reference import Reference


def check_bundle(
    path: Path,
    *,
    thresholds: Path | None = None,
    trusted: Sequence[PublicKey] | None = None,
    progress: Progress | None = None,
) -> CheckResult:
    """Run every task's engine on this machine's device, on what the float original was recorded with.

    Args:
        path: the bundle's folder.
        thresholds: file of thresholds to judge by instead of those the bundle carries.
        trusted: demand a signature by one of these keys before anything of the bundle is read.
        progress: told of every stage.

    Raises:
        ConfigError: ``thresholds`` is no file of thresholds for this bundle.
        BundleError: the bundle is damaged, not signed by anybody trusted, or carries no reference for a task.
        ToolchainMissing, TargetError: an engine is not built, or cannot be opened or run here.
        AccuracyError: outputs are missing, of another shape, or not finite; a merely inaccurate engine is a failure in
            the result.
    """
    progress = progress or Progress()
    given = None if thresholds is None else read_thresholds(thresholds)
    with progress.stage("verify"):
        loaded = runtime.load(path, warn=False, trusted=trusted)
    manifest = judged_by(loaded.manifest, given, thresholds)
    verdicts = {}
    with loaded:
        for name, entry in manifest.tasks.items():
            if entry.reference is None:
                raise BundleError(f"the bundle carries no reference for task {name!r}", hint="build the bundle again")
            reference = Reference.load(bundle.resolve(path.resolve(), entry.reference))
            if not reference.trajectories:
                raise BundleError(f"the reference of task {name!r} is empty", hint="build the bundle again")
            with progress.stage(
                f"check {name}", len(reference.trajectories) + pictures_of(entry, reference)
            ) as advance:
                steps: list[StepMetrics] = []
                for trajectory in reference.trajectories:
                    calls = list(calls_of(trajectory))
                    steps += compare_recorded(loaded.unet(name), calls, guidance=entry.task.guided, name="bundle")
                    advance(1)
                verdicts[name] = check_task(entry, reference, steps, loaded, advance)
    kinds = sorted({engine.kind for _, engine in manifest.engines()})
    proofs = (
        instruction_sets.prove(path.resolve(), thresholds=thresholds, progress=progress)
        if proven.on_cpu(manifest)
        else ()
    )
    return CheckResult(verdicts, f"{', '.join(kinds)}, on this machine's own device", manifest.precision, proofs)
