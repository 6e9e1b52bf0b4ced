"""What a bundle says of an engine's state: that it was measured only where the device really ran it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mtu_compile.accuracy.host.parity import BackendResult, Parity
from mtu_compile.bundle import EngineState, Manifest
from mtu_compile.core.progress import Progress
from mtu_compile.core.tasks import PAPER_TASKS
from mtu_compile.stages import engines, gate
from mtu_compile.stages.job import Specialised
from targets.base import Artifact

MANIFEST = Path(__file__).parents[1] / "bundle" / "manifest_version_1.json"


class Device:
    """A target whose device may be in this machine; what it builds was not run."""

    def __init__(self, here: bool) -> None:
        self.spec = SimpleNamespace(device="CPU", rest="fp32")
        self.here = here

    def device_here(self) -> bool:
        return self.here

    def host_engine(self, engine: Any) -> Any:
        return engine


def row(backend: str) -> BackendResult:
    return BackendResult(backend, "1.0", 40.0, 50.0, 1.0, None, 60.0, True)


@pytest.mark.parametrize(
    ("backends", "state", "reason"),
    [
        (("ONNX Runtime CPU", "CPU, as built"), EngineState.MEASURED, None),
        (("ONNX Runtime CPU",), EngineState.BUILT, "none here"),
    ],
)
def test_a_unet_is_measured_where_its_engine_was_among_the_backends(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, backends: tuple[str, ...], state: EngineState, reason: str | None
) -> None:
    table = Parity("t2i", "model.onnx", "torch", 6, tuple(map(row, backends)), {})
    artifact = Artifact("openvino", tmp_path / "kept/model.xml", {}, (), "fp32", "a toolchain", reason="none here")
    results = {"engine": engines.Engineered(artifact, 1.0), "compared": {"t2i": table}}
    monkeypatch.setattr(engines.OnTarget, "of", lambda target: SimpleNamespace(target=target))
    steps: Any = SimpleNamespace(run=lambda call: results[call.step.name], place=lambda path, destination: destination)
    built = engines.build_unet(
        steps,
        Device(here=len(backends) > 1),  # type: ignore[arg-type]
        "fp32",
        Specialised("t2i", {0: PAPER_TASKS[0]}, {"t2i": 4}, 4, tmp_path / "model.onnx", ()),
        tmp_path / "model.onnx",
        {"t2i": tmp_path / "reference"},
        tmp_path / "unet",
        "fail",
    )
    assert built.artifact.path == tmp_path / "unet/model.xml"
    assert (built.artifact.state, built.artifact.reason) == (state, reason)


@pytest.fixture
def manifest() -> Manifest:
    """Of a bundle in which nothing has run."""
    import json

    read = Manifest.from_json(json.loads(MANIFEST.read_text()))
    assert read.vae_encoder is not None
    tasks = {
        name: replace(entry, engine=replace(entry.engine, state=EngineState.BUILT))
        for name, entry in read.tasks.items()
    }
    return replace(read, tasks=tasks)


def states(manifest: Manifest) -> dict[str, EngineState]:
    return {where: engine.state for where, engine in manifest.engines()}


@pytest.mark.parametrize("here", [True, False])
def test_a_check_on_the_device_runs_every_network(
    monkeypatch: pytest.MonkeyPatch, manifest: Manifest, here: bool
) -> None:
    checked = SimpleNamespace(recorded_in=lambda manifest: manifest, failures=())
    monkeypatch.setattr(gate, "check_bundle", lambda folder, progress: checked)
    monkeypatch.setattr(gate.bundle, "write", lambda folder, manifest: manifest)
    passed, _ = gate.pass_gate(Path(), manifest, Device(here), "fail", Progress())  # type: ignore[arg-type]
    assert set(states(passed).values()) == {EngineState.MEASURED if here else EngineState.BUILT}


def test_an_encoder_that_no_task_needs_has_not_run(monkeypatch: pytest.MonkeyPatch, manifest: Manifest) -> None:
    words = replace(manifest, tasks={"t2i": manifest.tasks["t2i"]})
    checked = SimpleNamespace(recorded_in=lambda manifest: manifest, failures=())
    monkeypatch.setattr(gate, "check_bundle", lambda folder, progress: checked)
    monkeypatch.setattr(gate.bundle, "write", lambda folder, manifest: manifest)
    passed, _ = gate.pass_gate(Path(), words, Device(True), "warn", Progress())  # type: ignore[arg-type]
    found = states(passed)
    assert found.pop("vae_encoder") is EngineState.BUILT and set(found.values()) == {EngineState.MEASURED}


def test_without_the_gate_nothing_is_said_to_have_run(manifest: Manifest) -> None:
    passed, checked = gate.pass_gate(Path(), manifest, Device(True), "off", Progress())  # type: ignore[arg-type]
    assert passed is manifest and checked is None
