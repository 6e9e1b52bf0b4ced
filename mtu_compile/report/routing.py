"""What one engine for all tasks takes against an engine for each, as far as a bundle tells."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mtu_compile.bundle import Manifest
from mtu_compile.report.data import Amount, Network, RoutingForms


def compare_forms(folder: Path, manifest: Manifest, networks: Sequence[Network]) -> RoutingForms | None:
    """The bundle in ``folder`` against the other form; ``None`` for one task, and where nothing was planned of it.

    Args:
        networks: those of the bundle, UNets and others.
    """
    plan = manifest.provenance.plan
    if plan is None or plan.static_bytes is None or plan.shared_bytes is None or len(plan.disk_bytes) < 2:
        return None
    if len(manifest.tasks) == 1:
        return None
    unets = {entry.engine.path for entry in manifest.tasks.values()}
    files = {file for one in networks if one.engine.path in unets for file in one.files}
    files |= {entry.engine.weights for entry in manifest.tasks.values() if entry.engine.weights is not None}
    disk = {form: Amount(size, "estimate") for form, size in plan.disk_bytes.items()}
    disk[manifest.routing] = Amount(sum((folder / file).stat().st_size for file in files), "measured")
    advice = plan.recommendation
    return RoutingForms(
        {"static": Amount(plan.static_bytes, "estimate"), "shared": Amount(plan.shared_bytes, "estimate")},
        disk,
        None if advice is None else advice.routing,
        None if advice is None else advice.reason,
    )
