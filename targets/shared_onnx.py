"""Several ONNX graphs whose weights lie in one file: what tasks have in common is on the disk, and mapped, once.

External data has to lie in the folder of the graph that points to it: ONNX Runtime, onnx and this project follow no way
out of there. So the graphs come to lie side by side.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from mtu_compile.bundle import EngineRef
from mtu_compile.graph import io as graph_io
from mtu_compile.graph.weight_file import Weight, WeightFile, common_bytes

if TYPE_CHECKING:
    import onnx

#: Folder of the graphs, and the file of their weights in it.
FOLDER, WEIGHTS = "unet", "weights.data"


def share_onnx_weights(
    folder: Path, engines: Mapping[str, EngineRef], *, least_bytes: int = 1
) -> Mapping[str, EngineRef]:
    """Move the graphs of a bundle's tasks to ``unet/<task>.onnx``, their weights to ``unet/weights.data``.

    What was built from a graph goes with it.

    Args:
        folder: the bundle.
        engines: by task.
        least_bytes: what has to be saved at least.

    Returns:
        The engines by task, as they are now; ``engines``, and nothing is changed, if there is less to save.
    """
    if common_bytes(_sizes(folder / ref.path) for ref in engines.values()) < least_bytes:
        return engines
    home, work = folder / FOLDER, folder / f".{FOLDER}"
    work.mkdir()
    moved = {}
    with (work / WEIGHTS).open("wb") as file:
        merged = WeightFile(file)
        for task, ref in engines.items():
            read = _write(folder / ref.path, work / f"{task}.onnx", merged)
            moved[task] = replace(ref, path=f"{FOLDER}/{task}.onnx", weights=f"{FOLDER}/{WEIGHTS}", weights_bytes=read)
            if ref.prebuilt is not None:
                name = f"{task}{PurePosixPath(ref.prebuilt).suffix}"
                (folder / ref.prebuilt).replace(work / name)
                moved[task] = replace(moved[task], prebuilt=f"{FOLDER}/{name}")
            _remove(folder / ref.path)
    home.mkdir(exist_ok=True)
    for one in work.iterdir():
        one.replace(home / one.name)
    work.rmdir()
    return moved


def _write(graph: Path, to: Path, merged: WeightFile) -> int:
    """Write ``graph`` to ``to``, its weights to ``merged``; returns the bytes of weights that it reads there."""
    from onnx.external_data_helper import set_external_data

    proto = graph_io.load_proto(graph)
    read = {}
    for tensor, weight in _weights(proto, graph.parent):
        digest = weight.digest()
        place = merged.put(weight, digest)
        tensor.raw_data = b""  # ``set_external_data`` wants to see one
        set_external_data(tensor, WEIGHTS, offset=place, length=weight.size)
        tensor.ClearField("raw_data")
        read[digest] = weight.size
    to.write_bytes(proto.SerializeToString())
    return sum(read.values())


def _remove(graph: Path) -> None:
    """Remove a graph, the files of its weights, and its folder if nothing is left there."""
    files = graph_io.weight_files(graph_io.load_proto(graph))
    for one in (graph, *(graph.parent / name for name in files)):
        one.unlink()
    if not any(graph.parent.iterdir()):
        graph.parent.rmdir()


def _sizes(graph: Path) -> dict[str, int]:
    """Size by SHA-256 of a graph's weights."""
    return {weight.digest(): weight.size for _, weight in _weights(graph_io.load_proto(graph), graph.parent)}


def _weights(proto: onnx.ModelProto, folder: Path) -> Iterator[tuple[onnx.TensorProto, Weight]]:
    """Initialisers, and where their bytes are now; without those so small that they stay in the graph."""
    for tensor in proto.graph.initializer:
        if tensor.external_data:
            said = {entry.key: entry.value for entry in tensor.external_data}
            file, offset = folder / said["location"], int(said.get("offset", "0"))
            size = int(said["length"]) if "length" in said else file.stat().st_size - offset
            yield tensor, Weight(file, offset, size)
        elif len(tensor.raw_data) > graph_io.INLINE_BYTES:
            yield tensor, Weight(tensor.raw_data, 0, len(tensor.raw_data))
