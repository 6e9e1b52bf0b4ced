"""The index of engines built here: an engine of which anything does not agree is never handed out."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mtu_compile import bundle
from mtu_compile.bundle import EngineRef
from mtu_compile.core.errors import BundleError, TargetError
from mtu_compile.core.hashing import file_sha256
from mtu_compile.runtime import built
from mtu_compile.runtime.built import BuiltEngine
from targets.nvidia.board import Fingerprint

ORIN = Fingerprint("10.3.0", "Orin", "8.7", "12.6")
UNET = EngineRef("tensorrt", "unet/model.onnx", {"compute_capabilities": "8.7"})


@pytest.fixture
def made(make_bundle: Callable[..., Path]) -> Path:
    """A bundle with one recorded engine, of the UNet of ``t2i``."""
    root = make_bundle("tensorrt", UNET.config)
    record(root)
    return root


def record(root: Path, ref: EngineRef = UNET, device: Fingerprint = ORIN) -> BuiltEngine:
    path = root / built.engine_name(ref.path)
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"engine of " + ref.path.encode())
    entry = BuiltEngine(
        graph=ref.path,
        graph_sha256=built.graph_sha256(bundle.read(root, verify=False), ref),
        kind=ref.kind,
        recipe=dict(ref.config),
        engine=built.engine_name(ref.path),
        engine_sha256=file_sha256(path),
        bytes=path.stat().st_size,
        seconds=1.5,
        toolchain="tensorrt 10.3.0",
        device=device,
    )
    built.record(root, entry)
    return entry


def refused(root: Path, error: type[Exception], words: str, *, ref: EngineRef = UNET, device: Any = ORIN) -> None:
    with pytest.raises(error, match=words) as caught:
        built.find(root, bundle.read(root, verify=False), ref, device)
    assert caught.value.hint == f"mtu-compile board build {root}"  # type: ignore[attr-defined]


def test_what_is_recorded_is_found_and_the_bundle_is_still_whole(made: Path) -> None:
    assert built.find(made, bundle.read(made), UNET, ORIN) == made / "built" / "unet.engine"


def test_nothing_built_is_no_error_and_asks_for_no_device(make_bundle: Callable[..., Path]) -> None:
    root = make_bundle()
    assert built.find(root, bundle.read(root), UNET) is None
    record(root, replace(UNET, path="unet_edit/model.onnx"))
    assert built.find(root, bundle.read(root), UNET) is None


@pytest.mark.parametrize("content", [b"", b"engine of unet/model.onn", b"engine of unet/model.onnY", None])
def test_a_truncated_changed_or_missing_engine_is_refused(made: Path, content: bytes | None) -> None:
    path = made / "built" / "unet.engine"
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    refused(made, BundleError, "missing" if content is None else "not the one that was built")


def test_a_link_is_not_followed(made: Path, tmp_path: Path) -> None:
    path = made / "built" / "unet.engine"
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    refused(made, BundleError, "missing")


def test_an_engine_of_another_graph_is_refused(made: Path) -> None:
    graph = made / "unet" / "model.onnx"
    graph.write_bytes(graph.read_bytes() + b"\n")
    bundle.write(made, bundle.read(made, verify=False))
    refused(made, BundleError, "another unet/model.onnx")


def test_weights_beside_the_graph_count_as_the_graph(made: Path) -> None:
    manifest = bundle.read(made)
    (made / "unet" / "model.onnx.data").write_bytes(b"weights")
    changed = bundle.write(made, manifest)
    assert built.graph_sha256(changed, UNET) != built.graph_sha256(manifest, UNET)
    edit = replace(UNET, path="unet_edit/model.onnx")
    assert built.graph_sha256(changed, edit) == built.graph_sha256(manifest, edit)


def test_weights_that_graphs_share_count_as_every_ones(made: Path) -> None:
    edit = EngineRef("tensorrt", "unet/edit.onnx", UNET.config, weights="unet/weights.data", weights_bytes=4)
    first = replace(UNET, weights=edit.weights, weights_bytes=6)
    before = bundle.read(made)
    (made / "unet" / "edit.onnx").write_bytes(b"graph")
    (made / "unet" / "weights.data").write_bytes(b"weights")
    shared = bundle.write(made, before)
    (made / "unet" / "weights.data").write_bytes(b"weightS")
    changed = bundle.write(made, before)
    # a graph beside it is another's
    assert built.graph_sha256(before, UNET) == built.graph_sha256(shared, UNET)
    hashes = {built.graph_sha256(manifest, ref) for manifest in (shared, changed) for ref in (first, edit)}
    assert len(hashes | {built.graph_sha256(shared, UNET)}) == 5
    assert built.graph_bytes(made, shared, edit) == len(b"graph") + 4
    assert built.graph_bytes(made, shared, first) == (made / UNET.path).stat().st_size + 6
    assert built.engine_name(edit.path) != built.engine_name(UNET.path)


def test_an_engine_of_another_recipe_is_refused(made: Path) -> None:
    refused(made, BundleError, "another recipe", ref=replace(UNET, config={**UNET.config, "optimization_level": "5"}))
    refused(made, BundleError, "another recipe", ref=replace(UNET, kind="tensorrt-rtx"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tensorrt": "10.16.2"}, "TensorRT 10.3.0, and this is 10.16.2"),
        ({"name": "Orin Nano"}, "built on Orin .*, and this is Orin Nano"),
        ({"driver": "13.2"}, "CUDA 12.6"),
        ({"compute_capability": "11.0"}, "8.7"),
    ],
)
def test_an_engine_of_another_device_is_refused(made: Path, change: dict[str, str], words: str) -> None:
    refused(made, TargetError, words, device=replace(ORIN, **change))


def test_an_engine_for_named_gpus_runs_on_each_of_them(make_bundle: Callable[..., Path]) -> None:
    root = make_bundle("tensorrt-rtx", {"compute_capabilities": "8.6,8.9"})
    ref = EngineRef("tensorrt-rtx", "unet/model.onnx", {"compute_capabilities": "8.6,8.9"})
    record(root, ref, Fingerprint("1.7.1"))
    manifest = bundle.read(root)
    ada = Fingerprint("1.7.1", "NVIDIA RTX 4090", "8.9", "13.0")
    assert built.find(root, manifest, ref, ada) is not None
    refused(
        root, TargetError, "8.6, 8.9, and this GPU has 12.0", ref=ref, device=replace(ada, compute_capability="12.0")
    )
    refused(root, TargetError, "TensorRT 1.7.1, and this is 1.8", ref=ref, device=replace(ada, tensorrt="1.8"))


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"format": "mtu-built-0", "engines": {}}', '{"format": 1}'])
def test_a_damaged_index_is_an_error_and_the_next_record_begins_anew(made: Path, damage: str) -> None:
    (made / "built" / "index.json").write_text(damage)
    refused(made, BundleError, "index.json is damaged")
    record(made)
    assert built.find(made, bundle.read(made), UNET, ORIN) is not None


def test_an_index_that_names_a_file_elsewhere_is_damaged(made: Path) -> None:
    path = made / "built" / "index.json"
    body = json.loads(path.read_text())
    body["engines"][UNET.path]["engine"] = "../outside.engine"
    path.write_text(json.dumps(body))
    refused(made, BundleError, "damaged")


def test_engines_are_called_after_their_graphs() -> None:
    assert built.engine_name("unet_edit/model.onnx") == "built/unet_edit.engine"
    assert built.engine_name("unet/special.onnx") == "built/unet.special.engine"
    assert built.engine_name("model.onnx") == "built/model.engine"
