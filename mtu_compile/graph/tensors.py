"""The constants of an ONNX file, wherever in it they are, held against what they say of themselves."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath

import onnx
import onnx_ir as ir

from mtu_compile.core.errors import ModelError

_AGAIN = "export the model again"
#: What says where an external constant lies. There is ``basepath``, too, which libraries set themselves.
_ENTRIES = frozenset({"location", "offset", "length", "checksum"})


def tensors(proto: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Every constant: of graphs, of graphs within them, of nodes and of functions."""
    yield from _of_graph(proto.graph)
    for function in proto.functions:
        for node in function.node:
            yield from _of_node(node)


def check_content(tensor: onnx.TensorProto) -> None:
    """``ModelError`` unless a constant has a type, and as many bytes or numbers in the file as its shape takes."""
    try:
        kind = ir.DataType(tensor.data_type)
        if any(size < 0 for size in tensor.dims):
            raise ValueError(f"its shape is {list(tensor.dims)}")
        if is_external(tensor):
            return  # ``check_place`` has looked
        if tensor.HasField("raw_data"):
            if kind == ir.DataType.STRING or len(tensor.raw_data) != byte_count(tensor):
                raise ValueError(f"{len(tensor.raw_data)} bytes are there for the shape {list(tensor.dims)}")
        else:
            ir.from_proto(tensor).numpy()  # few: exporters write large ones as bytes
    except Exception as error:  # whatever onnx_ir and numpy raise of nonsense
        raise ModelError(f"constant {tensor.name!r} is damaged: {error}", hint=_AGAIN) from error


def check_place(tensor: onnx.TensorProto, root: Path) -> None:
    """``ModelError`` unless the file an external constant lies in is in the folder ``root``, and long enough.

    ``..``, absolute paths, and links (symbolic ones that leave the folder, and hard ones) are refused: a model file is
    data from elsewhere and must not make us read other files of this machine.
    """
    entries = {entry.key: entry.value for entry in tensor.external_data}
    location = entries.get("location", "")
    if not all(isinstance(word, str) for item in entries.items() for word in item):  # protobuf leaves what is no UTF-8
        raise ModelError(f"weight {tensor.name!r} has no readable place", hint=_AGAIN)
    if len(entries) != len(tensor.external_data) or not entries.keys() <= _ENTRIES:
        raise ModelError(f"weight {tensor.name!r} has two places, or one that no exporter writes", hint=_AGAIN)
    if not location or _leaves_folder(location) or not (root / location).resolve().is_relative_to(root):
        raise ModelError(
            f"weight {tensor.name!r} lies outside the model's folder, at {location!r}",
            hint="external data has to lie beside the model; export the model again",
        )
    file = root / location
    if not file.is_file():
        raise ModelError(f"{file} is missing: it holds weight {tensor.name!r}", hint="copy it beside the model")
    if file.stat().st_nlink > 1:  # onnx and onnx_ir refuse to read it, too
        raise ModelError(f"{file} is a hard link: it may be a file of another place", hint="make a copy of it")
    numbers = [entries.get(key, "0") for key in ("offset", "length")]
    if not all(one.isascii() and one.isdigit() and len(one) < 20 for one in numbers):
        raise ModelError(f"weight {tensor.name!r} has no readable place in {file}", hint=_AGAIN)
    offset, length = map(int, numbers)
    try:
        needed = byte_count(tensor)
    except (ValueError, TypeError) as error:
        raise ModelError(f"weight {tensor.name!r} is damaged: {error}", hint=_AGAIN) from error
    if "length" in entries and length != needed:
        raise ModelError(f"weight {tensor.name!r} has {length} bytes, and its shape takes {needed}", hint=_AGAIN)
    if offset + needed > file.stat().st_size:
        raise ModelError(f"{file} is truncated: it ends before weight {tensor.name!r}", hint="copy it again")


def is_external(tensor: onnx.TensorProto) -> bool:
    """Whether its bytes lie in another file."""
    return bool(tensor.data_location == onnx.TensorProto.EXTERNAL)


def byte_count(tensor: onnx.TensorProto) -> int:
    """Bytes that a constant's shape takes; ``ValueError`` or ``TypeError`` for a type or shape that has none."""
    if any(size < 0 for size in tensor.dims):
        raise ValueError(f"its shape is {list(tensor.dims)}")
    bits: int = math.prod(tensor.dims) * ir.DataType(tensor.data_type).bitwidth
    return -(-bits // 8)


def _leaves_folder(location: str) -> bool:
    posix, windows = PurePosixPath(location), PureWindowsPath(location)
    outside = posix.is_absolute() or bool(windows.anchor) or ".." in posix.parts or ".." in windows.parts
    return outside or "\0" in location or len(location.encode(errors="replace")) > 255


def _of_graph(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from _of_sparse(sparse)
    for node in graph.node:
        yield from _of_node(node)


def _of_node(node: onnx.NodeProto) -> Iterator[onnx.TensorProto]:
    for attribute in node.attribute:
        if attribute.HasField("t"):
            yield attribute.t
        yield from attribute.tensors
        if attribute.HasField("sparse_tensor"):
            yield from _of_sparse(attribute.sparse_tensor)
        for sparse in attribute.sparse_tensors:
            yield from _of_sparse(sparse)
        if attribute.HasField("g"):
            yield from _of_graph(attribute.g)
        for graph in attribute.graphs:
            yield from _of_graph(graph)


def _of_sparse(sparse: onnx.SparseTensorProto) -> Iterator[onnx.TensorProto]:
    for field in ("values", "indices"):
        if sparse.HasField(field):
            yield getattr(sparse, field)
