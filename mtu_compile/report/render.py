"""A report as one HTML page that needs nothing else: no network, no script, no file beside it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from calibration.shared_scales import LIMIT_DB
from mtu_compile.bundle import PassRecord, UserPassRecord, encode
from mtu_compile.bundle.quantisation import AlignedLayerRecord, MixedRecord, SettingsRecord
from mtu_compile.core.amounts import readable
from mtu_compile.core.errors import ToolchainMissing
from mtu_compile.report import plots
from mtu_compile.report.data import Bounds, MetricLine, Network, PicturePair, Report, TaskReport, Value
from mtu_compile.report.metrics import bounds, label, symbol
from mtu_compile.report.pictures import AMPLIFIED, data_uri, difference, is_reduced
from mtu_compile.runtime.fitting import fit_mask

if TYPE_CHECKING:
    from markupsafe import Markup

_HERE = Path(__file__).parent

#: Rows a long table shows; the rest is in the JSON.
ROWS = 20


@dataclass(frozen=True)
class Shown:
    """A picture on the page.

    Attributes:
        uri: its data.
        caption: under it.
        alt: what it is, for those who cannot see it.
        width, height: of the picture itself, pixels.
        condition: whether it was given rather than made.
    """

    uri: str
    caption: str
    alt: str
    width: int
    height: int
    condition: bool


def require_libraries() -> None:
    """``ToolchainMissing`` unless what draws a page is installed: to be asked before anything is measured."""
    try:
        import jinja2  # noqa: F401
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ToolchainMissing(
            f"a report needs {error.name}, which is not installed", hint="pip install 'mtu-compile[compile]'"
        ) from error


def render(report: Report) -> str:
    """The page of ``report``.

    Raises:
        ToolchainMissing: jinja2 or matplotlib is not installed.
    """
    require_libraries()
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    # Everything is escaped: prompts, names and reasons come from a bundle that anybody may have written.
    environment = Environment(
        loader=FileSystemLoader(_HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(
        breakable=breakable,
        bytes=readable,
        number=number,
        value=show_value,
        bounds=show_bounds,
        settings=settings,
    )
    drawn = {
        task.name: [Markup(svg) for svg in (plots.sqnr_plot(task), plots.guidance_plot(task)) if svg]
        for task in report.tasks
    }
    layers = {
        task.name: [
            Markup(svg)
            for svg in (plots.sensitivity_plot(task, task.mixed), plots.gain_plot(task, task.mixed))
            if svg is not None
        ]
        for task in report.tasks
        if task.mixed is not None
    }
    return environment.get_template("template.html.j2").render(
        report=report,
        manifest=report.manifest,
        style=Markup((_HERE / "style.css").read_text(encoding="utf-8")),
        trajectories=drawn,
        layers=layers,
        pictures={task.name: [list(_shown(report, task, pair)) for pair in task.pictures] for task in report.tasks},
        reduced=any(is_reduced(pair.reference) for task in report.tasks for pair in task.pictures),
        amplified=AMPLIFIED,
        headlines={task.name: _headlines(task) for task in report.tasks},
        conflicts=[row for row in report.ranges if row.worst[1] > LIMIT_DB],
        limit_db=LIMIT_DB,
        aligned=_aligned(report),
        rows=ROWS,
        searches={t.name: list(_search_rows(t.mixed)) for t in report.tasks if t.mixed is not None},
        pass_table=_pass_table(report),
        routing=_routing(report),
        largest=max((*(one.bytes for one in report.networks), *report.other_files.values(), 1)),
        estimate=_estimate,
    )


def _aligned(report: Report) -> list[tuple[str, AlignedLayerRecord]]:
    """Layers with factors of the tasks, those first that cost a task most without."""
    layers = {} if report.alignment is None else report.alignment.layers
    return sorted(layers.items(), key=lambda item: -max(item[1].before.values()))


def _routing(report: Report) -> Markup | None:
    """One engine for all tasks against one for each, drawn."""
    from markupsafe import Markup

    if report.forms is None:
        return None
    return Markup(plots.routing_plot(report.forms, report.manifest.routing, len(report.tasks)))


def _shown(report: Report, task: TaskReport, pair: PicturePair) -> Iterator[Shown]:
    """What lies side by side: what was given, float original, the bundle's, their difference."""
    prompt = f"prompt “{pair.prompt}”" if pair.prompt else "no prompt"
    precision = report.manifest.precision.upper()
    height, width = report.manifest.image_size

    def shown(picture: Image.Image, caption: str, alt: str, condition: bool = False) -> Shown:
        return Shown(data_uri(picture), caption, f"{alt}, {prompt}", *picture.size, condition)

    if pair.source is not None:
        source = pair.source.convert("RGB")
        given = f"source {source.width}×{source.height}" if source.size != (width, height) else "source"
        yield shown(source, given, "source picture", True)
    if pair.mask is not None:
        over = None if pair.source is None else pair.source.size
        selected = fit_mask(pair.mask, (height, width), report.manifest.fit, over=over)
        mask = Image.fromarray((selected * 255).astype("uint8"))
        yield shown(mask, "mask", "mask, white is repainted", True)
    if pair.truth is not None:
        yield shown(pair.truth, "wanted" if task.entry.task.condition else "in the data", "picture of the data", True)
    yield shown(pair.reference, "float", "made by the float original")
    yield shown(pair.made, precision, f"made by the bundle in {precision}")
    alt = f"absolute difference of the two, amplified {AMPLIFIED} times"
    yield shown(difference(pair.reference, pair.made), f"difference ×{AMPLIFIED}", alt)


def _headlines(task: TaskReport) -> tuple[MetricLine, ...]:
    """The few numbers that are read first."""
    wanted = ("worst_sqnr_db", "image_psnr_db", "ssim", "guidance_ratio")
    found = {metric.key: metric for metric in task.metrics}
    return tuple(found[key] for key in wanted if key in found)


def _search_rows(mixed: MixedRecord) -> Iterator[tuple[str, str, str, str]]:
    """(what, wanted, with everything in INT8, as built) of a mixed-precision search."""
    for key in (field.name for field in fields(mixed.chosen)):
        unit = symbol(key)
        before, after = (show_value(getattr(accuracy, key), unit) for accuracy in (mixed.all_int8, mixed.chosen))
        yield label(key), show_bounds(bounds(key, asdict(mixed.criteria)), unit), before, after
    for key, wanted in asdict(mixed.criteria).items():
        if key not in ("sqnr_db", "guidance_ratio"):  # those are in the rows above
            yield {"slowdown": "slowdown allowed"}.get(key, key.replace("_", " ")), number(wanted), "", ""


def _pass_table(report: Report) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """(pass, for each task what it did), in the order they ran; a pass may run twice in a task."""
    ran: dict[tuple[str, int], dict[str, str]] = {}
    for task in report.tasks:
        seen: dict[str, int] = {}
        records: Sequence[PassRecord | UserPassRecord] = (*task.entry.passes, *task.entry.user_passes)
        for record in records:
            turn = seen[record.id] = seen.get(record.id, 0) + 1
            ran.setdefault((record.id, turn), {})[task.name] = str(record.rewrites) if record.changed else "0"
    return tuple((name, tuple(done.get(task.name, "–") for task in report.tasks)) for (name, _), done in ran.items())


def _estimate(network: Network) -> str:
    estimate = network.engine.estimate
    if estimate is None or estimate.latency_ms is None:
        return "–"
    return f"{estimate.latency_ms:.2f} ms ({estimate.source})"


def number(value: Any, digits: int = 4) -> str:
    """A number to ``digits`` significant digits, never in powers of ten where people would not; ``–`` for none."""
    if value is None:
        return "–"
    if not isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, int) or value == 0 or 1e-4 <= abs(value) < 1e7:
        return f"{value:.{digits}g}" if abs(value) < 10**digits else f"{value:.0f}"
    return f"{value:.{digits - 1}e}"


def show_value(value: Value | None, unit: str = "") -> str:
    """A metric's value with its unit: one decimal of decibels, four of everything else, more of what is nearly 1."""
    if value is None:
        return "–"

    def one(part: float) -> str:
        return f"{part:.1f}" if unit == "dB" else f"{part:.{6 if 0.999 <= part < 1 else 4}f}"

    text = " to ".join(map(one, value)) if isinstance(value, tuple) else one(value)
    return f"{text} {unit}" if unit else text


def settings(chosen: SettingsRecord | None) -> str:
    """Settings that are one word or number each; lists of layers are shown elsewhere."""
    named = {} if chosen is None else encode(chosen)
    return ", ".join(f"{key}={one}" for key, one in named.items() if isinstance(one, (str, int, float)))


def breakable(name: str) -> Markup:
    """A node's name that may be broken after its dots and slashes; escaped."""
    from markupsafe import Markup

    return Markup("<wbr>").join(re.split(r"(?<=[./])", name))


def show_bounds(bounds: Bounds | None, unit: str = "") -> str:
    """A threshold in words."""
    if bounds is None:
        return "–"
    low, high = bounds
    if low is not None and high is not None:
        return f"{low:.4g} to {high:.4g}"
    text = f"≥ {low:.6g}" if low is not None else f"≤ {high:.6g}"
    return f"{text} {unit}" if unit else text
