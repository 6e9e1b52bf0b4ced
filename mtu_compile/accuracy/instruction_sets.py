"""Is a bundle for CPUs right on other CPUs, too? Its UNets run at every instruction set this one can stand in for.

Each level runs in a process of its own (``python -m mtu_compile.accuracy.instruction_sets BUNDLE [THRESHOLDS]``), as
oneDNN reads its limit once. A level passes if each UNet call keeps its task's thresholds, and none is more than
``SLACK_DB`` worse than the worst one at this CPU's own level: kernels that compute what the graph says differ by
rounding alone.

What is measured is accuracy. Times at an imitated level are not those of a CPU that has no other.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from mtu_compile import bundle, runtime
from mtu_compile.accuracy.recorded import compare_recorded, some_calls
from mtu_compile.accuracy.task_metrics import TaskMetrics
from mtu_compile.accuracy.threshold_file import judged_by, read_thresholds
from mtu_compile.accuracy.thresholds import Thresholds, in_words, judge
from mtu_compile.bundle import InstructionSetProof, Manifest
from mtu_compile.core.errors import BundleError, MtuError
from mtu_compile.core.progress import Progress
from mtu_compile.runtime import cpu_isa
from mtu_compile.runtime.reference import Reference

#: UNet calls of each task, spread evenly over what was recorded.
CALLS = 6

#: By how much the worst call at one level may be worse than at another, decibels (as ``parity.SLACK_DB``).
SLACK_DB = 3.0

#: Bundles up to this size are run at several levels at a time; a larger one keeps memory and cores busy by itself.
SMALL = 256 << 20

#: What is said of outputs without any noise, decibels; float32 ends at about 150.
MOST_DB = 300.0

#: Differences above this are the order of sums, decibels (as ``parity.ENOUGH_DB``).
ENOUGH_DB = 60.0


def prove(
    root: Path,
    *,
    levels: Sequence[str] | None = None,
    thresholds: Path | None = None,
    progress: Progress | None = None,
) -> tuple[InstructionSetProof, ...]:
    """Run the bundle at each of ``levels``, by default all that this process's CPU can stand in for, lowest first.

    Args:
        root: the bundle's folder.
        levels: in oneDNN's words.
        thresholds: file of thresholds to judge by instead of those the bundle carries.
        progress: told of every level.

    Raises:
        BundleError: the bundle is damaged, or carries no reference for a task.
        MtuError: a process could not be started, or ended without an answer.
    """
    own = cpu_isa.level()
    if levels is None:
        levels = cpu_isa.up_to(own)
    progress = progress or Progress()
    small = sum(file.stat().st_size for file in root.rglob("*") if file.is_file()) < SMALL
    with (
        progress.stage("instruction sets", len(levels)) as advance,
        ThreadPoolExecutor((os.cpu_count() or 1) if small else 1) as pool,
    ):

        def run(level: str) -> InstructionSetProof:
            proof = _in_process(root, thresholds, level, imitated=level != own)
            advance(1)
            return proof

        proofs = tuple(pool.map(run, levels))
    at_home = next((proof for proof in proofs if proof.level == own), None)
    return proofs if at_home is None else tuple(_compared(proof, at_home) for proof in proofs)


def measure(root: Path, manifest: Manifest) -> dict[str, TaskMetrics]:
    """By task, some recorded UNet calls at this process's own level."""
    measured = {}
    with runtime.Runtime(root, manifest) as loaded:
        for name, entry in manifest.tasks.items():
            if entry.reference is None:
                raise BundleError(f"the bundle carries no reference for task {name!r}", hint="build it again")
            calls = some_calls(Reference.load(bundle.resolve(root, entry.reference)), CALLS)
            measured[name] = TaskMetrics(compare_recorded(loaded.unet(name), calls, guidance=entry.task.guided))
            if manifest.routing == "static":
                loaded.close()  # one UNet in memory at a time
    return measured


def _in_process(root: Path, thresholds: Path | None, level: str, *, imitated: bool) -> InstructionSetProof:
    files = [str(root), *([] if thresholds is None else [str(thresholds)])]
    command = [sys.executable, "-m", "mtu_compile.accuracy.instruction_sets", *files]
    environment = {**os.environ, cpu_isa.LIMIT: level} if imitated else dict(os.environ)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    try:
        answer: dict[str, Any] = json.loads(done.stdout)
        if "error" not in answer:
            return replace(InstructionSetProof.from_json(answer), imitated=imitated)
        return InstructionSetProof(level, cpu_isa.name(), imitated, CALLS, {}, (str(answer["error"]),))
    except (ValueError, MtuError) as error:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise MtuError(
            f"{' '.join(command)} with {cpu_isa.LIMIT}={level} ended with exit code {done.returncode}: {last}"
        ) from error


def _compared(proof: InstructionSetProof, at_home: InstructionSetProof) -> InstructionSetProof:
    """``proof`` with a failure for each task that is worse than at the CPU's own level by more than rounding."""
    failures = list(proof.failures)
    for name, worst in proof.worst_sqnr_db.items():
        expected = at_home.worst_sqnr_db.get(name)
        if expected is not None and worst < min(expected, ENOUGH_DB) - SLACK_DB:
            failures.append(f"{name}: {worst:.1f} dB, and {expected:.1f} dB at {at_home.level}")
    return replace(proof, failures=tuple(failures))


def _proof(root: Path, thresholds: Path | None = None) -> InstructionSetProof:
    given = None if thresholds is None else read_thresholds(thresholds)
    manifest = judged_by(bundle.read(root, verify=False), given, thresholds)
    measured = measure(root, manifest)
    failures: list[str] = []
    for name, metrics in measured.items():
        # All others are about pictures, which are made at the CPU's own level.
        asked = Thresholds.of_bundle(manifest.precision, manifest.tasks[name].thresholds).of_calls()
        failures += (f"{name}: {failure}" for failure in in_words(judge(metrics, asked), len(metrics.steps)))
    # NaN has failed its threshold already, and outputs that are equal bit by bit have no noise.
    values = {name: min(step.sqnr_db for step in metrics.steps) for name, metrics in measured.items()}
    worst = {name: min(value, MOST_DB) for name, value in values.items() if not math.isnan(value)}
    return InstructionSetProof(cpu_isa.level(), cpu_isa.name(), False, CALLS, worst, tuple(failures))


def main(arguments: Sequence[str]) -> int:
    """Print the proof of a bundle at this process's level as JSON; judged by a file of thresholds, if one is given."""
    try:
        print(json.dumps(_proof(*map(Path, arguments)).to_json()))
    except MtuError as error:
        print(json.dumps({"error": error.message}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
