"""The held-out emoji: what the float original makes of them, and a bundle checked against that."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

from calibration.record import record_reference
from calibration.samples import load_samples
from mtu_compile import bundle, runtime
from mtu_compile.accuracy.host.check import measure_task
from mtu_compile.accuracy.host.perceptual import perceptual
from mtu_compile.accuracy.verdict import TaskCheck
from mtu_compile.core.progress import ignore
from mtu_compile.runtime.engine import Engine, open_engine
from mtu_compile.runtime.reference import Reference

MODEL = Path("examples/emoji/model")
DATA = Path("build/emoji/held-out")
WORK = Path("build/bench/held-out")


def references(pictures: int, *, steps: int = 20, work: Path = WORK) -> dict[str, Reference]:
    """By task, what the float original makes of ``pictures`` held-out rows drawn by chance, always the same ones."""
    from mtu_compile.model.pipeline import MTUPipeline

    found, pipeline = {}, None
    for path in sorted(DATA.iterdir()):
        file = work / f"{path.name}-{pictures}-{steps}.safetensors"
        if not file.exists():
            pipeline = pipeline or MTUPipeline.from_pretrained(MODEL)
            task = next(task for task in pipeline.unet.tasks if task.name == path.name)
            rows = load_samples(DATA, task)
            chosen = random.Random(0).sample(rows, min(pictures, len(rows)))
            print(f"float pictures of {len(chosen)} held-out rows: {task.name}", flush=True)
            producer = f"torch {version('torch')}, float32, dynamic routing"
            size = pipeline.resolve_size(None, None)
            reference = record_reference(pipeline, task, chosen, size=size, steps=steps, producer=producer)
            file.parent.mkdir(parents=True, exist_ok=True)
            reference.save(file)
        found[path.name] = Reference.load(file)
    return found


def check(
    folder: Path,
    wanted: Mapping[str, Reference],
    *,
    tasks: Sequence[str] | None = None,
    opener: Callable[[bundle.EngineRef], Engine] | None = None,
) -> dict[str, TaskCheck]:
    """Every task of a bundle for this CPU against the float pictures; ``opener`` puts other networks in place."""
    checks = {}
    with runtime.load(folder, opener=opener) as loaded:
        for name, entry in loaded.manifest.tasks.items():
            if tasks is None or name in tasks:
                checks[name] = measure_task(entry, wanted[name], loaded, ignore, perceptual())
    return checks


def opener(folder: Path, task: str, graph: Path) -> Callable[[bundle.EngineRef], Engine]:
    """Opens a bundle's networks, and ``graph`` in the place of a task's UNet."""
    place = bundle.read(folder, verify=False).tasks[task].engine.path

    def open_network(ref: bundle.EngineRef) -> Engine:
        if ref.path == place:
            return open_engine(ref.kind, graph, ref.config)
        weights = None if ref.weights is None else folder / ref.weights
        return open_engine(ref.kind, folder / ref.path, ref.config, weights=weights)

    return open_network


def into_docs(page: Path, marker: str, text: str) -> None:
    """Put ``text`` between ``<!-- marker -->`` and ``<!-- /marker -->`` of a page."""
    begin, end = f"<!-- {marker} -->", f"<!-- /{marker} -->"
    pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    old = page.read_text(encoding="utf-8")
    if not pattern.search(old):
        raise SystemExit(f"{page} has no place {begin}")
    page.write_text(pattern.sub(lambda _: f"{begin}\n\n{text.strip()}\n\n{end}", old), encoding="utf-8")


def markdown(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines) + "\n"
