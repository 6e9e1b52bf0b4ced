"""What benchmarks and examples import of this repository is there, wherever in a file they do it.

Many import what is heavy where they need it, so that a name that has moved is noticed only when a benchmark is run.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OURS = ("bench", "calibration", "examples", "mtu_compile", "passes", "targets", "tests")
FILES = [path for folder in ("bench", "examples") for path in sorted((ROOT / folder).rglob("*.py"))]


def place(module: str) -> Path | None:
    """The file of one of our modules; ``None`` if there is none."""
    path = ROOT.joinpath(*module.split("."))
    return next((one for one in (path.with_suffix(".py"), path / "__init__.py") if one.is_file()), None)


@cache
def names(file: Path) -> frozenset[str]:
    """What a module has at its top level."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            found |= {(one.asname or one.name).split(".")[0] for one in node.names}
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
    return frozenset(found)


def missing(source: str) -> Iterator[str]:
    """Every name that ``source`` imports of ours and that is not there."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.ImportFrom) or node.module is None or node.module.split(".")[0] not in OURS:
            continue
        file = place(node.module)
        for one in node.names:
            there = file is not None and (one.name == "*" or one.name in names(file))
            if not there and place(f"{node.module}.{one.name}") is None:
                yield f"{node.module}.{one.name}"


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_what_is_imported_is_there(file: Path) -> None:
    assert list(missing(file.read_text(encoding="utf-8"))) == []


def test_a_name_that_has_moved_is_found() -> None:
    source = "def f():\n    from bench.build import as_table, sd15_model\n    from bench import nothing, timing\n"
    assert list(missing(source)) == ["bench.build.sd15_model", "bench.nothing"]
