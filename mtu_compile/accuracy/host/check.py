"""Is a bundle as good as the float original? Engines are compared with the reference the bundle carries."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import targets
from mtu_compile import bundle, runtime
from mtu_compile.accuracy import instruction_sets
from mtu_compile.accuracy.host.compare import compare_runner
from mtu_compile.accuracy.host.perceptual import perceptual
from mtu_compile.accuracy.pictures import Perceptual
from mtu_compile.accuracy.recorded import calls_of
from mtu_compile.accuracy.threshold_file import judged_by, read_thresholds
from mtu_compile.accuracy.verdict import CheckResult, TaskCheck, check_task, pictures_of
from mtu_compile.core.atomic import scratch
from mtu_compile.core.errors import BundleError
from mtu_compile.core.progress import Advance, Progress
from mtu_compile.runtime import proven
from mtu_compile.runtime.engine import Engine
from mtu_compile.runtime.reference import Reference
from passes import write_simulation


def check_bundle(
    path: Path,
    *,
    clip: Path | None = None,
    thresholds: Path | None = None,
    everywhere: bool = True,
    progress: Progress | None = None,
) -> CheckResult:
    """Compare every task's engine and pictures with the float reference recorded in the bundle.

    Where the bundle's device is not in this machine, the same graphs run on the CPU instead, and the result says so:
    that measures what precision and passes cost, not what the device's own kernels do.

    Args:
        path: the bundle's folder.
        clip: folder of a CLIP model in transformers' layout, to be asked about the pictures; ``None`` does without.
        thresholds: file of thresholds to judge by instead of those the bundle carries.
        everywhere: where a CPU runs the bundle, also at every lesser instruction set this one can stand in for.
        progress: told of every stage.

    Raises:
        ConfigError, ModelError: ``clip`` is no CLIP model that can be read, ``thresholds`` no file of thresholds.
        BundleError: the bundle is damaged, or carries no reference for a task.
        AccuracyError: an engine cannot be compared at all (outputs missing, NaN); a merely inaccurate one is a
            failure in the result.
    """
    progress = progress or Progress()
    given = None if thresholds is None else read_thresholds(thresholds)
    measures = perceptual(clip)
    with scratch("mtu-check") as work:
        with progress.stage("verify"):
            manifest = judged_by(bundle.read(path), given, thresholds)
            target = targets.get(manifest.target)
            on_device = target.device_here()
            opener = None if on_device else host_opener(target, path, work)
            loaded = runtime.load(path, verify=False, opener=opener, warn=False)
        checks = {}
        with loaded:
            for name, entry in manifest.tasks.items():
                if entry.reference is None:
                    raise BundleError(f"the bundle carries no reference for task {name!r}", hint="build it again")
                reference = Reference.load(bundle.resolve(path, entry.reference))
                with progress.stage(f"check {name}", pictures_of(entry, reference) + 1) as advance:
                    checks[name] = measure_task(entry, reference, loaded, advance, measures)
    unets = [entry.engine for entry in manifest.tasks.values()]
    tried = everywhere and proven.on_cpu(manifest)
    proofs = instruction_sets.prove(path, thresholds=thresholds, progress=progress) if tried else ()
    return CheckResult(checks, target.measured_with(unets[0], on_device=on_device), manifest.precision, proofs)


def host_opener(target: targets.Target, root: Path, work: Path) -> Callable[[bundle.EngineRef], Engine]:
    """Opens the bundle's graphs on this machine's CPU, rounding where the device would."""

    def open_on_host(ref: bundle.EngineRef) -> Engine:
        graph = bundle.resolve(root, ref.path)
        weights = None if ref.weights is None else bundle.resolve(root, ref.weights)
        return target.open_on_host(ref, graph, lambda half: write_simulation(half, work / ref.path), weights)

    return open_on_host


def measure_task(
    entry: bundle.TaskEntry, reference: Reference, loaded: runtime.Runtime, advance: Advance, measures: Perceptual
) -> TaskCheck:
    """One task of an opened bundle against ``reference``, which need not be the bundle's own; see ``check_bundle``."""
    from mtu_compile.accuracy.host.engine_runner import EngineRunner

    task = entry.task
    calls = [call for trajectory in reference.trajectories for call in calls_of(trajectory)]
    runner = EngineRunner(loaded.unet(task.name), name="bundle")
    steps = compare_runner(runner, calls, guidance=task.guided)
    advance(1)
    return check_task(entry, reference, steps, loaded, advance, measures)
