"""Read, check and write ONNX files whose weights may lie in a file of their own.

Whatever in this project parses an ONNX file does it here: weights outside the model's own folder are refused
before a byte of them is read, and weights in external data stay on disk until somebody looks at them.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes.common import CheckerPass, LiftConstantsToInitializersPass

from mtu_compile.core.errors import ModelError, PassError, first_line

#: Weights larger than this are written beside the model. Protobuf ends at 2 GiB; much earlier, one file means holding
#: all weights in memory twice to write them.
EXTERNAL_BYTES = 256 * 2**20

#: Tensors up to this size stay in the model file, and are read with it: the ONNX checker and shape inference want to
#: see the small ones (shapes, indices).
INLINE_BYTES = 1024


def load(path: Path) -> ir.Model:
    """Open an ONNX file; external weights are memory-mapped when they are first looked at.

    Raises:
        ModelError: no such file, not ONNX, truncated, or external data outside the model's folder.
    """
    return from_proto(load_proto(path), path.parent)


def from_proto(proto: onnx.ModelProto, folder: Path) -> ir.Model:
    """``load`` of a graph that is in memory, whose external data lies in ``folder`` and was checked."""
    model: ir.Model = ir.from_proto(proto)
    ir.external_data.set_base_dir(model.graph, folder.resolve())
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor) and tensor.nbytes <= INLINE_BYTES:
            value.const_value = ir.Tensor(tensor.numpy().copy(), dtype=tensor.dtype, name=tensor.name)
            tensor.release()
    LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    return model


def read_weight(tensor: ir.TensorProtocol) -> NDArray[np.float64]:
    """A weight for arithmetic; if it lies in a file, the file is let go of again."""
    array: NDArray[np.float64] = tensor.numpy().astype(np.float64)
    if isinstance(tensor, ir.ExternalTensor):
        tensor.release()
    return array


def load_proto(path: Path) -> onnx.ModelProto:
    """Read an ONNX file without its external weights, whose places and sizes have been checked.

    Raises:
        ModelError: as ``load``.
    """
    try:
        proto = onnx.load(os.fspath(path), load_external_data=False)
    except FileNotFoundError as error:
        raise ModelError(f"there is no ONNX file at {path}") from error
    except Exception as error:  # protobuf's DecodeError, or whatever reading the file raised
        raise ModelError(f"{path} is not an ONNX file or is truncated", hint="export the model again") from error
    if not proto.graph.output:
        raise ModelError(f"{path} holds no graph", hint="export the model again")
    check_external_data(proto, path.parent)
    return proto


def check_external_data(proto: onnx.ModelProto, folder: Path) -> None:
    """Refuse external data that is missing, truncated, or reached outside ``folder`` by any way.

    ``..``, absolute paths, and links (symbolic ones that leave the folder, and hard ones) are refused: a model file is
    data from elsewhere and must not make us read other files of this machine.
    """
    root = folder.resolve()
    for tensor in _tensors(proto):
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        entries = {entry.key: entry.value for entry in tensor.external_data}
        location = entries.get("location", "")
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
        try:
            end = int(entries.get("offset", "0")) + int(entries.get("length", "0"))
        except ValueError as error:
            raise ModelError(f"weight {tensor.name!r} has no readable place in {file}") from error
        if end > file.stat().st_size:
            raise ModelError(f"{file} is truncated: it ends before weight {tensor.name!r}", hint="copy it again")


def save(model: ir.Model, path: Path, *, external_bytes: int = EXTERNAL_BYTES) -> Path:
    """Write ``model`` to ``path``; the file appears complete or not at all.

    More than ``external_bytes`` of weights go to ``<path>.data`` beside it, one tensor in memory at a time. A model
    that was loaded from the very file it is written to has to be loaded again afterwards.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    data_name = f"{path.name}.data"
    external = weight_bytes(model) > external_bytes
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".onnx-") as scratch:
        if not external:
            ir.external_data.load_to_model(model)
        ir.save(
            model,
            Path(scratch) / path.name,
            external_data=data_name if external else None,
            size_threshold_bytes=INLINE_BYTES,
        )
        for name in (data_name, path.name):
            written = Path(scratch) / name
            if written.exists():
                written.replace(path.parent / name)
    return path


def check(model: ir.Model, maker: str) -> None:
    """Try the ONNX checker and shape inference on ``model``.

    Raises:
        PassError: that ``maker`` left an invalid graph, and in what way.
    """
    try:
        CheckerPass(full_check=True)(model)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError, ir.passes.PassError) as error:
        raise PassError(f"{maker} left an invalid graph: {first_line(error.__cause__ or error)}") from error


def weight_files(proto: onnx.ModelProto) -> frozenset[str]:
    """Where external weights lie, relative to the model's folder."""
    tensors = (tensor for tensor in _tensors(proto) if tensor.data_location == onnx.TensorProto.EXTERNAL)
    return frozenset(entry.value for tensor in tensors for entry in tensor.external_data if entry.key == "location")


def disk_bytes(path: Path) -> int:
    """Size of an ONNX file and the files of its weights; ``ModelError`` as ``load``."""
    files = weight_files(load_proto(path))
    return path.stat().st_size + sum((path.parent / name).stat().st_size for name in files)


def weight_bytes(model: ir.Model) -> int:
    """Bytes of all initialisers."""
    tensors = (value.const_value for value in model.graph.initializers.values())
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def _leaves_folder(location: str) -> bool:
    posix, windows = PurePosixPath(location), PureWindowsPath(location)
    return posix.is_absolute() or bool(windows.anchor) or ".." in posix.parts or ".." in windows.parts


def _tensors(proto: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    yield from _graph_tensors(proto.graph)
    for function in proto.functions:
        for node in function.node:
            yield from _node_tensors(node)


def _graph_tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    for node in graph.node:
        yield from _node_tensors(node)


def _node_tensors(node: onnx.NodeProto) -> Iterator[onnx.TensorProto]:
    for attribute in node.attribute:
        yield from (attribute.t, *attribute.tensors)
        for sparse in (attribute.sparse_tensor, *attribute.sparse_tensors):
            yield from (sparse.values, sparse.indices)
        for graph in (attribute.g, *attribute.graphs):
            yield from _graph_tensors(graph)
