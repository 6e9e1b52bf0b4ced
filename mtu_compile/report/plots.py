"""The report's figures, each as inline SVG."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import isfinite
from statistics import fmean
from typing import TYPE_CHECKING

from mtu_compile.bundle.quantisation import LayerRecord, MixedRecord
from mtu_compile.core.amounts import readable
from mtu_compile.core.routing import Routing
from mtu_compile.report.data import PicturePair, RoutingForms, TaskReport
from mtu_compile.report.svg import INK, LIMIT, MUTED, SERIES_A, SERIES_B, SERIES_C, TEXT, figure, inline

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: Why a layer is what it is → colour, shape, and what the legend says.
KEPT = {
    None: (SERIES_A, "o", "INT8"),
    "accuracy": (SERIES_B, "^", "float: accuracy"),
    "slower": (SERIES_C, "s", "float: INT8 slower"),
}
#: Guidance directions differ in colour and dash.
DIRECTIONS = ((SERIES_A, "-"), (SERIES_B, "-."), (SERIES_C, ":"))


def sqnr_plot(task: TaskReport) -> str:
    """SQNR of the UNet's output at every call, a line a picture, their mean and the threshold."""
    lines = [[call.sqnr_db for call in picture.calls] for picture in task.pictures]
    threshold = task.thresholds["sqnr_db"]
    with figure() as drawn:
        axes = _trajectory_axes(drawn.add_subplot(), task.pictures)
        axes.set_ylabel("SQNR, dB")
        _bundle_of_lines(axes, task.pictures, lines, SERIES_A, "-", "mean")
        if threshold is not None:
            _limit(axes, threshold, f"threshold, {threshold:g} dB")
        low = min([*(value for line in lines for value in line), *([] if threshold is None else [threshold])])
        axes.set_ylim(bottom=low - 2)
        _legend_above(axes)
        description = (
            f"SQNR of the UNet output of task {task.name} at each denoising step, {len(lines)} pictures: "
            f"lowest {min(map(min, lines)):.1f} dB, mean {fmean(v for line in lines for v in line):.1f} dB"
            + (f", threshold {threshold:g} dB" if threshold is not None else "")
        )
        return inline(drawn, name=f"sqnr-{task.name}", description=description)


def guidance_plot(task: TaskReport) -> str | None:
    """Norm of the guidance deltas against the original's at every call; ``None`` for a task without guidance."""
    directions = list(dict.fromkeys(d.direction for one in task.pictures for call in one.calls for d in call.guidance))
    if not directions:
        return None
    allowed = task.thresholds["guidance_ratio"]
    said = []
    with figure() as drawn:
        axes = _trajectory_axes(drawn.add_subplot(), task.pictures)
        axes.set_ylabel("guidance delta, ratio of norms")
        axes.axhline(1, color=MUTED, linewidth=0.8)
        for direction, (colour, dash) in zip(directions, DIRECTIONS, strict=False):
            lines = [
                [d.ratio for call in picture.calls for d in call.guidance if d.direction == direction]
                for picture in task.pictures
            ]
            _bundle_of_lines(axes, task.pictures, lines, colour, dash, f"{direction}, mean")
            ratios = [value for line in lines for value in line]
            said.append(f"{direction} from {min(ratios):.3f} to {max(ratios):.3f}")
        if allowed is not None:
            for edge, text in ((allowed, f"allowed, {allowed:g} to {1 / allowed:.2f}"), (1 / allowed, None)):
                _limit(axes, edge, text)
        _legend_above(axes)
        description = (
            f"norm of the guidance deltas of task {task.name} divided by the float original's: {', '.join(said)}"
        )
        return inline(drawn, name=f"guidance-{task.name}", description=description)


def sensitivity_plot(task: TaskReport, mixed: MixedRecord) -> str:
    """Each group of layers in graph order: SQNR of the UNet's output when only it is INT8."""
    layers = [(i, one) for i, one in enumerate(mixed.layers) if isfinite(one.sqnr_db)]
    with figure() as drawn:
        axes = drawn.add_subplot()
        axes.set_xlabel("groups of layers, in graph order")
        axes.set_ylabel("SQNR, only this in INT8, dB")
        tips = _points(axes, [(i, one.sqnr_db, one) for i, one in layers], "order")
        worst = min((one for _, one in layers), key=lambda one: one.sqnr_db, default=None)
        description = f"sensitivity of {len(layers)} groups of layers of task {task.name}"
        if worst is not None:
            description += f"; the most sensitive is {worst.name} with {worst.sqnr_db:.1f} dB"
        _legend_above(axes)
        return inline(drawn, name=f"order-{task.name}", description=description, tips=tips)


def gain_plot(task: TaskReport, mixed: MixedRecord) -> str | None:
    """Sensitivity against the time that INT8 saves; ``None`` where no times are known."""
    points = [(one.gain_ms, one.sqnr_db, one) for one in mixed.layers if one.gain_ms is not None]
    points = [point for point in points if isfinite(point[0]) and isfinite(point[1])]
    if not points:
        return None
    with figure() as drawn:
        axes = drawn.add_subplot()
        how = "measured" if mixed.costs and mixed.costs.measured else "estimated"
        axes.set_xlabel(f"time INT8 saves, ms a UNet call ({how})")
        axes.set_ylabel("SQNR, only this in INT8, dB")
        axes.axvline(0, color=MUTED, linewidth=0.8)
        tips = _points(axes, points, "gain")
        _legend_above(axes)
        slower = sum(gain < 0 for gain, _, _ in points)
        description = (
            f"sensitivity of {len(points)} groups of layers of task {task.name} against the time INT8 saves; INT8 is "
            f"slower in {slower}"
        )
        return inline(drawn, name=f"gain-{task.name}", description=description, tips=tips)


def routing_plot(forms: RoutingForms, built: Routing, tasks: int) -> str:
    """Memory and disk of an engine for each task and of one for all, as bars; what was not built is faint."""
    labels: dict[Routing, str] = {"static": f"{tasks} engines", "shared": "one engine"}
    said = []
    with figure(height=190) as drawn:
        panels = drawn.subplots(2, 1)
        for axes, what, amounts in zip(panels, ("memory", "disk, UNets"), (forms.memory, forms.disk), strict=True):
            largest = max(one.bytes for one in amounts.values()) or 1
            for row, form in enumerate(labels):
                amount = amounts[form]
                axes.barh(
                    row,
                    amount.bytes / largest,
                    height=0.66,
                    color=SERIES_A,
                    alpha=1 if form == built else 0.45,
                    zorder=2,
                )
                text = f"{readable(amount.bytes)}{'' if amount.kind == 'measured' else ', estimate'}"
                axes.text(amount.bytes / largest + 0.02, row, text, va="center", color=INK)
                said.append(f"{what} of {labels[form]} {text}")
            axes.set_yticks(range(len(labels)), list(labels.values()))
            axes.tick_params(length=0)
            axes.set_title(what, loc="left", fontsize=TEXT)
            axes.set_xlim(0, 1.55)
            axes.set_xticks([])
            axes.invert_yaxis()
            axes.grid(visible=False)
            axes.spines["bottom"].set_visible(False)
        return inline(drawn, name="routing", description=f"one engine for all tasks against {tasks}: {'; '.join(said)}")


def _trajectory_axes(axes: Axes, pictures: Sequence[PicturePair]) -> Axes:
    """Denoising from left to right, as time goes: large timesteps are noise."""
    axes.set_xlabel("timestep (noise → picture)")
    times = [call.timestep for picture in pictures for call in picture.calls if call.timestep is not None]
    if times and min(times) != max(times):
        margin = 0.02 * (max(times) - min(times))
        axes.set_xlim(max(times) + margin, min(times) - margin)
    return axes


def _bundle_of_lines(
    axes: Axes,
    pictures: Sequence[PicturePair],
    lines: Sequence[Sequence[float]],
    colour: str,
    dash: str,
    label: str,
) -> None:
    """A faint line for each picture, and their mean where they have the same timesteps."""
    times = [[float(call.timestep or 0) for call in picture.calls] for picture in pictures]
    for time, line in zip(times, lines, strict=True):
        axes.plot(time, line, color=colour, linewidth=0.9, linestyle=dash, alpha=0.4)
    if all(time == times[0] for time in times):
        axes.plot(times[0], list(map(fmean, zip(*lines, strict=True))), color=colour, linewidth=2.2, linestyle=dash)
        axes.plot([], [], color=colour, linewidth=2.2, linestyle=dash, label=label)


def _points(axes: Axes, points: Iterable[tuple[float, float, LayerRecord]], prefix: str) -> dict[str, str]:
    """Draw one marker a group of layers; group id → what is said when it is pointed at."""
    tips = {}
    seen = set()
    for i, (x, y, layer) in enumerate(points):
        colour, marker, label = KEPT.get(layer.kept, (SERIES_C, "D", f"float: {layer.kept}"))
        (drawn,) = axes.plot(
            [x], [y], marker=marker, linestyle="none", color=colour, markersize=5.5, markeredgewidth=0, alpha=0.85
        )
        if label not in seen:
            drawn.set_label(label)
            seen.add(label)
        identity = f"{prefix}-{i}"
        drawn.set_gid(identity)
        time = "" if layer.gain_ms is None else f", saves {layer.gain_ms:.3f} ms"
        tips[identity] = f"{layer.name} ({layer.op}): {layer.sqnr_db:.1f} dB{time}; {label}"
    return tips


def _limit(axes: Axes, at: float, label: str | None) -> None:
    axes.axhline(at, color=LIMIT, linewidth=1.3, linestyle=(0, (4, 3)), label=label)


def _legend_above(axes: Axes) -> None:
    axes.legend(
        loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=4, handletextpad=0.4, columnspacing=1.0, borderpad=0.1
    )
