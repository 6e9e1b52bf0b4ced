"""Manifests and references that somebody made to hurt: refused by name, soon, and without much memory."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from mtu_compile import bundle
from mtu_compile.bundle import files
from mtu_compile.core.errors import EXIT_INPUT, BundleError
from mtu_compile.runtime.reference import FORMAT, Reference

Change = Callable[[dict[str, Any]], None]


def refused(content: bytes, *words: str) -> None:
    """With its hash looked at and without, as it is and with its hash made anew."""
    for verify in (True, False):
        with pytest.raises(BundleError) as caught:
            files.parse(content, verify=verify)
        assert caught.value.exit_code == EXIT_INPUT
        assert len(caught.value.message) < 500
    for word in words:
        assert word in caught.value.message


@pytest.fixture
def raw(small: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((small / "manifest.json").read_bytes())
    return found


@pytest.mark.parametrize(
    "value",
    [
        *("1e999", "-1e999", "NaN", "Infinity", "-Infinity", "1" * 5000, "9" * 400, "1e400"),
        *(
            "true",
            "null",
            '"0.18215"',
            "[0.18215]",
            "{}",
            "[" * 60 + "]" * 60,
            "[" * 70 + "]" * 70,
            "0",
            "-1",
            "1e-300",
        ),
        *('"\\ud800"', '"' + "a" * 1_000_000 + '"', "01", "1.", "0x1", "'1'", ""),
    ],
    ids=lambda value: value[:12],
)
def test_what_is_no_sensible_number_is_refused(raw: dict[str, Any], value: str) -> None:
    text = json.dumps(raw).replace('"scaling_factor": 0.18215', f'"scaling_factor": {value}')
    assert value[:20] in text
    refused(text.encode())


@pytest.mark.parametrize("value", [10**400, -1, 2**31, 1.5, True, None, "4", [4]])
def test_what_is_no_sensible_count_is_refused(raw: dict[str, Any], value: Any) -> None:
    refused(json.dumps({**raw, "latent_channels": value}).encode(), "latent_channels")


@pytest.mark.parametrize("text", ["\ud800", "\x1b[31m", "\0", "\u202e", "a\rb"])
def test_texts_that_terminals_obey_or_nobody_can_write_are_refused(raw: dict[str, Any], text: str) -> None:
    refused(json.dumps({**raw, "precision": text}).encode(), "precision")
    refused(json.dumps({**raw, "tools": {"numpy": text}}).encode(), "tools.numpy")
    refused(json.dumps({**raw, "tools": {text: "1"}}).encode(), "letters that do not print")
    refused(json.dumps({**raw, "scheduler": {**raw["scheduler"], text: 1}}).encode(), "letters that do not print")
    refused(json.dumps({**raw, "files": {**raw["files"], text: "0" * 64}}).encode(), "letters that do not print")


def test_a_key_that_is_there_twice_is_refused(raw: dict[str, Any]) -> None:
    text = json.dumps(raw)
    refused(text.replace('"target": "cpu"', '"target": "npu", "target": "cpu"').encode(), '"target" is there twice')
    inner = '"max_length": 77'
    refused(text.replace(inner, f"{inner}, {inner}").encode(), '"max_length" is there twice')


@pytest.mark.parametrize(
    "content",
    [
        b"[" * 1_000_000,
        b'{"a":' * 1_000_000,
        b"[" + b"[]," * 5_000_000 + b"[]]",
        b"[" + b"{}," * 5_000_000 + b"{}]",
        b'{"schema_version": 2, "x": [' + b"0," * 3_000_000 + b"0]}",
        b'"' + b"a" * (15 << 20) + b'"',
        b'{"schema_version": ' + b"9" * 1_000_000 + b"}",
    ],
    ids=["lists", "objects", "many lists", "many objects", "many numbers", "a long text", "a long number"],
)
def test_what_is_large_takes_little_memory(content: bytes) -> None:
    tracemalloc.start()
    try:
        refused(content)
        assert tracemalloc.get_traced_memory()[1] < 8 * len(content) + (128 << 20)
    finally:
        tracemalloc.stop()


def test_a_file_that_is_too_long_is_not_read(small: Path) -> None:
    with (small / "manifest.json").open("ab") as file:
        file.truncate(1 << 40)  # sparse: it takes no disk
    with pytest.raises(BundleError, match="is longer than"):
        bundle.read(small)


@pytest.mark.parametrize("version", [10**400, -1, 0, 3, 2.0, "2", None, [2], {"2": 2}, True])
def test_unknown_schemas_are_refused(raw: dict[str, Any], version: Any) -> None:
    refused(json.dumps({**raw, "schema_version": version}).encode(), "schema version")


# References, which are safetensors


def arrays() -> dict[str, Any]:
    """The tensors of one trajectory of two steps."""
    ones = np.ones((2, 1, 4, 2, 2), np.float32)
    return {
        "0.input.sample": ones.copy(),
        "0.input.timestep": np.ones((2, 1), np.float32),
        "0.output": ones.copy(),
        "0.noise": ones[0].copy(),
        "0.latents": ones[0].copy(),
        "0.picture": np.zeros((4, 4, 3), np.uint8),
    }


HEAD = {"task": "t2i", "steps": 2, "producer": "a test"}
ASKED = [{"prompt": "a cat", "seed": 3}]


def write(path: Path, tensors: dict[str, Any], head: Any = HEAD, asked: Any = ASKED) -> Path:
    save_file(tensors, path, {"format": FORMAT, "head": json.dumps(head), "trajectories": json.dumps(asked)})
    return path


def test_a_reference_is_read(tmp_path: Path) -> None:
    assert Reference.load(write(tmp_path / "a", arrays())).trajectories[0].timesteps == (1.0, 1.0)


@pytest.mark.parametrize(
    "change",
    [
        {"0.output": np.ones((3, 1, 4, 2, 2), np.float32)},
        {"0.output": np.ones((0, 1, 4, 2, 2), np.float32)},
        {"0.output": np.ones((2, 1, 4, 2), np.float32)},
        {"0.output": np.ones((2, 1, 4, 2, 2), np.float64)},
        {"0.input.sample": np.ones((1, 1, 4, 2, 2), np.float32)},
        {"0.input.sample": np.ones((), np.float32)},
        {"0.input.timestep": np.ones((2,), np.float32)},
        {"0.input.timestep": np.ones((2, 0), np.float32)},
        {"0.noise": np.full((1, 4, 2, 2), np.nan, np.float32)},
        {"0.picture": np.zeros((4, 4, 3), np.float32)},
        {"0.picture": np.zeros((4, 4, 2), np.uint8)},
        {"0.picture": np.zeros((4, 4, 3, 1), np.uint8)},
        {"0.picture": np.zeros((0, 4, 3), np.uint8)},
        {"0.mask": np.zeros((4,), np.uint8)},
    ],
    ids=lambda change: " ".join(f"{name} {array.dtype}{array.shape}" for name, array in change.items()),
)
def test_tensors_that_do_not_fit_are_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    with pytest.raises(BundleError, match="reference a "):
        Reference.load(write(tmp_path / "a", {**arrays(), **change}))


@pytest.mark.parametrize("name", arrays())
def test_tensors_that_are_missing_are_refused(tmp_path: Path, name: str) -> None:
    tensors = arrays()
    del tensors[name]
    if name == "0.input.sample":  # inputs are the graph's own: which there have to be is not known here
        assert Reference.load(write(tmp_path / "a", tensors))
        return
    with pytest.raises(BundleError, match="cannot be read"):
        Reference.load(write(tmp_path / "a", tensors))


@pytest.mark.parametrize("head", [None, [], 3, "x", {}, {**HEAD, "steps": 0}, {**HEAD, "steps": 1e9}, {**HEAD, "x": 1}])
def test_heads_that_are_none_are_refused(tmp_path: Path, head: Any) -> None:
    with pytest.raises(BundleError, match="cannot be read"):
        Reference.load(write(tmp_path / "a", arrays(), head=head))


@pytest.mark.parametrize(
    "asked", [None, {}, 3, "x", [3], ["x"], [{}], [{"prompt": 1, "seed": 3}], [{"prompt": "", "seed": -1}], ASKED * 2]
)
def test_trajectories_that_are_none_are_refused(tmp_path: Path, asked: Any) -> None:
    with pytest.raises(BundleError, match="cannot be read"):
        Reference.load(write(tmp_path / "a", arrays(), asked=asked))
