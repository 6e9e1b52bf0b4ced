"""The target ``cpu`` on a board: OpenVINO comes with the bundle, and is all that runs it there."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.board import conftest as tiny
from tests.conftest import MadeOnce
from tests.deploy import hosts as networks
from tests.deploy.conftest import Bench


@pytest.mark.slow
def test_a_packed_signed_bundle_brings_openvino_is_proven_and_draws(
    bench: Bench, command: Callable[..., str], made_once: MadeOnce, tmp_path: Path
) -> None:
    host, root = bench.hosts[0], tmp_path / "cpu"
    shutil.copytree(tiny.openvino_bundle(made_once), root)
    board = f"root@{host.address} --root {host.root}"
    command(f"key new {tmp_path}/key")
    command(f"boards trust {board} --key {tmp_path}/key.pub")
    command(f"boards wheels {root} {board}")
    carried = [path.name.split("-")[0] for path in (root / "wheels").iterdir()]
    assert "openvino" in carried and "torch" not in carried and "onnxruntime" not in carried
    command(f"sign {root} --key {tmp_path}/key --release 1")
    command(f"pack {root} {tmp_path}/cpu.mtu")
    said = json.loads(command(f"deploy {tmp_path}/cpu.mtu {board} --activate --json"))["boards"][host.address]
    assert said["reached"] == "activate" and said["figures"]["versions"]["openvino"]
    assert said["figures"]["measured"]["tasks"]["t2i"]["device"].startswith("CPU: ")
    words = ["current/mtu-compile", "run", "current/bundle", "--task", "t2i", "--prompt", "a red cat", "-o", "out.png"]
    line = [networks.IP, "netns", "exec", host.name, *words]
    subprocess.run(line, cwd=host.root, check=True, capture_output=True)
    assert (host.root / "out.png").read_bytes().startswith(b"\x89PNG")
    refused = command(f"deploy {tmp_path}/cpu.mtu {board} --activate --recheck --limit step_ms=0.001", exit=3)
    assert "0.001 are allowed" in refused
