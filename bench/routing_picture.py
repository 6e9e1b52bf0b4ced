"""The README's picture of both forms of routing: an engine for each task against one for all, with their figures.

    python -m bench.routing_picture               # docs/routing.svg

The figures are those of ``bench.routing`` (``build/bench/routing-example.json``), where that has run; without it they
are the planner's estimates for the example, and the picture says so. What is read of it: ``forms``, by ``"static"`` (an
engine for each task, all of them) and ``"shared"``, each with some of the keys of ``MEASURED``.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from bench.timing import RESULTS
from mtu_compile.core.amounts import readable
from mtu_compile.core.errors import ConfigError
from mtu_compile.core.routing import Routing

FIGURE = Path("docs/routing.svg")
MODEL = Path("examples/emoji/model")

#: Light, and what takes its place where the reader's system is dark.
COLOURS = {
    "page": ("#ffffff", "#0d1117"),
    "ink": ("#0f172a", "#e6edf3"),
    "muted": ("#475569", "#9aa7b8"),
    "line": ("#cbd5e1", "#30363d"),
    "engine": ("#bbf7d0", "#14532d"),
    "edge": ("#16a34a", "#4ade80"),
    "table": ("#fde68a", "#713f12"),
    "table-edge": ("#d97706", "#fbbf24"),
    "static": ("#93c5fd", "#1d4ed8"),
    "shared": ("#2563eb", "#60a5fa"),
}
FONT = "system-ui, -apple-system, 'Segoe UI', 'DejaVu Sans', sans-serif"
#: Width of the picture, height above the bars, and what a line of bars takes.
WIDTH, TOP, LINE = 960, 262, 62


@dataclass(frozen=True)
class Row:
    """One comparison.

    Attributes:
        what: is compared.
        amounts: by form, to draw the bars from.
        said: by form, the same in words.
    """

    what: str
    amounts: Mapping[Routing, float]
    said: Mapping[Routing, str]


def _seconds(amount: float) -> str:
    """Rounded, for people."""
    return f"{amount:.3g} s" if amount >= 1 else f"{1000 * amount:.3g} ms"


#: Keys of ``bench.routing``'s figures → what they are called here, and how they are said.
MEASURED: Mapping[str, tuple[str, Callable[[float], str]]] = {
    "resident_bytes": ("memory, all tasks resident", lambda amount: readable(int(amount))),
    "disk_bytes": ("disk, UNets", lambda amount: readable(int(amount))),
    "load_seconds": ("loading all tasks", lambda amount: f"{amount:.2f} s"),
    "switch_seconds": ("switching tasks, static engines by loading", _seconds),
    "step_seconds": ("a step", _seconds),
}


def measured_rows(data: Mapping[str, Any]) -> list[Row]:
    """From what ``bench.routing`` wrote; ``ConfigError`` where none of its figures is there for both forms."""
    forms = {"static": data.get("forms", {}).get("static", {}), "shared": data.get("forms", {}).get("shared", {})}
    rows = []
    for key, (what, said) in MEASURED.items():
        if all(isinstance(one.get(key), (int, float)) for one in forms.values()):
            amounts: dict[Routing, float] = {"static": forms["static"][key], "shared": forms["shared"][key]}
            rows.append(Row(what, amounts, {form: said(amount) for form, amount in amounts.items()}))
    if not rows:
        raise ConfigError(f"no figure of both forms: {', '.join(MEASURED)}", hint="python -m bench.routing example")
    return rows


def planned_rows(plan: Mapping[str, Any]) -> list[Row]:
    """From what ``mtu-compile plan --json`` says."""
    memory = {"static": plan["static_bytes"], "shared": plan["shared_bytes"]}
    disk = plan["disk_bytes"]
    return [_bytes("memory, all tasks resident (estimate)", memory), _bytes("graphs of the UNets (estimate)", disk)]


def _bytes(what: str, amounts: Mapping[str, float]) -> Row:
    found: dict[Routing, float] = {"static": amounts["static"], "shared": amounts["shared"]}
    return Row(what, found, {form: readable(int(one)) for form, one in found.items()})


def draw(rows: Sequence[Row], tasks: Sequence[str]) -> str:
    """The picture as SVG: what each form looks like above, ``rows`` as bars below."""
    height = TOP + 6 + LINE * ((len(rows) + 1) // 2)
    bars = (_bars(row, 24 + 480 * (index % 2), TOP + LINE * (index // 2)) for index, row in enumerate(rows))
    return "\n".join(
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" '
            f'aria-label="{escape(_in_words(rows))}" font-family="{FONT}" font-size="14">',
            _style(),
            f'<rect class="page" width="{WIDTH}" height="{height}" rx="8"/>',
            *_static(tasks),
            '<path class="rule" d="M480 16V222"/>',
            *_shared(tasks),
            '<path class="rule" d="M24 238H936"/>',
            *(line for one in bars for line in one),
            "</svg>\n",
        )
    )


def _in_words(rows: Sequence[Row]) -> str:
    said = "; ".join(f"{row.what}: {row.said['static']} against {row.said['shared']}" for row in rows)
    return f"an engine for each task against one engine for all; {said}"


def _style() -> str:
    def rules(dark: bool) -> str:
        colour = {name: pair[dark] for name, pair in COLOURS.items()}
        filled = {"page": "page", "muted": "muted", "static": "static", "shared": "shared"}
        edged = {"engine": "edge", "table": "table-edge"}
        return "".join(
            (
                f"text{{fill:{colour['ink']}}}",
                *(f".{name}{{fill:{colour[what]}}}" for name, what in filled.items()),
                *(f".{name}{{fill:{colour[name]};stroke:{colour[edge]}}}" for name, edge in edged.items()),
                f".rule{{stroke:{colour['line']};fill:none}}",
                f".arrow{{stroke:{colour['muted']};stroke-width:1.6;fill:none}}",
            )
        )

    return f"<style>{rules(False)}@media(prefers-color-scheme:dark){{{rules(True)}}}</style>"


def _static(tasks: Sequence[str]) -> Iterator[str]:
    yield _text(24, 36, "static: an engine for each task", weight=600, size=15)
    room, gap = 432, 14
    width = (room - gap * (len(tasks) - 1)) / len(tasks)
    for index, task in enumerate(tasks):
        left = 24 + index * (width + gap)
        yield _box("engine", left, 58, width, 92)
        yield _text(left + width / 2, 100, "weights", anchor="middle")
        yield _text(left + width / 2, 122, f"of {task}", anchor="middle", kind="muted", size=12.5)
        yield _text(left + width / 2, 174, task, anchor="middle", weight=600)
    yield _text(24, 206, "no routing left: the fastest step for one task", kind="muted", size=12.5)


def _shared(tasks: Sequence[str]) -> Iterator[str]:
    yield _text(504, 36, "shared: one engine for all", weight=600, size=15)
    yield _box("engine", 504, 58, 200, 92)
    yield _text(604, 100, "weights, once", anchor="middle")
    yield _text(604, 122, "experts side by side", anchor="middle", kind="muted", size=12.5)
    yield '<path class="arrow" d="M744 104H708M716 99l-8 5 8 5"/>'
    tall = 92 / len(tasks)
    for index, task in enumerate(tasks):
        top = 58 + index * tall
        yield _box("table", 748, top, 188, tall, round_=2)
        yield _text(758, top + tall / 2 + 4.5, f"{task}: gates, norms", size=min(12.5, tall - 5))
    yield _text(604, 174, "a batch may mix tasks", anchor="middle", weight=600)
    yield _text(842, 174, "one table row a task", anchor="middle", weight=600)
    yield _text(504, 206, "the input “task” picks each sample’s row: nothing to load", kind="muted", size=12.5)


def _bars(row: Row, left: float, top: float) -> Iterator[str]:
    largest = max(row.amounts.values()) or 1
    yield _text(left, top, row.what, kind="muted", size=12.5)
    for index, (form, amount) in enumerate(row.amounts.items()):
        y, length = top + 8 + 20 * index, max(2.0, 250 * amount / largest)
        yield f'<rect class="{form}" x="{left + 56:g}" y="{y:g}" width="{length:.1f}" height="15" rx="2"/>'
        yield _text(left, y + 12, form, size=12.5)
        yield _text(left + 64 + length, y + 12, row.said[form], size=12.5)


def _box(kind: str, left: float, top: float, width: float, height: float, round_: float = 6) -> str:
    return f'<rect class="{kind}" x="{left:g}" y="{top:g}" width="{width:g}" height="{height:g}" rx="{round_:g}"/>'


def _text(
    left: float, base: float, words: str, *, anchor: str = "start", kind: str = "", size: float = 14, weight: int = 400
) -> str:
    named = f' class="{kind}"' if kind else ""
    return (
        f'<text{named} x="{left:g}" y="{base:g}" text-anchor="{anchor}" font-size="{size:g}" font-weight="{weight}">'
        f"{escape(words)}</text>"
    )


def main() -> None:
    from mtu_compile.compile import PlanOptions, plan

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bench", type=Path, default=RESULTS / "routing-example.json", help="what bench.routing wrote")
    parser.add_argument("--out", type=Path, default=FIGURE)
    args = parser.parse_args()
    if args.bench.exists():
        rows = measured_rows(json.loads(args.bench.read_text(encoding="utf-8")))
    else:
        rows = planned_rows(plan(PlanOptions(MODEL)).to_json())
    tasks = [one["name"] for one in json.loads((MODEL / "unet" / "config.json").read_text(encoding="utf-8"))["tasks"]]
    args.out.write_text(draw(rows, tasks), encoding="utf-8")
    print(args.out)


if __name__ == "__main__":
    main()
