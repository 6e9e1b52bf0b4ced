from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import passes
from mtu_compile.core.errors import EXIT_INPUT, ModelError
from passes import folding, graph_io

TEXT, HEIGHT, WIDTH = 5, 8, 4


@pytest.fixture
def external(micro: Path, tmp_path: Path) -> Path:
    """The smallest multi-task graph with its weights in a file of their own."""
    folder = tmp_path / "external"
    return graph_io.save(graph_io.load(micro), folder / "model.onnx", external_bytes=0)


def point(path: Path, location: str) -> None:
    """Let the external weights of the model at ``path`` lie at ``location``."""
    proto = onnx.load(str(path), load_external_data=False)
    for tensor in proto.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location
    path.write_bytes(proto.SerializeToString())


def refused(path: Path) -> str:
    with pytest.raises(ModelError) as caught:
        graph_io.load(path)
    assert caught.value.exit_code == EXIT_INPUT
    return caught.value.message


def test_large_weights_lie_beside_the_model(external: Path, micro: Path, random_feeds: Any, run_graph: Any) -> None:
    assert {p.name for p in external.parent.iterdir()} == {"model.onnx", "model.onnx.data"}
    proto = onnx.load(str(external), load_external_data=False)
    places = {e.value for t in proto.graph.initializer for e in t.external_data if e.key == "location"}
    assert places == {"model.onnx.data"}
    feeds = random_feeds(micro, 1, 9) | {"task_ids": np.array([2])}
    np.testing.assert_array_equal(*(run_graph(path, feeds)["out_sample"] for path in (external, micro)))


def test_specialising_reads_only_the_weights_it_rewrites(
    external: Path, micro: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, random_feeds: Any, run_graph: Any
) -> None:
    read: set[str] = set()
    for method in ("numpy", "tobytes"):
        original = getattr(ir.ExternalTensor, method)

        def spy(tensor: ir.ExternalTensor, original: Any = original) -> Any:
            read.add(tensor.name)
            return original(tensor)

        monkeypatch.setattr(ir.ExternalTensor, method, spy)
    options = {"task_id": 1, "channels": 8, "batch": 3, "height": HEIGHT, "width": WIDTH, "text_length": TEXT}
    out = tmp_path / "lazy" / "model.onnx"
    passes.specialise(external, out, **options, external_bytes=0)
    source = onnx.load(str(external), load_external_data=False)
    sizes = {t.name: int(np.prod(t.dims)) * 4 for t in source.graph.initializer if t.external_data}
    weights = {name for name, size in sizes.items() if size > 4 * folding.SMALL}
    kept = weights & {t.name for t in onnx.load(str(out), load_external_data=False).graph.initializer}
    assert len(kept) >= 6 and not kept & read
    assert (out.parent / "model.onnx.data").exists()
    whole = tmp_path / "whole.onnx"
    passes.specialise(micro, whole, **options)
    feeds = random_feeds(whole, 3, 8)
    np.testing.assert_array_equal(*(run_graph(path, feeds)["out_sample"] for path in (out, whole)))


@pytest.mark.parametrize("location", ["../model.onnx.data", "sub/../../x", "{absolute}", "C:\\x", "..\\x", ""])
def test_weights_outside_the_models_folder_are_refused(location: str, external: Path) -> None:
    outside = external.parent.parent / "model.onnx.data"
    outside.write_bytes((external.parent / "model.onnx.data").read_bytes())
    point(external, location.format(absolute=outside))
    assert "lies outside the model's folder" in refused(external)


def test_a_link_out_of_the_folder_is_refused(external: Path) -> None:
    data = external.parent / "model.onnx.data"
    outside = data.rename(external.parent.parent / "secret")
    data.symlink_to(outside)
    assert "lies outside the model's folder" in refused(external)
    data.unlink()
    os.link(outside, data)
    assert "is a hard link" in refused(external)


def test_a_link_inside_the_folder_is_read(external: Path) -> None:
    data = external.parent / "model.onnx.data"
    data.symlink_to(data.rename(data.with_name("weights")).name)
    graph_io.load(external)


def test_weights_hidden_in_a_nodes_attribute_are_checked_too(tmp_path: Path) -> None:
    tensor = onnx.TensorProto(data_type=1, dims=[1], name="hidden", data_location=onnx.TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="/etc/hostname")
    node = onnx.helper.make_node("Constant", [], ["y"], value=tensor)
    output = onnx.helper.make_tensor_value_info("y", 1, [1])
    path = tmp_path / "model.onnx"
    path.write_bytes(onnx.helper.make_model(onnx.helper.make_graph([node], "g", [], [output])).SerializeToString())
    assert "weight 'hidden' lies outside" in refused(path)


def test_damaged_files_are_refused(external: Path, tmp_path: Path) -> None:
    data = external.parent / "model.onnx.data"
    data.write_bytes(data.read_bytes()[:-1])
    assert "is truncated" in refused(external)
    data.unlink()
    assert "is missing" in refused(external)
    external.write_bytes(external.read_bytes()[:1000])
    assert "is not an ONNX file or is truncated" in refused(external)
    external.write_bytes(b"")
    assert "holds no graph" in refused(external)
    assert "there is no ONNX file" in refused(tmp_path / "nowhere.onnx")


def test_nothing_half_written_is_left(micro: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **options: Any) -> None:
        (Path(args[1])).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(graph_io.ir, "save", full)
    with pytest.raises(OSError, match="No space left"):
        graph_io.save(graph_io.load(micro), tmp_path / "out" / "model.onnx")
    assert not list((tmp_path / "out").iterdir())


def test_a_model_may_be_written_over_itself(external: Path, micro: Path, random_feeds: Any, run_graph: Any) -> None:
    graph_io.save(graph_io.load(external), external, external_bytes=0)
    feeds = random_feeds(micro, 1, 9) | {"task_ids": np.array([0])}
    np.testing.assert_array_equal(*(run_graph(path, feeds)["out_sample"] for path in (external, micro)))
