"""Read, check and write ONNX files whose weights may lie in a file of their own.

Whatever in this project parses an ONNX file does it here: weights outside the model's own folder are refused
before a byte of them is read, and weights in external data stay on disk until somebody looks at them.
"""

from __future__ import annotations

import os
import secrets
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
from filelock import FileLock, Timeout
from numpy.typing import NDArray
from onnx_ir.passes.common import CheckerPass, LiftConstantsToInitializersPass

from mtu_compile.core.errors import ModelError, PassError, first_line
from mtu_compile.graph.tensors import check_content, check_place, is_external, tensors

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
    """``load`` of a graph that is in memory, whose external data lies in ``folder`` and was checked.

    Raises:
        ModelError: its nodes, values or types are nonsense.
    """
    try:
        return _from_proto(proto, folder)
    except Exception as error:  # whatever onnx_ir raises of nonsense: SerdeError, TypeError, ValueError, IndexError, …
        deepest: BaseException = error
        while deepest.__cause__ is not None:
            deepest = deepest.__cause__
        raise ModelError(
            f"the ONNX graph {proto.graph.name!r} is damaged: {first_line(deepest)}", hint="export the model again"
        ) from error


def _from_proto(proto: onnx.ModelProto, folder: Path) -> ir.Model:
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
    for tensor in tensors(proto):
        check_content(tensor)
    return proto


def check_external_data(proto: onnx.ModelProto, folder: Path) -> None:
    """Refuse external data that is missing, truncated, or reached outside ``folder`` by any way.

    Raises:
        ModelError: see ``tensors.check_place``.
    """
    root = folder.resolve()
    for tensor in tensors(proto):
        if is_external(tensor):
            check_place(tensor, root)


def save(model: ir.Model, path: Path, *, external_bytes: int = EXTERNAL_BYTES, reuse: bool = False) -> Path:
    """Write ``model`` to ``path``; the file appears complete or not at all.

    More than ``external_bytes`` of weights go to ``<path>.data`` beside it, one tensor in memory at a time. A model
    that was loaded from the very file it is written to has to be loaded again afterwards.

    Args:
        model: what to write; it stays as it is.
        path: ONNX file.
        external_bytes: see above.
        reuse: weights that lie in a file of ``path``'s folder stay there and are not written again: for graphs that
            are gone before their neighbour is.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    data_name = f"{path.name}.data"
    weights = [value for value in model.graph.initializers.values() if value.const_value is not None]
    there = {value for value in weights if reuse and _lies_in(value.const_value, path.parent)}
    new = [value for value in weights if value not in there]
    external = sum(value.const_value.nbytes for value in new if value.const_value is not None) > external_bytes
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".onnx-") as scratch:
        if not there:
            if not external:
                ir.external_data.load_to_model(model)
            ir.save(
                model,
                Path(scratch) / path.name,
                external_data=data_name if external else None,
                size_threshold_bytes=INLINE_BYTES,
            )
        else:
            with _written(new if external else [], Path(scratch), data_name):
                ir.save(model, Path(scratch) / path.name)
        for name in (data_name, path.name):
            written = Path(scratch) / name
            if written.exists():
                written.replace(path.parent / name)
    return path


@contextmanager
def beside(graph: Path, name: str) -> Iterator[Path]:
    """Where a graph can be written for a while that reuses weights of ``graph``; it is removed afterwards.

    What a process that was killed left, gigabytes perhaps, is removed by the next: each holds a lock of the kernel's
    while it is at work, which ends with it.

    Args:
        graph: ONNX file.
        name: of what is written, for whoever comes upon it.
    """
    for stem in {one.name.partition(".onnx")[0] for one in graph.parent.glob(f".{name}-*.onnx*")}:
        left = graph.with_name(f"{stem}.onnx")
        if (lock := _claim(left)) is not None:
            _clear(left, lock)
    while (lock := _claim(path := graph.with_name(f".{name}-{secrets.token_hex(4)}.onnx"))) is None:
        pass  # another took the lock for one that was left, and removed it
    try:
        yield path
    finally:
        _clear(path, lock)


def _claim(path: Path) -> FileLock | None:
    """The lock of what is written for a while; ``None`` if another has it."""
    lock = FileLock(path.with_name(f"{path.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return None
    if Path(lock.lock_file).exists():
        return lock
    lock.release()
    return None


def _clear(path: Path, lock: FileLock) -> None:
    for file in (path, path.with_name(f"{path.name}.data"), Path(lock.lock_file)):
        file.unlink(missing_ok=True)
    lock.release()


def _lies_in(tensor: ir.TensorProtocol | None, folder: Path) -> bool:
    """Whether a weight is in a file right in ``folder``."""
    return isinstance(tensor, ir.ExternalTensor) and Path(tensor.path).resolve().parent == folder.resolve()


@contextmanager
def _written(values: Sequence[ir.Value], folder: Path, name: str) -> Iterator[None]:
    """While this lasts, the larger ones of ``values`` lie in the file ``name`` of ``folder``."""
    large = {value: one for value in values if (one := value.const_value) is not None and one.nbytes > INLINE_BYTES}
    if large:
        written = ir.external_data.convert_tensors_to_external(list(large.values()), folder, name)
        for value, tensor in zip(large, written, strict=True):
            value.const_value = tensor
    try:
        yield
    finally:
        for value, one in large.items():
            value.const_value = one


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
    external = (tensor for tensor in tensors(proto) if is_external(tensor))
    return frozenset(entry.value for tensor in external for entry in tensor.external_data if entry.key == "location")


def disk_bytes(path: Path) -> int:
    """Size of an ONNX file and the files of its weights; ``ModelError`` as ``load``."""
    files = weight_files(load_proto(path))
    return path.stat().st_size + sum((path.parent / name).stat().st_size for name in files)


def weight_bytes(model: ir.Model) -> int:
    """Bytes of all initialisers."""
    constants = (value.const_value for value in model.graph.initializers.values())
    return sum(constant.nbytes for constant in constants if constant is not None)
