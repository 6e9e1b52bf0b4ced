"""Cross-backend parity: does one graph compute the same wherever it runs?

The same file runs over the same recorded inputs on ONNX Runtime, OpenVINO and whatever device is here, with the guards
of ``mtu_compile.accuracy.recorded``. Each is compared with the float
original, which says what the graph's precision costs, and with the first backend, which says whether a backend computes
something else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from mtu_compile.accuracy.calls import StepMetrics, distance, step_metrics
from mtu_compile.accuracy.recorded import compare_recorded, some_calls
from mtu_compile.core import vendors
from mtu_compile.core.errors import AccuracyError, TargetError
from mtu_compile.core.guidance import Guidance
from mtu_compile.runtime.engine import Array, Engine
from mtu_compile.runtime.reference import Reference
from targets.backend import Backend as Backend
from targets.backend import Offer

#: Agreement that is always enough, decibels: in float32 only the order of sums differs, which leaves 90 dB and more.
ENOUGH_DB = 60.0
#: By how much two backends may differ more than the first one differs from the original, decibels: two independent
#: rounding errors of the same size add up to 3 dB more.
SLACK_DB = 3.0


@dataclass(frozen=True)
class BackendResult:
    """One backend over all calls.

    Attributes:
        backend, version: what ran.
        worst_sqnr_db, mean_sqnr_db: UNet output against the float original, decibels.
        worst_cosine: against the float original.
        worst_guidance_ratio: of a guidance delta's norm to the original's, the one furthest from 1; ``None`` without
            guidance.
        agreement_db: lowest SQNR of its output against the first backend's, decibels; ``None`` for the first.
        judged: whether it has to agree with the first.
    """

    backend: str
    version: str
    worst_sqnr_db: float
    mean_sqnr_db: float
    worst_cosine: float
    worst_guidance_ratio: float | None
    agreement_db: float | None
    judged: bool


@dataclass(frozen=True)
class Parity:
    """The table of one graph.

    Attributes:
        task: which task's graph it is.
        graph: the file's name.
        reference: what recorded the inputs and the float outputs.
        calls: how many recorded UNet calls each backend ran.
        rows: the backends that ran it, the first of which the others are compared with.
        not_run: backend → why this machine cannot run the graph with it.
    """

    task: str
    graph: str
    reference: str
    calls: int
    rows: tuple[BackendResult, ...]
    not_run: Mapping[str, str]

    @property
    def required_db(self) -> float:
        """Least agreement: backends differ from each other by no more than the first differs from the original."""
        return min(ENOUGH_DB, self.rows[0].worst_sqnr_db - SLACK_DB)

    @property
    def failures(self) -> tuple[str, ...]:
        """Every backend that computes something else than the first."""
        first = self.rows[0].backend
        return tuple(
            f"{row.backend} differs from {first} on {self.graph} of task {self.task!r}: {row.agreement_db:.1f} dB, "
            f"and {self.required_db:.1f} dB were to be expected"
            for row in self.rows[1:]
            if row.judged and not (row.agreement_db is not None and row.agreement_db >= self.required_db)
        )

    def require(self) -> None:
        """``AccuracyError`` (exit code 3) listing ``failures``."""
        if self.failures:
            raise AccuracyError(
                "; ".join(self.failures), hint="one of the backends is wrong; compare their versions with the notes"
            )

    def to_json(self) -> dict[str, Any]:
        """For the manifest and the report; all numbers are finite."""
        return {**asdict(self), "required_db": self.required_db, "failures": list(self.failures)}


@dataclass(frozen=True)
class Recorded:
    """What a graph is compared with.

    Attributes:
        reference: recorded inputs and float outputs of a task.
        guidance: the task's kind of guidance.
        view: the task as a graph for several tasks has it; an engine as it is, for one task's graph.
    """

    reference: Reference
    guidance: Guidance = "none"
    view: Callable[[Engine], Engine] = field(default=lambda engine: engine)


def parity(
    graph: Path,
    reference: Reference,
    *,
    guidance: Guidance = "none",
    calls: int = 8,
    extra: Sequence[Backend] = (),
    native: str | None = None,
) -> Parity:
    """Run one graph of one task on every backend and compare; see ``parity_of_tasks``.

    Args:
        reference: recorded inputs and float outputs of the task.
        guidance: the task's kind of guidance.
    """
    return parity_of_tasks(graph, [Recorded(reference, guidance)], calls=calls, extra=extra, native=native)[0]


def parity_of_tasks(
    graph: Path,
    tasks: Sequence[Recorded],
    *,
    calls: int = 8,
    extra: Sequence[Backend] = (),
    native: str | None = None,
) -> tuple[Parity, ...]:
    """Run one graph on every backend, each opened once, and compare; a table for each task.

    Args:
        graph: ONNX file, float, fp16 or Q/DQ, or an IR (``.xml``), which only OpenVINO runs.
        tasks: what it is compared with, for each task it is for.
        calls: UNet calls compared, spread evenly over the recording.
        extra: more backends, e.g. the engine on the device itself.
        native: kind of the engine built from the graph where that runs on this machine's own CPU, so that its INT8
            kernels have to agree, too; elsewhere OpenVINO multiplies the quantised numbers in float32, as they are.

    Raises:
        AccuracyError: the graph cannot be compared with the reference (other inputs, outputs or shapes, NaN), nothing
            was recorded, or no backend here runs it. Backends that disagree are in ``Parity.failures``.
    """
    if calls < 1:
        raise AccuracyError(f"{calls} calls compare nothing")
    recorded = [some_calls(task.reference, calls) for task in tasks]
    rows: list[list[BackendResult]] = [[] for _ in tasks]
    first: list[list[Mapping[str, Array]]] = [[] for _ in tasks]
    not_run: dict[str, str] = {}
    for backend in (*backends(graph, native=native), *extra):
        try:
            engine = backend.open()
        except TargetError as error:
            not_run[backend.name] = error.message
            continue
        with closing(engine):
            for i, task in enumerate(tasks):
                answers: list[Mapping[str, Array]] = []
                steps = compare_recorded(
                    task.view(engine), recorded[i], guidance=task.guidance, name=backend.name, told=answers.append
                )
                row = _result(backend, steps)
                if rows[i]:
                    row = replace(row, agreement_db=min(_sqnr(*pair) for pair in zip(first[i], answers, strict=True)))
                else:
                    first[i] = answers
                rows[i].append(row)
    if not all(rows):
        why = "; ".join(f"{name}: {reason}" for name, reason in not_run.items())
        raise AccuracyError(f"no backend on this machine runs {graph.name} ({why})")
    return tuple(
        Parity(task.reference.task, graph.name, task.reference.producer, len(used), tuple(table), not_run)
        for task, used, table in zip(tasks, recorded, rows, strict=True)
    )


def backends(graph: Path, *, native: str | None = None) -> tuple[Backend, ...]:
    """What any build machine can run a graph with, as the vendors offer it; the one that leads comes first."""
    offers: list[Offer] = [vendors.load(place) for place in vendors.backends()]
    able = [backend for offer in offers if (backend := offer(graph, native)) is not None]
    return tuple(sorted(able, key=lambda backend: not backend.leads))


def _result(backend: Backend, steps: Sequence[StepMetrics]) -> BackendResult:
    ratios = [delta.ratio for step in steps for delta in step.guidance]
    return BackendResult(
        backend=backend.name,
        version=backend.version,
        worst_sqnr_db=min(step.sqnr_db for step in steps),
        mean_sqnr_db=fmean(step.sqnr_db for step in steps),
        worst_cosine=min(step.cosine for step in steps),
        worst_guidance_ratio=max(ratios, key=distance) if ratios else None,
        agreement_db=None,
        judged=backend.judged,
    )


def _sqnr(reference: Mapping[str, Array], candidate: Mapping[str, Array]) -> float:
    return step_metrics(reference, candidate, timestep=None).sqnr_db
