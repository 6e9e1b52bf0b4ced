"""Passes of one's own: what is run, what is refused, and that nothing is left of what was refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx_graphsurgeon as gs
import pytest

import passes
from mtu_compile.core.errors import ConfigError, PassError
from mtu_compile.graph import io as graph_io
from passes.user import EXACT, GROUP

EXAMPLE = "examples/passes/tanh_gelu.py:tanh_gelu"
SETTINGS = {"task_id": 0, "channels": 4, "batch": 2, "height": 8, "width": 4, "text_length": 5}


@pytest.fixture(scope="module")
def static(exported: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The smallest UNet, specialised to one task."""
    path = tmp_path_factory.mktemp("static") / "model.onnx"
    passes.specialise(exported("micro"), path, **SETTINGS)
    return path


def run(function: Callable[[gs.Graph], Any], graph: Path, out: Path, tolerance: float = EXACT) -> Any:
    return passes.run_user_pass(passes.UserPass("user::test:pass", function, "0" * 64, tolerance), graph, out)


def test_the_example_replaces_every_gelu_and_says_what_it_costs(static: Path, tmp_path: Path, run_graph: Any) -> None:
    (example,) = passes.load_passes([EXAMPLE])
    result = passes.run_user_pass(example, static, tmp_path / "out.onnx")
    nodes = [node for node in graph_io.load(tmp_path / "out.onnx").graph if node.op_type == "Gelu"]
    assert nodes and all(node.attributes["approximate"].as_string() == "tanh" for node in nodes)
    assert (result.id, result.rewrites, result.changed) == ("user::tanh_gelu:tanh_gelu", len(nodes), True)
    assert 1e-6 < result.error <= example.tolerance == result.tolerance
    again = passes.run_user_pass(example, tmp_path / "out.onnx", tmp_path / "again.onnx")
    assert not again.changed and again.error == 0


def test_a_pass_may_return_another_graph(static: Path, tmp_path: Path) -> None:
    result = run(lambda graph: graph.copy(), static, tmp_path / "out.onnx")
    assert (result.rewrites, result.changed, result.error) == (0, False, 0.0)


def test_a_change_of_weights_alone_is_a_change(static: Path, tmp_path: Path) -> None:
    def scale(graph: gs.Graph) -> None:
        weight = next(t for t in graph.tensors().values() if isinstance(t, gs.Constant) and t.values.ndim == 4)
        weight.values = weight.values * 1.0001

    result = run(scale, static, tmp_path / "out.onnx", tolerance=1e-2)
    assert result.changed and result.rewrites == 0 and result.error > 0


def _spoil(graph: gs.Graph) -> None:
    node = next(node for node in graph.nodes if node.op == "Gelu")
    node.op, node.attrs = "Relu", {}


def _stop(graph: gs.Graph) -> None:
    raise RuntimeError("no such layer")


def _drop_output(graph: gs.Graph) -> None:
    graph.outputs[0].name = "other"


def _half_input(graph: gs.Graph) -> None:
    graph.inputs[0].shape = [1, *graph.inputs[0].shape[1:]]


def _unknown_op(graph: gs.Graph) -> None:
    next(node for node in graph.nodes if node.op == "Gelu").op = "FastGelu"


def _no_kernel(graph: gs.Graph) -> None:
    node = next(node for node in graph.nodes if node.op == "Gelu")
    node.op, node.domain, node.attrs = "FastGelu", "com.nowhere", {}


def _not_finite(graph: gs.Graph) -> None:
    weight = next(t for t in graph.tensors().values() if isinstance(t, gs.Constant) and t.values.ndim == 4)
    weight.values = weight.values * float("nan")


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (_spoil, "changes results by"),
        (_stop, "RuntimeError: no such layer"),
        (_drop_output, "'out_sample' is gone"),
        (_half_input, "no longer of the same type and shape"),
        (_unknown_op, "invalid graph"),
        (_no_kernel, "cannot be run"),
        (_not_finite, "changes results by inf"),
        (lambda graph: 3, "returned int"),
    ],
)
def test_a_pass_that_does_not_hold_is_named_and_leaves_nothing(
    function: Callable[[gs.Graph], Any], message: str, static: Path, tmp_path: Path
) -> None:
    with pytest.raises(PassError, match="user::test:pass") as failed:
        run(function, static, tmp_path / "out.onnx")
    assert message in failed.value.message
    assert not list(tmp_path.iterdir())


def test_the_place_of_a_failure_is_said(static: Path, tmp_path: Path) -> None:
    with pytest.raises(PassError) as failed:
        run(_stop, static, tmp_path / "out.onnx")
    assert __file__ in str(failed.value.hint)


def test_a_tolerance_is_read_from_its_function_and_is_exact_without(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "from passes import mtu_pass\n\n@mtu_pass(tolerance=0.5)\ndef loose(graph): ...\n\ndef strict(graph): ...\n"
    )
    loose, strict = passes.load_passes([f"{file}:loose", f"{file}:strict"])
    assert (loose.tolerance, strict.tolerance) == (0.5, EXACT) and loose.sha256 == strict.sha256
    file.write_text(file.read_text() + "\n# edited\n")
    assert passes.load_passes([f"{file}:loose"])[0].sha256 != loose.sha256


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        (None, "FILE.py:run", "there is no file"),
        ("def run(graph): ...", "FILE.py:walk", "has no function 'walk'"),
        ("walk = 3", "FILE.py:walk", "has no function 'walk'"),
        ("import no_such_package", "FILE.py:run", "cannot be imported: ModuleNotFoundError"),
        ("def run(", "FILE.py:run", "cannot be imported: SyntaxError"),
        ("", "no-such-pass", "unknown pass 'no-such-pass'"),
    ],
)
def test_passes_that_cannot_be_had_are_refused(content: str | None, name: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ConfigError) as refused:
        passes.load_passes([name.replace("FILE.py", str(file))])
    assert message in refused.value.message


def test_a_pass_given_twice_is_refused() -> None:
    with pytest.raises(ConfigError, match="given twice"):
        passes.load_passes([EXAMPLE, EXAMPLE])


def test_passes_of_other_packages_are_found_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "somebodys.py").write_text("def edit(graph): ...\n")
    info = tmp_path / "somebodys-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: somebodys\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{GROUP}]\nsomebodys-edit = somebodys:edit\n")
    monkeypatch.syspath_prepend(tmp_path)
    (found,) = passes.load_passes(["somebodys-edit"])
    assert found.id == "user::somebodys:edit"
