"""Passes that users wrote: functions over an ``onnx_graphsurgeon.Graph``, run between guards.

A pass takes the static float graph of one task, edits it in place or returns another, and is run after our own passes
and before quantisation. Around it stand the ONNX checker, the graph's signature (names, types and shapes of inputs and
outputs), and its results: the edited graph must give what the old one gave, within the tolerance the function declares.

    @mtu_pass(tolerance=1e-3)
    def tanh_gelu(graph: gs.Graph) -> None: ...

A pass is named as ``FILE.py:function``, or by an entry point of the group ``mtu_compile.passes``.
"""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import math
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.machinery import SourceFileLoader
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from mtu_compile.core.errors import ConfigError, PassError, first_line
from mtu_compile.graph import io as graph_io
from mtu_compile.graph.edit import TASK
from mtu_compile.graph.sessions import open_as_written

if TYPE_CHECKING:
    import onnx
    import onnx_graphsurgeon as gs

GROUP = "mtu_compile.passes"

#: What a pass may change results by unless it declares more: float32 arithmetic in another order.
EXACT = 1e-5

#: UNet calls the results are compared on: the first, a middle and the last of a trajectory.
TIMESTEPS = (999.0, 500.0, 1.0)

Function = TypeVar("Function", bound=Callable[..., Any])


def mtu_pass(*, tolerance: float) -> Callable[[Function], Function]:
    """Declare what a pass may change results by.

    Args:
        tolerance: largest difference of an output, as a share of the output's largest value; without a declaration
            it is ``EXACT``.
    """
    if not (math.isfinite(tolerance) and tolerance >= 0):
        raise ValueError(f"a tolerance is a number from 0 up, not {tolerance}")

    def declare(function: Function) -> Function:
        function.tolerance = tolerance  # type: ignore[attr-defined]
        return function

    return declare


@dataclass(frozen=True)
class UserPass:
    """A pass that somebody wrote.

    Attributes:
        id: ``user::<module>:<function>``.
        function: takes an ``onnx_graphsurgeon.Graph``, edits it or returns another.
        sha256: of the file the function was read from.
        tolerance: largest difference of an output, as a share of its largest value.
    """

    id: str
    function: Callable[[gs.Graph], gs.Graph | None]
    sha256: str
    tolerance: float = EXACT


@dataclass(frozen=True)
class UserPassResult:
    """What a user's pass did to one graph.

    Attributes:
        id, sha256, tolerance: of the pass.
        rewrites: nodes that are new or changed, or nodes that are gone if those are more.
        changed: the graph is another one; it may be without rewrites, where only weights differ.
        error: largest difference of an output that was measured, as a share of its largest value.
    """

    id: str
    sha256: str
    tolerance: float
    rewrites: int
    changed: bool
    error: float


def load_pass(name: str) -> UserPass:
    """The pass called ``name``; its file is run, as Python runs an import.

    Args:
        name: ``FILE.py:function``, or an entry point of ``mtu_compile.passes``.

    Raises:
        ConfigError: no such file, function or entry point; a file that cannot be imported; no function.
    """
    file, colon, attribute = name.rpartition(":")
    module = _import_file(Path(file)) if colon and file.endswith(".py") else None
    if module is None:
        known = {entry.name: entry for entry in entry_points(group=GROUP)}
        if name not in known:
            installed = f"; installed ones are {', '.join(sorted(known))}" if known else ""
            raise ConfigError(f"unknown pass {name!r}", hint=f"write FILE.py:function{installed}")
        entry = known[name]
        try:
            module, attribute = importlib.import_module(entry.module), entry.attr
        except Exception as error:
            raise ConfigError(f"pass {name!r} cannot be imported: {first_line(error)}") from error
        file = str(module.__file__)
    function = getattr(module, attribute, None)
    if not callable(function):
        functions = sorted(key for key, value in vars(module).items() if _is_pass(value, module))
        raise ConfigError(f"{file} has no function {attribute!r}", hint=f"it has {', '.join(functions) or 'none'}")
    return UserPass(
        id=f"user::{Path(file).stem}:{attribute}",
        function=function,
        sha256=hashlib.sha256(Path(file).read_bytes()).hexdigest(),
        tolerance=float(getattr(function, "tolerance", EXACT)),
    )


def load_passes(names: Sequence[str]) -> tuple[UserPass, ...]:
    """The passes called ``names``, in this order; ``ConfigError`` as ``load_pass``, and for one that comes twice."""
    loaded = tuple(load_pass(name) for name in names)
    ids = [item.id for item in loaded]
    if twice := [name for position, name in enumerate(ids) if name in ids[:position]]:
        raise ConfigError(f"pass {twice[0]!r} is given twice")
    return loaded


def run_user_pass(item: UserPass, graph: Path, out: Path) -> UserPassResult:
    """Run a user's pass on a static ONNX file, and write the graph it makes to ``out`` if it holds.

    Args:
        item: the pass.
        graph: static float graph of one task.
        out: another file to write; weights above ``graph_io.EXTERNAL_BYTES`` go to ``<out>.data``.

    Raises:
        PassError: the function failed; it left no graph, an invalid one, one of another signature, or one whose
            results differ by more than the pass declares. Nothing is written.
        ModelError: ``graph`` cannot be read.
    """
    import onnx
    import onnx_graphsurgeon as gs
    import onnx_ir as ir

    graph_io.load_proto(graph)  # refuses weights that lie elsewhere before any of them is read
    before = onnx.load(graph)
    edited = gs.import_onnx(before)
    try:
        answer = item.function(edited)
    except Exception as error:
        raise PassError(f"{item.id} failed: {type(error).__name__}: {first_line(error)}", hint=_place(error)) from error
    edited = edited if answer is None else answer
    if not isinstance(edited, gs.Graph):
        raise PassError(
            f"{item.id} returned {type(edited).__name__}",
            hint="edit the graph in place, or return an onnx_graphsurgeon.Graph",
        )
    try:
        after = gs.export_onnx(edited.cleanup().toposort())
    except Exception as error:
        raise PassError(f"{item.id} left a graph that cannot be written: {first_line(error)}") from error
    if _signature(after) != _signature(before):
        raise PassError(
            f"{item.id} changed what the graph takes or gives: {_difference(_signature(before), _signature(after))}",
            hint="inputs and outputs are what the runtime feeds and reads: keep their names, types and shapes",
        )
    model = ir.from_proto(after)
    graph_io.check(model, item.id)
    rewrites = _rewrites(before, after)
    changed = rewrites > 0 or _weights(before) != _weights(after)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".pass-") as scratch:
        written = graph_io.save(model, Path(scratch) / out.name)
        difference = _largest_difference(item.id, graph, written) if changed else 0.0
        if not difference <= item.tolerance:
            raise PassError(
                f"{item.id} changes results by {difference:.2g} of their largest value, and declares "
                f"{item.tolerance:.2g}",
                hint="if that is meant, declare it: @passes.mtu_pass(tolerance=…)",
            )
        for file in sorted(Path(scratch).iterdir(), reverse=True):  # the weights before the graph that names them
            file.replace(out.parent / file.name)
    return UserPassResult(item.id, item.sha256, item.tolerance, rewrites, changed, difference)


class _Uncached(SourceFileLoader):
    """Compiles the file as it is now, and leaves nothing beside it."""

    def get_data(self, path: str) -> bytes:
        if path.endswith(".pyc"):
            raise OSError("not read")
        return super().get_data(path)

    def set_data(self, *arguments: Any, **options: Any) -> None:
        pass


def _import_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise ConfigError(f"there is no file {str(path)!r}", hint="--pass takes FILE.py:function")
    name, file = f"mtu_user_pass_{path.stem}", path.resolve()
    spec = importlib.util.spec_from_file_location(name, file, loader=_Uncached(name, str(file)))
    assert spec is not None and spec.loader is not None  # a .py file has both
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickles of the file look themselves up
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[spec.name]
        raise ConfigError(f"{path} cannot be imported: {type(error).__name__}: {first_line(error)}") from error
    return module


def _is_pass(value: Any, module: ModuleType) -> bool:
    return inspect.isfunction(value) and value.__module__ == module.__name__ and not value.__name__.startswith("_")


def _place(error: BaseException) -> str | None:
    """Where in the user's file an exception came from."""
    trace, last = error.__traceback__, None
    while trace is not None:
        last, trace = trace, trace.tb_next
    return None if last is None else f"raised in {last.tb_frame.f_code.co_filename}, line {last.tb_lineno}"


def _signature(model: onnx.ModelProto) -> dict[str, tuple[str, int, tuple[int | str, ...]]]:
    """By name of each input and output: which of the two, element type and shape."""
    weights = {item.name for item in model.graph.initializer}
    sides = (("input", [v for v in model.graph.input if v.name not in weights]), ("output", model.graph.output))
    return {
        value.name: (
            side,
            value.type.tensor_type.elem_type,
            tuple(d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim),
        )
        for side, values in sides
        for value in values
    }


def _difference(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    if gone := sorted(before.keys() - after.keys()):
        return f"{before[gone[0]][0]} {gone[0]!r} is gone"
    if new := sorted(after.keys() - before.keys()):
        return f"{after[new[0]][0]} {new[0]!r} is new"
    name = next(name for name in before if before[name] != after[name])
    return f"{name!r} is no longer of the same type and shape"


def _rewrites(before: onnx.ModelProto, after: onnx.ModelProto) -> int:
    old, new = ({node.SerializeToString(deterministic=True) for node in m.graph.node} for m in (before, after))
    return max(len(new - old), len(old - new))


def _weights(model: onnx.ModelProto) -> dict[str, bytes]:
    """By name, a hash of each weight."""
    return {
        item.name: hashlib.sha256(item.SerializeToString(deterministic=True)).digest()
        for item in model.graph.initializer
    }


def _largest_difference(maker: str, before: Path, after: Path) -> float:
    """Of any output over calls like a trajectory's, as a share of its largest value; infinite if one is not finite."""
    feeds = _feeds(before)
    expected = _run(before, feeds)
    try:
        results = _run(after, feeds)
    except Exception as error:  # whatever ONNX Runtime raises
        raise PassError(f"{maker} left a graph that cannot be run: {first_line(error)}") from error
    worst = 0.0
    for wanted, given in zip(expected, results, strict=True):
        for name, array in wanted.items():
            if not np.isfinite(given[name]).all():
                return math.inf
            scale = float(np.abs(array).max()) or 1.0
            worst = max(worst, float(np.abs(given[name] - array).max()) / scale)
    return worst


def _run(graph: Path, feeds: Sequence[Mapping[str, NDArray[Any]]]) -> list[dict[str, NDArray[Any]]]:
    """ONNX Runtime as the graph is written: its optimisations could hide what a pass did."""
    session = open_as_written(graph)
    names = [output.name for output in session.get_outputs()]
    return [dict(zip(names, session.run(names, dict(feed)), strict=True)) for feed in feeds]


def _feeds(graph: Path) -> list[dict[str, NDArray[Any]]]:
    """Inputs of one call a timestep: normally distributed, as latents and normed text embeddings are.

    Where the task is an input and the batch is free, a sample of each task.
    """
    import onnx

    model = graph_io.load_proto(graph)
    random, samples = np.random.default_rng(0), _count_tasks(model)
    feeds: list[dict[str, NDArray[Any]]] = []
    for timestep in TIMESTEPS:
        feed: dict[str, NDArray[Any]] = {}
        for value in model.graph.input:
            kind = value.type.tensor_type
            dtype = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)
            shape = [d.dim_value or samples for d in kind.shape.dim]
            if value.name == "timestep":
                feed[value.name] = np.full(shape, timestep, dtype)
            elif np.issubdtype(dtype, np.floating):
                feed[value.name] = random.standard_normal(shape).astype(dtype)
            elif value.name == TASK:
                feed[value.name] = np.arange(shape[0], dtype=dtype) % samples
            else:
                feed[value.name] = np.zeros(shape, dtype)
        feeds.append(feed)
    return feeds


def _count_tasks(model: onnx.ModelProto) -> int:
    """Rows of the tables that are read by task; 1 for the graph of one task."""
    rows = {tensor.name: tensor.dims[0] for tensor in model.graph.initializer if tensor.dims}
    read = (node.input for node in model.graph.node if node.op_type == "Gather")
    return next((int(rows[table]) for table, task in read if task == TASK and table in rows), 1)
