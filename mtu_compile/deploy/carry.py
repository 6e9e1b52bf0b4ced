"""Puts into a bundle the packages that boards need, so that what vouches for the bundle vouches for them, too."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from mtu_compile import bundle as bundles
from mtu_compile.core.progress import Progress
from mtu_compile.deploy import packages
from mtu_compile.deploy.packages import FOLDER, System


def add_wheels(
    path: Path, systems: Sequence[System], *, kept: Path | None = None, progress: Progress | None = None
) -> dict[str, int]:
    """Write the bundle at ``path`` anew with the wheels for ``systems``; how many each of these needs.

    What boards measured of the bundle, and what was built of it here, was of another manifest, and goes. So does its
    signature.

    Raises:
        BundleError: the bundle is damaged.
        MtuError: a wheel cannot be found or reached; the bundle stays as it is.
    """
    progress = progress or Progress()
    root = path.resolve()
    with progress.stage("verify"):
        manifest = bundles.read(root)
    wanted: dict[str, Path] = {}
    counts = {}
    for system in systems:
        with progress.stage(f"packages for {system}"):
            files = packages.fetched(manifest, system, kept or packages.kept_in())
        counts[str(system)] = len(files)
        wanted |= files
    with progress.stage("write"), bundles.staging(root, replace=True) as staged:
        for name in manifest.files:
            target = staged / name
            target.parent.mkdir(parents=True, exist_ok=True)
            _copy(root / name, target)
        (staged / FOLDER).mkdir(exist_ok=True)
        for name, source in wanted.items():
            target = staged / FOLDER / name
            target.unlink(missing_ok=True)
            shutil.copyfile(source, target)
        bundles.write(staged, manifest)
    return counts


def _copy(source: Path, target: Path) -> None:
    """By a second name where that goes, as a bundle's files are never changed in place."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
