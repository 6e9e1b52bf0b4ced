"""``build --pass``: a user's graph edit goes into the bundle, with its proof, or stops the build."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mtu_compile import bundle

EXAMPLE = Path("examples/passes/tanh_gelu.py")
ONE_TASK = ("--task", "t2i", "--fp32", "--steps", 3, "--check-pictures", 1, "--no-wheels")

SPOIL = """
def spoil(graph):
    node = next(node for node in graph.nodes if node.op == "Gelu")
    node.op, node.attrs = "Relu", {}
"""


def test_an_edit_is_in_the_graph_and_in_the_manifest(mtu: Callable[..., Any], tiny_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    built = mtu("build", tiny_model, "-o", out, "--pass", f"{EXAMPLE}:tanh_gelu", *ONE_TASK)
    assert built.code == 0, built.err
    (edit,) = bundle.read(out).tasks["t2i"].user_passes
    assert edit.id == "user::tanh_gelu:tanh_gelu" and edit.changed and edit.rewrites > 0
    assert edit.sha256 == hashlib.sha256(EXAMPLE.read_bytes()).hexdigest()
    assert 0 < edit.error <= edit.tolerance == 2e-3
    engine = out / bundle.read(out).tasks["t2i"].engine.path
    graph = engine.read_text()
    assert 'approximation_mode="tanh"' in graph.lower() and 'approximation_mode="erf"' not in graph.lower()
    shown = mtu("inspect", out)
    assert "user::tanh_gelu:tanh_gelu" in shown.out + shown.err


def test_an_edit_that_spoils_the_graph_stops_the_build_by_name(
    mtu: Callable[..., Any], tiny_model: Path, tmp_path: Path
) -> None:
    file = tmp_path / "mine.py"
    file.write_text(SPOIL)
    built = mtu("build", tiny_model, "-o", tmp_path / "bundle", "--pass", f"{file}:spoil", *ONE_TASK)
    assert built.code == 1 and "user::mine:spoil changes results by" in built.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.py"]


def test_a_pass_that_is_not_there_is_refused_before_anything_is_loaded(
    mtu: Callable[..., Any], tiny_model: Path, tmp_path: Path
) -> None:
    built = mtu("build", tiny_model, "-o", tmp_path / "b", "--pass", "no.py:edit", *ONE_TASK, before=NO_TORCH)
    assert built.code == 2 and "there is no file 'no.py'" in built.err


#: Makes importing torch an error.
NO_TORCH = "import sys; sys.modules['torch'] = None"
