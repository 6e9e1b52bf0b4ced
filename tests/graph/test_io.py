from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from mtu_compile.core.errors import EXIT_INPUT, ModelError, PassError
from mtu_compile.graph import io as graph_io

X = np.random.default_rng(1).standard_normal((2, 4), dtype=np.float32)


def graph(body: str = "y = MatMul(x, w)") -> onnx.ModelProto:
    """x [2, 4] → MatMul with w [4, 300], which is too large to be kept in the model file beside external data."""
    text = f'<ir_version: 10, opset_import: ["" : 20]> g (float[2, 4] x) => (float[2, 300] y) {{ {body} }}'
    model = onnx.parser.parse_model(text)
    weight = np.random.default_rng(0).standard_normal((4, 300), dtype=np.float32)
    model.graph.initializer.append(onnx.numpy_helper.from_array(weight, "w"))
    return model


def run(path: Path) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(str(path), options).run(None, {"x": X})[0]


@pytest.fixture
def inline(tmp_path: Path) -> Path:
    """A graph with its weights inside."""
    onnx.save(graph(), str(tmp_path / "inline.onnx"))
    return tmp_path / "inline.onnx"


@pytest.fixture
def external(inline: Path, tmp_path: Path) -> Path:
    """The same graph with its weights in a file of their own."""
    return graph_io.save(graph_io.load(inline), tmp_path / "external" / "model.onnx", external_bytes=0)


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


def test_large_weights_lie_beside_the_model(external: Path, inline: Path) -> None:
    files = {path.name: path.stat() for path in external.parent.iterdir()}
    assert set(files) == {"model.onnx", "model.onnx.data"}
    assert len({stat.st_mode for stat in files.values()}) == 1
    proto = onnx.load(str(external), load_external_data=False)
    assert graph_io.weight_files(proto) == {"model.onnx.data"}
    assert graph_io.disk_bytes(external) == sum(stat.st_size for stat in files.values())
    assert graph_io.disk_bytes(inline) == inline.stat().st_size
    np.testing.assert_array_equal(run(external), run(inline))


def test_a_neighbour_shares_the_weights_that_are_the_same(external: Path, inline: Path) -> None:
    model = graph_io.load(external)
    model.graph.node(0).name = "renamed"
    data = external.with_name("model.onnx.data")
    added = np.full((4, 300), 2.0, np.float32)
    value = ir.Value(name="more", const_value=ir.tensor(added), shape=ir.Shape(added.shape))
    value.type = ir.TensorType(ir.DataType.FLOAT)
    model.graph.register_initializer(value)
    before = data.read_bytes()
    with graph_io.beside(external, "twin") as path:
        for most in (0, 1 << 20):  # what is new lies in a file of its own, or in the graph
            graph_io.save(model, path, external_bytes=most, reuse=True)
            files = graph_io.weight_files(graph_io.load_proto(path))
            assert files == ({data.name, f"{path.name}.data"} if most == 0 else {data.name})
            np.testing.assert_array_equal(graph_io.load(path).graph.initializers["more"].const_value.numpy(), added)
            np.testing.assert_array_equal(run(path), run(inline))
        assert value.const_value is not None and not isinstance(value.const_value, ir.ExternalTensor)
    assert data.read_bytes() == before
    assert {one.name for one in external.parent.iterdir()} == {"model.onnx", "model.onnx.data"}


def test_what_a_killed_process_left_is_removed_by_the_next(external: Path) -> None:
    """And nothing of one that is at work."""
    code = (
        "import sys, time; from pathlib import Path; from mtu_compile.graph import io\n"
        "with io.beside(Path(sys.argv[1]), 'twin') as path:\n"
        "    path.write_bytes(b'graph'); path.with_name(path.name + '.data').write_bytes(b'weights')\n"
        "    print(path, flush=True); time.sleep(600)\n"
    )
    others = [
        subprocess.Popen([sys.executable, "-c", code, str(external)], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    try:
        left, at_work = (Path(one.stdout.readline().strip()) for one in others if one.stdout)
        others[0].kill()
        others[0].wait()
        assert left.exists()
        with graph_io.beside(external, "twin") as path:
            assert path not in (left, at_work) and not path.exists()
            assert at_work.read_bytes() == b"graph"
            assert {one.name for one in external.parent.iterdir() if one.name.startswith(left.name)} == set()
    finally:
        for one in others:
            one.kill()
            one.wait()
    with graph_io.beside(external, "twin"):
        pass
    assert {one.name for one in external.parent.iterdir()} == {"model.onnx", "model.onnx.data"}


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
    def weights() -> dict[str, bytes]:
        found = graph_io.load(external).graph.initializers
        return {name: value.const_value.numpy().tobytes() for name, value in found.items()}

    data, before = external.parent / "model.onnx.data", weights()
    data.symlink_to(data.rename(data.with_name("weights")).name)
    assert before and weights() == before


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
    external.write_bytes(external.read_bytes()[:-10])
    assert "is not an ONNX file or is truncated" in refused(external)
    external.write_bytes(b"")
    assert "holds no graph" in refused(external)
    assert "there is no ONNX file" in refused(tmp_path / "nowhere.onnx")


def test_nothing_half_written_is_left(inline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **options: Any) -> None:
        (Path(args[1])).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(graph_io.ir, "save", full)
    with pytest.raises(OSError, match="No space left"):
        graph_io.save(graph_io.load(inline), tmp_path / "out" / "model.onnx")
    assert not list((tmp_path / "out").iterdir())


def test_a_model_may_be_written_over_itself(external: Path, inline: Path) -> None:
    graph_io.save(graph_io.load(external), external, external_bytes=0)
    np.testing.assert_array_equal(run(external), run(inline))


@pytest.mark.parametrize("body", ["y = Mystery(x, w)", "y = Add(x, w)"])
def test_an_invalid_graph_is_said_to_be_its_makers(body: str) -> None:
    graph_io.check(graph_io.ir.from_proto(graph()), "somebody")
    with pytest.raises(PassError, match="somebody left an invalid graph: "):
        graph_io.check(graph_io.ir.from_proto(graph(body)), "somebody")
