"""What tests share is what each would have made by itself, and a forked command is a process of its own."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mtu_compile.model import export
from tests.commands import Commands
from tests.shared_exports import fingerprint, shared_export


class Net(nn.Module):
    """A layer, a number that is no tensor, and a configuration that remembers where it came from."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(2, 3)
        self.register_buffer("offset", torch.zeros(3), persistent=False)
        self.scale = 0.5
        self.config = {"heads": 4, "_name_or_path": "/somewhere"}


def changed(name: str) -> Net:
    net = Net()
    if name == "weight":
        with torch.no_grad():
            net.layer.weight[0, 0] += 1e-6
    elif name == "buffer":
        net.offset[1] = 1
    elif name == "number":
        net.scale = 0.25
    elif name == "configuration":
        net.config["heads"] = 2
    elif name == "layer":
        net.layer.in_features = 5
    return net


OPTIONS: dict[str, Any] = {"inputs": {"x": torch.zeros(1, 2)}, "free": {}, "outputs": ("y",)}


def test_the_same_module_has_the_same_fingerprint_wherever_it_was_read_from() -> None:
    moved = copy.deepcopy(Net())
    moved.config["_name_or_path"] = "/elsewhere"
    assert fingerprint(Net(), OPTIONS) == fingerprint(moved, OPTIONS)


FINGERPRINT = """
import sys
from mtu_compile.model.pipeline import MTUPipeline
from tests.shared_exports import fingerprint
print(fingerprint(MTUPipeline.from_pretrained(sys.argv[1]).unet, {}))
"""


def test_another_process_finds_the_same_fingerprint(mtu_pipeline_dir: Path) -> None:
    """Whatever order Python's sets have there."""
    from mtu_compile.model.pipeline import MTUPipeline

    command = [sys.executable, "-c", FINGERPRINT, str(mtu_pipeline_dir)]
    environment = {**os.environ, "PYTHONHASHSEED": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == fingerprint(MTUPipeline.from_pretrained(mtu_pipeline_dir).unet, {})


@pytest.mark.parametrize("name", ["weight", "buffer", "number", "configuration", "layer"])
def test_a_change_is_another_fingerprint(name: str) -> None:
    assert fingerprint(changed(name), OPTIONS) != fingerprint(Net(), OPTIONS)


@pytest.mark.parametrize("option", [{"inputs": {"x": torch.zeros(2, 2)}}, {"free": {"x": {0: "b"}}}, {"outputs": "z"}])
def test_other_options_are_another_fingerprint(option: dict[str, Any]) -> None:
    assert fingerprint(Net(), OPTIONS | option) != fingerprint(Net(), OPTIONS)


def test_an_export_is_made_once_and_given_to_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Path] = []

    def real(module: Any, inputs: Any, free: Any, outputs: Any, out: Path, output_shapes: Any = None) -> Path:
        made.append(out)
        if outputs == ("none",):
            raise ValueError("refused")
        out.mkdir(parents=True)
        (out / "model.onnx").write_text(str(module.scale))
        return out / "model.onnx"

    monkeypatch.setattr(export, "_export", real)
    shared = shared_export(tmp_path / "exports")
    for place in "ab":
        assert shared(Net(), out=tmp_path / place, **OPTIONS).read_text() == "0.5"
    assert len(made) == 1
    assert shared(changed("number"), out=tmp_path / "c", **OPTIONS).read_text() == "0.25"
    (tmp_path / "a" / "model.onnx").write_text("somebody's own")
    assert shared(Net(), out=tmp_path / "d", **OPTIONS).read_text() == "0.5"
    for _ in range(2):
        with pytest.raises(ValueError, match="refused"):
            shared(Net(), out=tmp_path / "e", **OPTIONS | {"outputs": ("none",)})
    assert len(made) == 4 and not (tmp_path / "e").exists()


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    place = tmp_path_factory.mktemp("sharing")
    commands = Commands(place, place / "exports", loaded=())  # commands that compute nothing
    yield commands
    commands.close()


SHOW = "import json, os, sys; print(json.dumps([os.getcwd(), os.environ.get('SHOWN'), sys.argv[1:], os.getpid()]))"


def test_a_forked_command_has_its_own_process_folder_environment_and_words(
    commands: Commands, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leak = f"{SHOW}; import mtu_compile.core.version as v; v.__version__ = 'changed'; os.environ['SHOWN'] = 'leaked'"
    first = commands.run(["--version"], tmp_path, leak, fresh=False)
    second = commands.run(["--version"], tmp_path, SHOW, fresh=False)
    monkeypatch.setenv("SHOWN", "now")
    third = commands.run(["--version"], None, SHOW, fresh=False)
    said = (json.loads(done.out.splitlines()[0]) for done in (first, second, third))
    folders, shown, words, processes = zip(*said, strict=True)
    assert folders[:2] == (str(tmp_path),) * 2 and folders[2] == str(Path.cwd())
    assert shown == (None, None, "now") and words == (["--version"],) * 3 and len(set(processes)) == 3
    assert "changed" not in second.out


def test_a_forked_command_ends_as_a_fresh_one_does(commands: Commands, tmp_path: Path) -> None:
    for arguments, before in (
        (["--version"], ""),
        (["inspect", tmp_path / "gone"], ""),
        (["nonsense"], ""),
        (["--version"], "raise ValueError('unexpected')"),
        (["--version"], "import sys; sys.exit(7)"),
        (["--version"], "import sys; sys.exit('in words')"),
        (["--version"], "import threading, time; threading.Timer(0.2, print, ['in a thread']).start()"),
        (["--version"], "import os; os.kill(os.getpid(), 9)"),
        (["--version"], "import atexit; atexit.register(print, 'at exit')"),
    ):
        forked, fresh = (commands.run(arguments, tmp_path, before, fresh=way) for way in (False, True))
        assert (forked.code, forked.out) == (fresh.code, fresh.out), before
        assert forked.err.splitlines()[-1:] == fresh.err.splitlines()[-1:]
