"""The accuracy gate: a finished bundle against the float original, and what to do where a task falls short."""

from __future__ import annotations

from pathlib import Path

from calibration import mixed
from mtu_compile import bundle
from mtu_compile.accuracy.host.check import check_bundle
from mtu_compile.accuracy.host.half_range import more_precise
from mtu_compile.accuracy.verdict import CheckResult
from mtu_compile.core.errors import AccuracyError
from mtu_compile.core.progress import Progress
from mtu_compile.stages.job import Gate
from mtu_compile.stages.precision import QUANTISED
from targets.base import Target


def pass_gate(
    folder: Path, manifest: bundle.Manifest, target: Target, gate: Gate, progress: Progress
) -> tuple[bundle.Manifest, CheckResult | None]:
    """Check the bundle in ``folder``, and write what was measured into its manifest; nothing where the gate is off.

    Raises:
        AccuracyError: a task is below its threshold, and the gate is to fail.
    """
    if gate == "off":
        return manifest, None
    checked = check_bundle(folder, progress=progress)
    manifest = bundle.write(folder, checked.recorded_in(manifest))
    if checked.failures and gate == "fail":
        raise AccuracyError("; ".join(checked.failures), hint=_what_to_do(target, manifest, checked))
    return manifest, checked


def _what_to_do(target: Target, manifest: bundle.Manifest, checked: CheckResult) -> str:
    """For the tasks that failed: which layers are to blame, and what helps a bundle of this precision."""
    advice = []
    for name, task in checked.tasks.items():
        quantised = manifest.tasks[name].extra.get("quantisation")
        if task.failures and isinstance(quantised, dict) and (blamed := mixed.to_blame(quantised.get("mixed"))):
            advice.append(f"{name} loses most to INT8 in {blamed}: add them to its ignored_scopes in a --quant-config")
    kept = "--accuracy-gate warn keeps the bundle, for `mtu-compile report` to show"
    if manifest.precision in QUANTISED:
        return "; ".join(
            [*advice, "--data with more pictures calibrates better", f"{kept} and --quant-config to start from"]
        )
    finer = more_precise(target.spec, manifest.precision)
    return "; ".join([f"build with {finer}" if finer else "the passes or a backend are to blame", kept])
