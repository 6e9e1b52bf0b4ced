"""The accuracy gate: a finished bundle against the float original, and what to do where a task falls short."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from calibration import mixed
from mtu_compile import bundle
from mtu_compile.accuracy.host.check import check_bundle
from mtu_compile.accuracy.host.half_range import more_precise
from mtu_compile.accuracy.verdict import CheckResult
from mtu_compile.core.errors import AccuracyError
from mtu_compile.core.precision import QUANTISED
from mtu_compile.core.progress import Progress
from mtu_compile.stages.job import Gate
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
    recorded = checked.recorded_in(manifest)
    manifest = bundle.write(folder, _as_run(recorded) if target.device_here() else recorded)
    if checked.failures and gate == "fail":
        raise AccuracyError("; ".join(checked.failures), hint=_what_to_do(target, manifest, checked))
    return manifest, checked


def _ran(engine: bundle.EngineRef) -> bundle.EngineRef:
    return replace(engine, state=bundle.EngineState.MEASURED, reason=None)


def _task_ran(entry: bundle.TaskEntry) -> bundle.TaskEntry:
    cache = entry.step_cache
    return replace(
        entry,
        engine=_ran(entry.engine),
        step_cache=None if cache is None else replace(cache, engine=_ran(cache.engine)),
    )


def _as_run(manifest: bundle.Manifest) -> bundle.Manifest:
    """``manifest`` after its pictures were made on the device: every network but an unused encoder ran."""

    encoder, tasks, second = manifest.vae_encoder, manifest.tasks, manifest.text_2
    if encoder is not None and any(kind != "mask" for entry in tasks.values() for kind in entry.task.condition):
        encoder = _ran(encoder)
    return replace(
        manifest,
        text=replace(manifest.text, engine=_ran(manifest.text.engine)),
        text_2=None if second is None else replace(second, engine=_ran(second.engine)),
        vae_encoder=encoder,
        vae_decoder=_ran(manifest.vae_decoder),
        tasks={name: _task_ran(entry) for name, entry in tasks.items()},
    )


def _what_to_do(target: Target, manifest: bundle.Manifest, checked: CheckResult) -> str:
    """For the tasks that failed: which layers are to blame, and what helps a bundle of this precision."""
    advice = []
    if (decoder := manifest.provenance.decoder) is not None:
        alone = f"the VAE decoder in INT8 alone makes pictures of {decoder.worst_psnr_db:.1f} dB at worst"
        advice.append(f"{alone}, without what INT8 does to the UNet: leaving out --int8-decoder may be enough")
    for name, task in checked.tasks.items():
        quantised = manifest.tasks[name].provenance.quantisation
        if not task.failures or quantised is None or quantised.mixed is None:
            continue
        if blamed := mixed.to_blame(quantised.mixed):
            advice.append(f"{name} loses most to INT8 in {blamed}: add them to its ignored_scopes in a --quant-config")
    kept = "--accuracy-gate warn keeps the bundle, for `mtu-compile report` to show"
    if manifest.precision in QUANTISED:
        return "; ".join(
            [*advice, "--data with more pictures calibrates better", f"{kept} and --quant-config to start from"]
        )
    finer = more_precise(target.spec, manifest.precision)
    return "; ".join([f"build with {finer}" if finer else "the passes or a backend are to blame", kept])
