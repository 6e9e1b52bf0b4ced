"""The guide's table of targets says what the specs say."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import targets

GUIDE = Path(__file__).parents[2] / "docs" / "guide.md"
HEADER = "| target | portable graph | built in advance | precisions |"


def rows(text: str) -> Iterator[tuple[tuple[str, ...], tuple[str, ...]]]:
    """Names and precisions of each line of the table."""
    _, _, after = text.partition(f"{HEADER}\n")
    for line in after.splitlines()[1:]:  # the first one is made of dashes
        if not line.startswith("|"):
            return
        names, _, _, precisions = (cell.strip() for cell in line.strip("|").split("|"))
        yield tuple(re.findall(r"`([^`]+)`", names)), tuple(precisions.split(", "))


def test_every_target_is_in_the_guide_once_with_its_precisions_best_first() -> None:
    said = [(name, precisions) for names, precisions in rows(GUIDE.read_text()) for name in names]
    assert len(dict(said)) == len(said)
    assert dict(said) == {name: targets.get(name).spec.precisions for name in targets.names()}


def test_the_table_is_really_read() -> None:
    wrong = f"{HEADER}\n| --- | --- | --- | --- |\n| `a` (one), `b` | ONNX | - | int8, fp32 |\n\nA `c`.\n"
    assert list(rows(wrong)) == [(("a", "b"), ("int8", "fp32"))]
