"""On a machine with the device: the engines are really built, compared with their references, and make a picture."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from mtu_compile import bundle, runtime
from mtu_compile.board import build_bundle, check_bundle
from mtu_compile.bundle import EngineRef, Manifest
from targets.nvidia import cuda


def as_kind(manifest: Manifest, kind: str, config: dict[str, str]) -> Manifest:
    def changed(ref: EngineRef) -> EngineRef:
        return replace(ref, kind=kind, config=config)

    assert manifest.vae_encoder is not None
    return replace(
        manifest,
        text=replace(manifest.text, engine=changed(manifest.text.engine)),
        vae_encoder=changed(manifest.vae_encoder),
        vae_decoder=changed(manifest.vae_decoder),
        tasks={name: replace(entry, engine=changed(entry.engine)) for name, entry in manifest.tasks.items()},
    )


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param("tensorrt", marks=pytest.mark.jetson),
        pytest.param("tensorrt-rtx", marks=pytest.mark.gpu),
    ],
)
def test_engines_built_here_agree_and_run_here(checked: Path, kind: str) -> None:
    """``checked`` was recorded from the same graphs by ONNX Runtime in float32."""
    config = {"compute_capabilities": cuda.device_info().compute_capability}
    bundle.write(checked, as_kind(bundle.read(checked), kind, config))
    assert len(build_bundle(checked).engines) == 5
    assert len(build_bundle(checked).reused) == 5
    assert check_bundle(checked).failures == ()
    with runtime.load(checked) as loaded:
        assert loaded.run("t2i", "a red cat").image.size == (32, 32)
