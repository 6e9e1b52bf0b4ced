"""``board info``: what the machine is, and what a bundle still needs built."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from mtu_compile import board
from mtu_compile.board import machine as module
from mtu_compile.board.machine import Board
from mtu_compile.cli.board import command
from mtu_compile.core.errors import TargetError
from mtu_compile.runtime.builder import Host
from targets.nvidia import board as nvidia
from targets.nvidia.board import NvidiaMachine
from targets.nvidia.cuda import Device

HOST = Host("NVIDIA Jetson Orin Nano Developer Kit", "3.10", available_bytes=5_000_000_000)
MACHINE = NvidiaMachine(
    HOST,
    jetson_linux="R36 (release), REVISION: 4.3",
    gpu=Device("Orin", "8.7", 8_000_000_000, 1_000_000_000, "12.6"),
    tensorrt={"tensorrt": "10.3.0"},
    missing={"tensorrt-rtx": TargetError("tensorrt_rtx cannot be imported", hint="pip install it")},
)
NANO = Board(HOST, {"tensorrt": MACHINE, "tensorrt-rtx": MACHINE})


def show(*arguments: object) -> str:
    result = CliRunner().invoke(command, ["info", *map(str, arguments)])
    assert result.exit_code == 0, result.exception
    return result.output


def test_this_machine_is_described_whatever_it_is() -> None:
    body = json.loads(show("--json"))["board"]
    assert body["python"].startswith("3.") and body["available_bytes"] > 0
    assert (body["gpu"] is None) == ("gpu" in body["missing"])
    assert set(body["tensorrt"]) | set(body["missing"]) >= {"tensorrt", "tensorrt-rtx"}
    assert "Python:" in show()


def test_a_jetson_is_described_with_the_memory_it_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(board, "probe", lambda: NANO)
    shown = show()
    for words in ("Orin Nano Developer Kit", "R36", "compute capability 8.7", "10.3.0", "5.00 GB of 8.00 GB free"):
        assert words in shown
    assert replace(MACHINE, jetson_linux=None).free_bytes == 1_000_000_000


def test_a_bundle_shows_what_is_built_and_why_it_cannot_be(
    make_bundle: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(board, "probe", lambda: NANO)
    root = make_bundle("tensorrt", {"compute_capabilities": "8.7"})
    body = json.loads(show(root, "--json"))["bundle"]
    assert body["refused"] is None
    assert {one["state"] for one in body["engines"]} == {"to be built"} and len(body["engines"]) == 5
    thor = make_bundle("tensorrt", {"compute_capabilities": "11.0"}, name="thor")
    assert "11.0" in json.loads(show(thor, "--json"))["bundle"]["refused"]["reason"]
    assert "cannot be built here" in show(thor)


def test_jetson_files_are_read_and_their_absence_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "release").write_text("# R36 (release), REVISION: 4.3, GCID: 1\n# KERNEL_VARIANT: oot\n")
    (tmp_path / "model").write_bytes(b"NVIDIA Jetson AGX Orin\x00")
    (tmp_path / "memory").write_text("MemTotal:       64000 kB\nMemAvailable:       1000 kB\n")
    monkeypatch.setattr(nvidia, "_JETSON_RELEASE", tmp_path / "release")
    for name, attribute in (("model", "_MODEL"), ("memory", "_MEMORY")):
        monkeypatch.setattr(module, attribute, tmp_path / name)
    found = board.probe()
    assert found.to_json()["jetson_linux"] == "R36 (release), REVISION: 4.3, GCID: 1"
    assert (found.host.model, found.host.available_bytes) == ("NVIDIA Jetson AGX Orin", 1_024_000)
    for path in list(tmp_path.iterdir()):
        path.unlink()
    found = board.probe()
    assert found.to_json()["jetson_linux"] is None
    assert (found.host.model, found.host.available_bytes) == (None, None)
