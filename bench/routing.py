"""One engine for all tasks against one for each: memory, disk, loading, steps and switching, side by side.

    python -m bench.routing example         the emoji example, 16×16 latents
    python -m bench.routing sd15            Stable Diffusion 1.5's size, random weights, 32×32 latents (24 GB of memory)

Every graph, every engine and every measurement has a process of its own, which then gives its memory back.
What is there is kept (graphs and engines under ``--work``, figures under ``--work/WHICH/figures``), so that a run that
was cut short goes on where it was; ``--again`` measures anew. INT8 is calibrated on random inputs and without a search
for float layers: good for a time and a size, not for an accuracy.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

import passes
import targets
from bench import timing
from calibration.quantize import table_reads
from mtu_compile.core.tasks import Task
from mtu_compile.graph import io as graph_io
from mtu_compile.runtime.engine import Engine, open_engine
from mtu_compile.runtime.task_engine import TaskEngine

#: What the CPU target builds, and the name of the one engine for all tasks among the tasks' own.
PRECISIONS, SHARED = ("int8", "bf16", "fp32"), "shared"
#: Targets whose engines are built for their sizes alone.
ELSEWHERE = (("rtx-ada", "fp16"), ("rtx-ada", "int8"), ("intel-npu", "fp16"), ("intel-npu", "int8"))
FREEZE = ("mtu::freeze-shapes", "mtu::cleanup")


class Work:
    """The files of one run, and what is read of them."""

    def __init__(self, which: str, folder: Path) -> None:
        self.which, self.folder = which, folder / which
        self.dynamic = self.folder / "dynamic" / "model.onnx"
        self.figures = self.folder / "figures"

    def facts(self) -> dict[str, Any]:
        return dict(json.loads((self.folder / "facts.json").read_text()))

    def tasks(self) -> tuple[Task, ...]:
        return tuple(Task.from_json(one) for one in self.facts()["tasks"])

    def graph(self, name: str, precision: str) -> Path:
        return self.folder / name / ("int8.onnx" if precision == "int8" else "model.onnx")

    def engine(self, target: str, precision: str, name: str) -> Path:
        return self.folder / f"{target}-{precision}" / name

    def inputs(self, task: Task, channels: int, *, seed: int = 0, batch: int | None = None) -> dict[str, Any]:
        """Random inputs of one step of ``task``, ``channels`` wide; those the task does not have are zero."""
        facts, rng = self.facts(), np.random.default_rng(seed)
        batch = batch or task.unet_batch
        size, own = facts["size"], 4 + task.condition_channels(4)
        sample = np.zeros((batch, channels, size, size), np.float32)
        sample[:, :own] = rng.standard_normal((batch, own, size, size))
        text = rng.standard_normal((batch, facts["length"], facts["width"])).astype(np.float32)
        return {"sample": sample, "timestep": np.array([500], np.float32), "encoder_hidden_states": text}


def export(work: Work) -> None:
    from bench.unet import example_models, sd15_models
    from mtu_compile.model.export import export_unet

    plain, multi, size, length = example_models() if work.which == "example" else sd15_models()
    tasks = [task.to_json() for task in multi.tasks]
    width, channels = int(plain.config.cross_attention_dim), int(multi.sample_channels)
    del plain
    export_unet(multi, work.dynamic.parent, text_length=length)
    facts = {"tasks": tasks, "size": size, "length": length, "width": width, "channels": channels}
    (work.folder / "facts.json").write_text(json.dumps(facts))


def specialise(work: Work, name: str) -> None:
    """The float graph of a task, or of all."""
    facts, out = work.facts(), work.graph(name, "fp32")
    sizes = {"height": facts["size"], "width": facts["size"], "text_length": facts["length"]}
    if name == SHARED:
        passes.run_pipeline(work.dynamic, out, passes.SHARED_PIPELINE, passes.PassContext(**sizes))
        if len(table_reads(graph_io.load_proto(out))) < 2:
            raise SystemExit(f"the tasks of {work.dynamic} are all alike, and {out} has no routing to measure")
        return
    index, task = next((i, task) for i, task in enumerate(work.tasks()) if task.name == name)
    channels = 4 + task.condition_channels(4)
    passes.specialise(work.dynamic, out, task_id=index, channels=channels, batch=task.unet_batch, **sizes)


def quantise(work: Work, name: str) -> None:
    from calibration.quantize import quantize_onnx
    from mtu_compile.stages.precision import INT8

    facts, tasks = work.facts(), work.tasks()
    if name == SHARED:
        samples = [
            {**work.inputs(task, facts["channels"], seed=i), "task": np.full(task.unet_batch, i, np.int64)}
            for i, task in enumerate(tasks)
        ]
    else:
        task = next(task for task in tasks if task.name == name)
        samples = [work.inputs(task, 4 + task.condition_channels(4), seed=i) for i in range(len(tasks))]
    quantize_onnx(work.graph(name, "fp32"), samples, work.graph(name, "int8"), settings=INT8)


def build(work: Work, target: str, precision: str, name: str) -> None:
    """The engine of a task, or of all, with the batch the target wants of it."""
    found = targets.get(target)
    graph, scratch = work.graph(name, precision), work.folder / "lowered"
    batch = found.spec.shared_batch
    if name == SHARED and batch is not None:
        context = passes.PassContext(batch=batch)
        passes.run_pipeline(graph, scratch / "frozen.onnx", FREEZE, context)
        graph = scratch / "frozen.onnx"
    if ids := found.spec.lowering.get(precision, ()):  # type: ignore[call-overload]
        context = passes.PassContext(original=work.graph(name, "fp32"))
        passes.run_pipeline(graph, scratch / "lowered.onnx", ids, context)
        graph = scratch / "lowered.onnx"
    out = work.engine(target, precision, name)
    artifact = found.build(graph, out, precision=precision)  # type: ignore[arg-type]
    engine = artifact.prebuilt or artifact.path
    facts = {
        "kind": artifact.kind,
        "path": artifact.path.name,
        "config": dict(artifact.config),
        "disk_bytes": sum(file.stat().st_size for file in artifact.files),
        "engine_bytes": engine.stat().st_size,
        "estimate_ms": None if artifact.estimate is None else artifact.estimate.latency_ms,
        "batch": "any" if name == SHARED and batch is None else batch if name == SHARED else None,
    }
    (out.parent / f"{name}.json").write_text(json.dumps(facts))
    for file in scratch.glob("*"):
        file.unlink()


def built(work: Work, target: str, precision: str, name: str) -> dict[str, Any]:
    return dict(json.loads((work.engine(target, precision, name).parent / f"{name}.json").read_text()))


def opened(work: Work, precision: str, name: str) -> Engine:
    facts = built(work, "cpu", precision, name)
    return open_engine(facts["kind"], work.engine("cpu", precision, name) / facts["path"], facts["config"])


def task_engines(work: Work, precision: str, form: str) -> tuple[dict[str, Engine], list[Engine]]:
    """By task, what answers for it; and the engines behind."""
    tasks = work.tasks()
    if form == SHARED:
        shared = opened(work, precision, SHARED)
        return {t.name: TaskEngine(shared, i, 4 + t.condition_channels(4)) for i, t in enumerate(tasks)}, [shared]
    names = [task.name for task in tasks][: 1 if form == "single" else None]
    engines = {name: opened(work, precision, name) for name in names}
    return engines, list(engines.values())


def resident_bytes() -> int:
    """This process's share of the machine's memory, files it has mapped included."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))


def footprint(work: Work, precision: str, form: str) -> dict[str, Any]:
    """Memory and loading of a form: ``"static"`` (all tasks), ``"shared"``, or ``"single"`` (the first task alone)."""
    import openvino

    openvino.Core().get_property("CPU", "FULL_DEVICE_NAME")  # the library itself is not the engines'
    before, began = resident_bytes(), time.perf_counter()
    by_task, engines = task_engines(work, precision, form)
    seconds = time.perf_counter() - began
    for task in work.tasks():
        if task.name in by_task:
            by_task[task.name](work.inputs(task, 4 + task.condition_channels(4)))
    gc.collect()
    names = [SHARED] if form == SHARED else list(by_task)
    disk = sum(built(work, "cpu", precision, name)["disk_bytes"] for name in names)
    used = resident_bytes() - before
    for engine in engines:
        engine.close()
    return {"resident_bytes": used, "load_seconds": round(seconds, 3), "disk_bytes": disk}


def steps(work: Work, precision: str, name: str, rounds: int) -> dict[str, Any]:
    """A step of one task in its own engine and in the shared one."""
    index, task = next((i, task) for i, task in enumerate(work.tasks()) if task.name == name)
    channels = 4 + task.condition_channels(4)
    inputs = work.inputs(task, channels)
    own, shared = opened(work, precision, name), TaskEngine(opened(work, precision, SHARED), index, channels)
    found = timing.interleave({"static": lambda: own(inputs), "shared": lambda: shared(inputs)}, rounds)
    return {"samples": task.unet_batch, **{form: asdict(one) for form, one in found.items()}}


def switching(work: Work, precision: str, rounds: int) -> dict[str, Any]:
    """Seconds the first step of another task takes longer than the next of the same.

    Of the shared engine, and of static ones that are all kept loaded; and the time to open one, where only one fits.
    """
    found: dict[str, Any] = {}
    first, second = work.tasks()[:2]
    for form in (SHARED, "static"):
        by_task, engines = task_engines(work, precision, form)
        runs = {t.name: _call(by_task[t.name], work.inputs(t, 4 + t.condition_channels(4))) for t in (first, second)}
        extra = []
        for _ in range(rounds + 1):
            runs[second.name]()
            after_other, after_same = _seconds(runs[first.name]), _seconds(runs[first.name])
            extra.append(after_other - after_same)
        found[form] = median(extra[1:])
        for engine in engines:
            engine.close()
    began = time.perf_counter()
    opened(work, precision, first.name)
    found["static, by loading"] = round(time.perf_counter() - began, 3)
    return found


def _call(engine: Engine, inputs: Mapping[str, Any]) -> Callable[[], object]:
    return lambda: engine(inputs)


def _seconds(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


#: What a process of this module can be told to do, and whether it answers with a figure.
STEPS: Mapping[str, Callable[..., Any]] = {
    "export": export,
    "specialise": specialise,
    "quantise": quantise,
    "build": build,
    "footprint": footprint,
    "steps": lambda work, precision, name, rounds: steps(work, precision, name, int(rounds)),
    "switching": lambda work, precision, rounds: switching(work, precision, int(rounds)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("which", choices=["example", "sd15"])
    parser.add_argument("--work", type=Path, default=Path("build/bench/routing"))
    parser.add_argument("--rounds", type=int, default=None)
    parser.add_argument("--precision", action="append", choices=PRECISIONS, help="int8 and the CPU's own float type")
    parser.add_argument("--no-other-targets", action="store_true", help="leave out sizes of RTX engines and NPU blobs")
    parser.add_argument("--again", action="store_true", help="measure anew; graphs and engines are kept")
    parser.add_argument("--step", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    work = Work(args.which, args.work)
    if args.step:
        print(json.dumps(STEPS[args.step[0]](work, *args.step[1:])))
        return
    rounds = args.rounds or (40 if args.which == "example" else 8)
    run = _Runner(work, args.again)
    run.make(work.folder / "facts.json", "export")
    names = [*(task.name for task in work.tasks()), SHARED]
    floats = targets.get("cpu").companion_precision("int8")
    precisions = args.precision or ["int8", floats]
    for name in names:
        run.make(work.graph(name, "fp32"), "specialise", name)
        if "int8" in precisions:
            run.make(work.graph(name, "int8"), "quantise", name)
    found = {precision: _measure(run, work, precision, names, rounds) for precision in precisions}
    elsewhere = {} if args.no_other_targets else _elsewhere(run, work, names)
    timing.write(
        f"routing-{args.which}",
        {
            "what": "an engine for each task (static), one for all (shared), and one task's alone (single), on the CPU",
            "rounds": rounds,
            "forms": found[precisions[0]]["forms"],
            "precisions": found,
            "other targets": elsewhere,
        },
    )


class _Runner:
    """Starts the processes of what is not there yet."""

    def __init__(self, work: Work, again: bool) -> None:
        self._work, self._again = work, again

    def make(self, product: Path, *step: str) -> None:
        """Run a step that writes ``product``, unless it is there."""
        if not product.exists():
            self._run(step)

    def figure(self, *step: str) -> Any:
        """What a step measures; as it was measured before, if it was."""
        path = self._work.figures / ("-".join(step) + ".json")
        if self._again or not path.exists():
            answer = self._run(step)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(answer)
        return json.loads(path.read_text())

    def _run(self, step: Sequence[str]) -> str:
        print(" ".join(step), file=sys.stderr)
        command = [sys.executable, "-m", "bench.routing", self._work.which, "--work", str(self._work.folder.parent)]
        done = subprocess.run([*command, "--step", *step], check=True, stdout=subprocess.PIPE, text=True)
        return done.stdout.strip().splitlines()[-1]


def _measure(run: _Runner, work: Work, precision: str, names: Sequence[str], rounds: int) -> dict[str, Any]:
    for name in names:
        folder = work.engine("cpu", precision, name).parent
        run.make(folder / f"{name}.json", "build", "cpu", precision, name)
    forms = {form: run.figure("footprint", precision, form) for form in ("static", SHARED, "single")}
    by_task = {name: run.figure("steps", precision, name, str(rounds)) for name in names if name != SHARED}
    switch = run.figure("switching", precision, str(rounds))
    for form in ("static", SHARED):
        forms[form]["step_seconds"] = sum(one[form]["median"] for one in by_task.values()) / len(by_task)
    # Static engines that are all kept loaded switch as fast; what is compared is one engine's memory.
    forms[SHARED]["switch_seconds"] = max(switch[SHARED], 0.0)
    forms["static"]["switch_seconds"] = switch["static, by loading"]
    ratios = {
        f"{key}, shared to {other}": round(forms[SHARED][key] / forms[other][key], 3)
        for key in ("resident_bytes", "disk_bytes", "load_seconds")
        for other in ("single", "static")
    }
    return {"forms": forms, "ratios": ratios, "steps": by_task, "switch seconds": switch}


def _elsewhere(run: _Runner, work: Work, names: Sequence[str]) -> dict[str, Any]:
    """Sizes of one task's engine and of the shared one, and their compilers' own estimates, where those are here."""
    found: dict[str, Any] = {}
    for target, precision in ELSEWHERE:
        available = targets.get(target).probe()
        if not available.ok:
            found[f"{target} {precision}"] = available.detail
            continue
        for name in (names[0], SHARED):
            folder = work.engine(target, precision, name).parent
            run.make(folder / f"{name}.json", "build", target, precision, name)
        rows = {name: built(work, target, precision, name) for name in (names[0], SHARED)}
        keys = ("engine_bytes", "disk_bytes", "estimate_ms", "batch")
        found[f"{target} {precision}"] = {name: {key: row[key] for key in keys} for name, row in rows.items()}
    return found


if __name__ == "__main__":
    main()
