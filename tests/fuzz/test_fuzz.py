"""The readers of what comes from elsewhere: what was once a fault, and a few seconds of fuzzing for each."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from mtu_compile.bundle import archive, signature
from mtu_compile.bundle.signature import Signed
from tests.fuzz.archives import Archives
from tests.fuzz.child import HARNESSES, load
from tests.fuzz.harness import CORPUS, Wrong
from tests.fuzz.manifests import Signatures
from tests.fuzz.signed_bundle import signed_bundle

#: Inputs that take a few seconds; ``make fuzz`` has a hundred times more.
RUNS = {"manifest": 500, "signature": 3000, "signed-manifest": 2000, "archive": 300, "reference": 1500, "onnx": 500}


@pytest.mark.parametrize("name", HARNESSES)
def test_valid_inputs_are_taken_and_known_faults_are_mended(name: str) -> None:
    harness = load(name)
    assert all(harness.run(seed) for seed in harness.seeds())
    for kept in harness.corpus():
        harness.run(kept.read_bytes())


def test_the_corpus_belongs_to_readers() -> None:
    folders = [folder for folder in CORPUS.iterdir() if any(folder.iterdir())]
    assert folders and {folder.name for folder in folders} <= set(HARNESSES)


@pytest.mark.parametrize("name", HARNESSES)
def test_a_short_run_finds_nothing(name: str, tmp_path: Path) -> None:
    pytest.importorskip("atheris", reason="needs atheris (pip install atheris), which has no wheel for every Python")
    options = [f"-runs={RUNS[name]}", "-seed=1", f"-artifact_prefix={tmp_path}/"]
    command = [sys.executable, "-m", "tests.fuzz", name, *options]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr[-4000:]
    inputs = int(done.stdout.splitlines()[-1].split()[1])
    assert inputs >= RUNS[name] and not list(tmp_path.iterdir())


# That what is looked for would be found


def _never_checked(*arguments: object) -> Signed:
    return Signed(7, "SHA256:x", "0" * 64)


def test_a_signature_that_is_not_checked_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signature, "verify_bytes", _never_checked)
    with pytest.raises(Wrong, match="nobody made"):
        Signatures().run(b"{}")


def test_an_archive_whose_signature_is_not_checked_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signature, "verify_bytes", _never_checked)
    with pytest.raises(Wrong, match="nobody signed"):
        Archives().run(signed_bundle().unsigned_archive)


def test_an_archive_with_more_than_one_form_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = signed_bundle().archive
    monkeypatch.setattr(archive.tar, "check_header", lambda member, block: None)
    changed = packed[:150] + b"7" + packed[151:]  # the checksum of the first header
    with pytest.raises(Wrong, match="two archives"):
        Archives().run(changed)
