"""ONNX files."""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence

import numpy as np
import onnx
import onnx_ir as ir

from mtu_compile.graph import io as graph_io
from tests.fuzz.harness import Harness, Wrong, new_folder

_TEXTS = ("", "..", "../x", "/etc/hostname", "weights", "x" * 300, "a\0b", "é", "weights/../../x", "0", "-1", "9" * 30)
_NUMBERS = (0, 1, -1, 2, 7, 16, 17, 23, 2**31 - 1, -(2**31), 2**40, 2**62)


def _graph(external: bool) -> onnx.ModelProto:
    model = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 20]> g (float[2, 4] x) => (float[2, 3] y) '
        "{ c = Constant <value: tensor = float[1] {2.0}> () z = MatMul(x, w) y = Mul(z, c) }"
    )
    tensor = onnx.numpy_helper.from_array(np.arange(12, dtype=np.float32).reshape(4, 3), "w")
    if external:
        tensor.ClearField("raw_data")
        tensor.data_location = onnx.TensorProto.EXTERNAL
        for key, value in (("location", "weights"), ("offset", "0"), ("length", "48")):
            tensor.external_data.add(key=key, value=value)
    model.graph.initializer.append(tensor)
    return model


class Graphs(Harness):
    """``graph.io``: weights of a graph that is taken lie in its folder, and are as long as its file says."""

    name = "onnx"

    def __init__(self) -> None:
        logging.getLogger("onnx_ir").setLevel(logging.CRITICAL)  # it has something to say of every other input
        self.folder = new_folder()
        (self.folder / "weights").write_bytes(np.arange(12, dtype=np.float32).tobytes())

    def seeds(self) -> Sequence[bytes]:
        return tuple(_graph(external).SerializeToString() for external in (False, True))

    def mutate(self, data: bytes, rng: random.Random) -> bytes | None:
        if rng.random() < 0.3:
            return None
        model = onnx.ModelProto()
        try:
            model.ParseFromString(data)
            for _ in range(rng.choice((1, 1, 2, 4))):
                _change(model, rng)
            return model.SerializeToString()
        except Exception:  # protobuf's own errors: no message, or a value that a field cannot have
            return None

    def read(self, data: bytes) -> None:
        path = self.folder / "model.onnx"
        path.write_bytes(data)
        proto = graph_io.load_proto(path)
        root = self.folder.resolve()
        for name in graph_io.weight_files(proto):
            if not (root / name).resolve().is_relative_to(root):
                raise Wrong(f"its weights lie at {name!r}")
        graph_io.disk_bytes(path)
        model = graph_io.load(path)
        for value in model.graph.initializers.values():
            constant = value.const_value
            if constant is not None and constant.nbytes < 1 << 20 and constant.dtype != ir.DataType.STRING:
                graph_io.read_weight(constant)
        graph_io.weight_bytes(model)


def _change(message: object, rng: random.Random) -> None:
    """One field somewhere in a protobuf message."""
    while True:
        fields = message.ListFields()  # type: ignore[attr-defined]
        if not fields:
            return
        descriptor, value = rng.choice(fields)
        inner = descriptor.message_type is not None
        repeated = hasattr(value, "append") or hasattr(value, "add")
        if inner and (not repeated or (len(value) and rng.random() < 0.8)):
            message = rng.choice(list(value)) if repeated else value
            if rng.random() < 0.15:
                _set_field(message, rng)
                return
            continue
        if repeated:
            way = rng.randrange(3)
            if way == 0 and len(value):
                del value[rng.randrange(len(value))]
            elif way == 1 and len(value):
                value.append(value[rng.randrange(len(value))])
            elif len(value) and not inner:
                value[rng.randrange(len(value))] = _other(value[0], rng)
            return
        setattr(message, descriptor.name, _other(value, rng))
        return


def _set_field(message: object, rng: random.Random) -> None:
    """A field that may not be set yet."""
    descriptor = rng.choice(list(message.DESCRIPTOR.fields))  # type: ignore[attr-defined]
    value = getattr(message, descriptor.name)
    if descriptor.message_type is not None or hasattr(value, "append"):
        if hasattr(value, "add"):
            value.add()
        return
    setattr(message, descriptor.name, _other(value, rng))


def _other(value: object, rng: random.Random) -> object:
    if isinstance(value, str):
        return rng.choice(_TEXTS)
    if isinstance(value, bytes):
        return rng.choice((b"", b"\0", value[:-1], value + value, b"\xff" * 16))
    if isinstance(value, float):
        return rng.choice((0.0, float("nan"), float("inf"), -1e38))
    number = rng.choice(_NUMBERS)
    return number if abs(number) < 2**31 or isinstance(value, bool) else rng.choice((0, 1, 16, 2**31 - 1))
