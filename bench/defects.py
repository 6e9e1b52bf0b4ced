"""Which metric sees which defect? INT8 UNets are spoilt on purpose, and judged as ``mtu-compile check`` judges.

    mtu-compile build examples/emoji/model --target jetson-orin --int8 --no-wheels -o build/bench/jetson
    python -m bench.defects

The bundle's UNets are ONNX graphs, so that they can be edited; nothing runs on a Jetson. The float reference is
recorded anew, on held-out pictures, with the wanted picture where there is one.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench import held_out, timing
from bench.seeding import defects, spoil
from mtu_compile import bundle
from mtu_compile.accuracy.metrics import METRICS
from mtu_compile.accuracy.verdict import TaskCheck
from mtu_compile.graph import io as graph_io
from mtu_compile.runtime.engine import Engine, open_engine
from mtu_compile.runtime.reference import Reference
from targets.openvino.host import HOST_CONFIG


@dataclass(frozen=True)
class Seen:
    """What one metric says of a defect.

    Attributes:
        value: of the direction, call and mean that are furthest from perfect.
        threshold: what it is judged by; ``None`` if it is not.
        beyond: whether it is beyond its threshold.
    """

    value: float
    threshold: float | None
    beyond: bool


#: Columns of the matrix: what is judged, and the colours.
SHOWN = tuple(metric for metric in METRICS if metric.defaults is not None or metric.name == "colour_difference")


def seen(check: TaskCheck) -> dict[str, Seen]:
    """What each metric that applies says."""
    says = {}
    for metric in SHOWN:
        if (value := metric.worst(check.metrics)) is not None:
            limit = check.thresholds[metric.name]
            beyond = limit is not None and metric.missed(value, limit) is not None
            says[metric.name] = Seen(round(float(value), 4), limit, beyond)
    return says


def record(model: Path, data: Path, names: Sequence[str], pictures: int, steps: int) -> dict[str, Reference]:
    """What the float original does with the first rows of each task."""
    from calibration.record import record_reference
    from calibration.samples import load_samples
    from mtu_compile.core.tasks import find_task
    from mtu_compile.model.pipeline import MTUPipeline

    pipeline = MTUPipeline.from_pretrained(model)
    size, recorded = pipeline.resolve_size(None, None), {}
    for name in names:
        task = find_task(pipeline.unet.tasks, name)[1]
        rows = load_samples(data, task)
        chosen = rows[:: max(1, len(rows) // pictures)][:pictures]
        recorded[name] = record_reference(pipeline, task, chosen, size=size, steps=steps, producer="bench")
    return recorded


def on_this_cpu(folder: Path, place: str, graph: Path) -> Callable[[bundle.EngineRef], Engine]:
    """Opens a bundle's graphs by OpenVINO, quantised ones in INT8, and ``graph`` instead of the one at ``place``."""

    def open_network(ref: bundle.EngineRef) -> Engine:
        return open_engine("openvino", graph if ref.path == place else folder / ref.path, HOST_CONFIG)

    return open_network


def markdown(results: Mapping[str, Mapping[str, Mapping[str, Seen]]]) -> str:
    """One table a task: defects × metrics, bold where a metric is beyond its threshold."""
    lines = []
    for task, rows in results.items():
        columns = [one.name for one in SHOWN if any(one.name in row for row in rows.values())]
        thresholds = {name: next(row[name].threshold for row in rows.values() if name in row) for name in columns}
        lines += [f"### {task}", "", f"| defect | {' | '.join(columns)} |", "| --- |" + " ---: |" * len(columns)]
        asked = ("-" if thresholds[name] is None else f"{thresholds[name]:g}" for name in columns)
        lines.append(f"| *threshold* | {' | '.join(asked)} |")
        for defect, row in rows.items():
            cells = []
            for name in columns:
                one = row.get(name)
                text = "-" if one is None else f"{one.value:.3g}"
                cells.append(f"**{text}**" if one is not None and one.beyond else text)
            lines.append(f"| {defect} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, default=Path("build/bench/jetson"), help="with ONNX graphs")
    parser.add_argument("--model", type=Path, default=Path("examples/emoji/model"))
    parser.add_argument("--data", type=Path, default=Path("build/emoji/held-out"))
    parser.add_argument("--pictures", type=int, default=2, help="pictures a task")
    parser.add_argument("--steps", type=int, default=10, help="denoising steps")
    parser.add_argument("--task", action="append", help="only this task; may be given again")
    args = parser.parse_args()

    entries = bundle.read(args.bundle, verify=False).tasks
    names = args.task or list(entries)
    results: dict[str, dict[str, dict[str, Seen]]] = {}
    for name, reference in record(args.model, args.data, names, args.pictures, args.steps).items():
        rows = results.setdefault(name, {})
        graphs = {other: args.bundle / entry.engine.path for other, entry in entries.items()}
        others = {other: graph_io.load(path) for other, path in graphs.items() if other != name}
        for defect in defects(entries[name].task, others):
            with tempfile.TemporaryDirectory() as work:
                graph = graphs[name] if defect.edit is None else spoil(graphs[name], defect.edit, Path(work) / "m.onnx")
                opener = on_this_cpu(args.bundle, entries[name].engine.path, graph)
                checks = held_out.check(args.bundle, {name: reference}, tasks=[name], opener=opener)
                rows[defect.name] = seen(checks[name])
            caught = [metric for metric, one in rows[defect.name].items() if one.beyond]
            print(f"{name}: {defect.name}: {', '.join(caught) or 'no metric'}", file=sys.stderr)
    timing.write("defects", {"pictures": args.pictures, "steps": args.steps, "tasks": results})
    print(markdown(results))


if __name__ == "__main__":
    main()
