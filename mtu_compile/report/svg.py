"""A matplotlib figure as inline SVG: colours from the page's style sheet, ids that clash with no other figure's."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from io import StringIO
from typing import TYPE_CHECKING
from xml.etree import ElementTree

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Colour figures are drawn in → the style sheet's variable, so that one figure serves light and dark pages. The values
#: are placeholders that no one sees.
INK, MUTED, GRID = "#010101", "#020202", "#030303"
SERIES_A, SERIES_B, SERIES_C, LIMIT = "#040404", "#050505", "#060606", "#070707"
VARIABLES = {
    INK: "ink",
    MUTED: "muted",
    GRID: "grid",
    SERIES_A: "series-a",
    SERIES_B: "series-b",
    SERIES_C: "series-c",
    LIMIT: "limit",
}

#: Width of a figure in SVG units, and its text's size: 9 CSS pixels on a phone of 390, 14 at full width.
WIDTH, HEIGHT, TEXT = 420, 250, 11.5

_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "mtu-compile",
    "font.size": TEXT,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": GRID,
    "axes.titlecolor": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "grid.color": GRID,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
    "legend.frameon": False,
    "legend.fontsize": TEXT - 1,
    "legend.labelcolor": INK,
}


@contextmanager
def figure(height: int = HEIGHT) -> Iterator[Figure]:
    """A figure of the page's style, ``WIDTH`` × ``height`` SVG units; ``inline`` it inside the block."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):  # type: ignore[arg-type]
        yield Figure(figsize=(WIDTH / 72, height / 72), layout="constrained")


def inline(drawn: Figure, *, name: str, description: str, tips: Mapping[str, str] | None = None) -> str:
    """The figure as an ``<svg>`` element.

    Args:
        name: unique on the page; begins every id of the figure.
        description: what it shows, for those who cannot see it.
        tips: group id (``set_gid``) → text shown when pointed at.
    """
    written = StringIO()
    drawn.savefig(written, format="svg")
    root = ElementTree.fromstring(written.getvalue())
    for element in root.iter():
        element.tag = _local(element.tag)
        for key in list(element.attrib):
            value = element.attrib.pop(key)
            element.set(_local(key), _rewritten(_local(key), value, name))
    for parent in root.iter():
        for child in list(parent):
            # the style would apply to the whole page, the metadata speak of matplotlib
            if child.tag in ("metadata", "style"):
                parent.remove(child)
    for element in list(root.iter()):
        tip = (tips or {}).get(element.get("id", "").removeprefix(f"{name}-"))
        if tip is not None:
            title = ElementTree.Element("title")
            title.text = tip
            element.insert(0, title)
    for key in ("width", "height", "version"):
        root.attrib.pop(key, None)
    root.attrib.update({"role": "img", "aria-label": description, "class": "plot"})
    return ElementTree.tostring(root, encoding="unicode")


def _local(name: str) -> str:
    """A name without its namespace, which HTML does not need."""
    return name.rpartition("}")[2]


def _rewritten(key: str, value: str, name: str) -> str:
    if key == "id":
        return f"{name}-{value}"
    if key == "href":
        return value.replace("#", f"#{name}-")
    if key in ("style", "clip-path", "fill", "stroke"):
        value = value.replace("url(#", f"url(#{name}-")
        for colour, variable in VARIABLES.items():
            value = value.replace(colour, f"var(--{variable})")
        # text is set in the page's own font
        value = re.sub(r"font:\s*(\S+) [^;]*", r"font-size: \1", value)
        value = re.sub(r"font-family:[^;]*;?", "", value)
    return value
