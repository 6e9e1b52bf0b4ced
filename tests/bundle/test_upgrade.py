"""Bundles of earlier versions: what they say is read, as the current version says it, and as strictly."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from calibration.quant_config import of_bundle
from mtu_compile import bundle
from mtu_compile.bundle import EngineState, Manifest
from mtu_compile.bundle.files import _sealed
from mtu_compile.core.errors import BundleError

#: Of a bundle that a build of version 1 wrote, without most of its layers and two of its tasks.
VERSION_1 = Path(__file__).with_name("manifest_version_1.json")


@pytest.fixture
def old() -> Any:
    return json.loads(VERSION_1.read_text())


def test_a_real_manifest_of_version_1_says_what_it_said(old: Any) -> None:
    manifest = Manifest.from_json(old)
    manifest.check()
    said, entry = old["tasks"]["t2i"]["extra"], manifest.tasks["t2i"]
    quantisation, parity, calibration = (
        entry.provenance.quantisation,
        entry.provenance.parity,
        entry.provenance.calibration,
    )
    assert quantisation is not None and parity is not None and calibration is not None
    assert dict(quantisation.ranges) == said["quantisation"]["ranges"]
    assert quantisation.mixed is not None and quantisation.mixed.criteria.sqnr_db == 26.0
    assert [layer.name for layer in quantisation.mixed.layers] == [
        layer["name"] for layer in said["quantisation"]["mixed"]["layers"]
    ]
    assert parity.rows[0].backend == "ONNX Runtime CPU" and parity.required_db == said["parity"]["required_db"]
    assert (calibration.seed, calibration.pictures) == (0, 12)
    assert entry.provenance.build_seconds == said["build_seconds"]
    plan = manifest.provenance.plan
    assert plan is not None and plan.together_bytes == old["extra"]["plan"]["together_bytes"]
    assert of_bundle(manifest)["tasks"]["t2i"] == said["quantisation"]["settings"]


def test_it_is_written_as_the_current_version(old: Any) -> None:
    manifest = Manifest.from_json(old)
    new = json.loads(json.dumps(manifest.to_json()))
    assert new["schema_version"] == bundle.SCHEMA_VERSION == 2
    assert Manifest.from_json(new) == manifest


def test_its_folder_is_read_and_verified(old: Any, tmp_path: Path) -> None:
    from mtu_compile.core.hashing import file_sha256

    for name in old["files"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
        old["files"][name] = file_sha256(tmp_path / name)
    (tmp_path / "manifest.json").write_bytes(_sealed(old))
    assert bundle.read(tmp_path).tasks["inpaint"].task.condition == ("mask", "masked_image")
    (tmp_path / "manifest.json").write_bytes(
        (tmp_path / "manifest.json").read_bytes().replace(b'"seed": 0', b'"seed": 1')
    )
    with pytest.raises(BundleError, match="does not agree with its own hash"):
        bundle.read(tmp_path)


@pytest.mark.parametrize(
    ("status", "state", "reason"),
    [
        ("built, not run: no NVIDIA GPU on this machine", EngineState.BUILT, "no NVIDIA GPU on this machine"),
        ("to be built on the board", EngineState.ON_BOARD, None),
        ("IR only: compiled by the NPU's driver on first use", EngineState.AT_FIRST_USE, None),
        (
            "IR only: compiled by the NPU's driver on first use; no Intel NPU on this machine",
            EngineState.AT_FIRST_USE,
            "no Intel NPU on this machine",
        ),
        ("built here, and this machine's GPU can run it", EngineState.BUILT, None),
        ("baked and eaten", EngineState.UNKNOWN, "baked and eaten"),
        ("", EngineState.UNKNOWN, None),
    ],
)
def test_sentences_become_states(old: Any, status: str, state: EngineState, reason: str | None) -> None:
    old["vae_decoder"]["status"] = status
    engine = Manifest.from_json(old).vae_decoder
    assert (engine.state, engine.reason) == (state, reason)


def test_what_runs_here_was_measured_only_where_something_ran(old: Any) -> None:
    manifest = Manifest.from_json(old)  # the gate was off, and parity ran the UNets as built
    assert manifest.tasks["t2i"].engine.state is EngineState.MEASURED
    assert manifest.vae_decoder.state is EngineState.BUILT
    rows = old["tasks"]["t2i"]["extra"]["parity"]["rows"]
    rows[:] = [row for row in rows if not row["backend"].endswith("as built")]
    assert Manifest.from_json(old).tasks["t2i"].engine.state is EngineState.BUILT
    old["tasks"]["t2i"] |= {
        "accuracy": {"measured_with": "x", "worst_sqnr_db": 30.0, "ssim": None},
        "accuracy_reason": None,
    }
    checked = Manifest.from_json(old)
    assert {checked.tasks["t2i"].engine.state, checked.vae_decoder.state} == {EngineState.MEASURED}


def test_what_was_nobodys_is_left_out(old: Any) -> None:
    old["extra"]["mood"] = "good"
    old["tasks"]["t2i"]["extra"]["quantisation"]["mixed"]["criteria"]["mood"] = "good"
    old["vae_decoder"]["estimate"] = {"source": "a compiler", "latency_ms": 1.5, "mood": "good"}
    manifest = Manifest.from_json(old)
    assert "mood" not in json.dumps(manifest.to_json())
    assert manifest.vae_decoder.estimate == bundle.Estimate("a compiler", 1.5)


@pytest.mark.parametrize(
    ("place", "value", "named"),
    [
        (("extra", "plan", "together_bytes"), -1, "provenance.plan.together_bytes is -1"),
        (("extra",), [], "provenance is [], expected an object"),
        (("extra", "plan", "networks"), {}, "provenance.plan.networks is {}"),
        (("tasks", "t2i", "extra", "build_seconds"), "7.5", 'tasks.t2i.provenance.build_seconds is "7.5"'),
        (("tasks", "t2i", "extra", "quantisation", "mixed", "met"), 1, "quantisation.mixed.met is 1"),
        (("tasks", "t2i", "extra", "parity", "rows"), None, "parity.rows is null"),
        (("tasks", "t2i", "engine", "status"), 3, "engine.state is 3"),
        (("tasks", "t2i"), None, "tasks.t2i is null"),
        (("tasks",), [], "tasks is []"),
        (("text", "engine"), "x", "text.engine is"),
        (("vae_decoder",), 1, "vae_decoder is 1"),
        (("surprise",), 1, "surprise is 1, expected no such key"),
        (("provenance",), {}, "provenance is {}, expected no such key in version 1"),
        (("text", "engine", "state"), "measured here", "text.engine.state is"),
    ],
)
def test_wrong_values_are_refused_by_their_new_names(old: Any, place: tuple[str, ...], value: Any, named: str) -> None:
    changed = holder = copy.deepcopy(old)
    for key in place[:-1]:
        holder = holder[key]
    holder[place[-1]] = value
    with pytest.raises(BundleError) as error:
        Manifest.from_json(changed)
    assert named in error.value.message
