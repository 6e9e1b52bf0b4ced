"""The bundle round the engines: tokenizer, scheduler, the layout other tools open, and the manifest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calibration.notices import RowNotice
from calibration.sets import CalibrationSet
from mtu_compile import bundle
from mtu_compile.bundle.plan import PlanRecord
from mtu_compile.bundle.provenance import HalfRangeRecord, NoticeRecord, ParityRecord, StepRecord
from mtu_compile.bundle.quantisation import CalibrationRecord
from mtu_compile.bundle.requirements import BoardRequirements
from mtu_compile.core import vendors
from mtu_compile.core.fit import Fit
from mtu_compile.core.progress import Progress
from mtu_compile.core.schema import conform
from mtu_compile.core.version import __version__
from mtu_compile.model.sampler import SCHEDULER, published_config, save_scheduler
from mtu_compile.planner import BuildPlan
from mtu_compile.stages import wheels
from mtu_compile.stages.job import CAPTURED, BuiltUnet, Lowered, Model, Observed, Parts, Specialised
from mtu_compile.steps import Ran, Steps
from targets.base import Artifact, Precision, Target

if TYPE_CHECKING:
    from mtu_compile.model.pipeline import MTUPipeline

#: Tools whose version a bundle records, beside the vendors' own.
TOOLS = ("torch", "diffusers", "transformers", "onnx", "onnxruntime", "nncf", "polygraphy", "numpy")


def describe_model(
    model: Model, source: bundle.Source, target: str, precision: Precision, parts: Parts, fit: Fit, folder: Path
) -> bundle.Manifest:
    """A manifest that has no tasks yet, and tokenizers and scheduler in ``folder``.

    Args:
        source: the checkpoint.
        target: name of the target.
        precision: of the UNets.
        parts: text encoders and autoencoder, built into ``folder``.
        fit: what becomes of pictures of other proportions unless the bundle's user says otherwise.
    """
    pipeline = model.pipeline
    save_scheduler(pipeline.scheduler, folder / SCHEDULER)
    engines = {name: engine_ref(artifact, folder) for name, artifact in parts.engines.items()}
    text, *more = _text_parts(pipeline, engines, folder)
    return bundle.Manifest(
        tools={"mtu-compile": __version__, **_versions()},
        source=source,
        target=target,
        precision=precision,
        image_size=model.size,
        latent_channels=pipeline.unet.latent_channels,
        vae_scale=pipeline.vae_scale,
        scaling_factor=float(pipeline.vae.config.scaling_factor),
        text=text,
        text_2=more[0] if more else None,
        family=pipeline.family.name,
        zeros_for_empty_prompt=pipeline.texts.zeros_for_empty,
        vae_encoder=engines["vae_encoder"],
        vae_decoder=engines["vae_decoder"],
        scheduler=published_config(pipeline.scheduler),
        tasks={},
        fit=fit,
    )


def _text_parts(pipeline: MTUPipeline, engines: Mapping[str, bundle.EngineRef], folder: Path) -> list[bundle.TextPart]:
    """The text encoders as the manifest has them, and their tokenizers in ``folder``."""
    texts, parts = pipeline.texts, []
    for (branch, encoder), tokenizer in zip(texts.branches(), texts.tokenizers, strict=True):
        _save_tokenizer(tokenizer, folder / branch.tokenizer, texts.length)
        parts.append(
            bundle.TextPart(
                f"{branch.tokenizer}/tokenizer.json",
                texts.length,
                int(tokenizer.pad_token_id),
                engines[branch.encoder],
                branch.states_output(int(encoder.config.num_hidden_layers)),
                branch.pooled_output,
            )
        )
    return parts


def describe_task(
    unet: Specialised,
    task_id: int,
    observed: Observed,
    lowered: Lowered,
    built: BuiltUnet,
    *,
    steps: int,
    given_set: Path | None,
    notices: tuple[RowNotice, ...],
    thresholds: Mapping[str, float | None] | None,
    folder: Path,
) -> bundle.TaskEntry:
    """A task as the manifest of the bundle in ``folder`` has it.

    Args:
        unet: serves the task, and maybe others.
        task_id: index of the task in the model.
        steps: denoising steps unless the user says otherwise.
        given_set: folder of the calibration set; ``None`` if the build captured its own.
        notices: what there is to say of the rows it was calibrated and is checked with.
        thresholds: what the model asks of it; ``None`` if it has none of its own.
    """
    task, calibration = unet.tasks[task_id], None
    if observed.calibration is not None:
        origin = CAPTURED if given_set is None else given_set.resolve().name
        described = CalibrationSet.load(observed.calibration).describe()
        calibration = conform(CalibrationRecord, {**described, "source": origin})
    span = built.ranges.get(task.name)
    provenance = bundle.TaskProvenance(
        notices=tuple(conform(NoticeRecord, notice.to_json()) for notice in notices),
        calibration=calibration,
        quantisation=lowered.quantisation.get(task.name),
        compression=lowered.compression,
        build_seconds=built.seconds,
        parity=conform(ParityRecord, built.parity[task.name].to_json()),
        float16_range=None if span is None else conform(HalfRangeRecord, span.to_json()),
        step_cache=None if built.shallow is None else bundle.StepCacheRecord(steps, built.shallow.share),
    )
    shallow = None if built.shallow is None else engine_ref(built.shallow.artifact, folder)
    return bundle.TaskEntry(
        task=task,
        task_id=task_id,
        engine=engine_ref(built.artifact, folder),
        default_steps=steps,
        passes=(*unet.passes, *lowered.passes),
        user_passes=unet.user_passes,
        calibration=None if calibration is None else calibration.sha256,
        accuracy_reason="not checked",
        reference=observed.reference.relative_to(folder).as_posix(),
        provenance=provenance,
        thresholds=thresholds,
        step_cache=None if shallow is None else bundle.StepCache(shallow),
    )


def reference(steps: Steps, kept: Path, folder: Path) -> Path:
    """The file of a float reference that is kept, in the bundle in ``folder``."""
    return steps.place(kept, folder / "reference" / kept.name)


def describe_build(
    planned: BuildPlan,
    parts: Parts,
    as_task: str | None,
    board: BoardRequirements | None,
    saved: int | None,
    ran: Sequence[Ran],
) -> bundle.BuildProvenance:
    """What the manifest says of the build as a whole; ``saved`` are the bytes that shared weights save."""
    ranges = {
        name: conform(HalfRangeRecord, {"precision": precision, **measured.to_json()})
        for name, (precision, measured) in parts.ranges.items()
    }
    steps = tuple(StepRecord(one.step, one.title, one.cached, one.seconds) for one in ran)
    record = conform(PlanRecord, planned.to_json())
    return bundle.BuildProvenance(record, board, as_task, ranges, saved, steps, parts.decoder)


def pack_for_board(target: Target, folder: Path, progress: Progress, *, fetch: bool) -> BoardRequirements | None:
    """The packages a board needs, in ``folder``, and what the board has to have; ``None`` for other targets.

    Args:
        fetch: download what our own package depends on, for a board without internet.
    """
    requirements = target.spec.board_requirements()
    if not requirements:
        return None
    with progress.stage("packages for the board"):
        packed = wheels.pack(folder / "wheels", target.spec.board_systems(), fetch=fetch)
    needed: BoardRequirements = conform(BoardRequirements, {**requirements, "wheels": packed})
    return needed


def _save_tokenizer(tokenizer: Any, folder: Path, length: int) -> None:
    """What is written does not depend on what the tokenizer was used for: it remembers how it padded and cut last."""
    tokenizer([""], padding="max_length", max_length=length, truncation=True)
    tokenizer.save_pretrained(folder)


def engine_ref(artifact: Artifact, folder: Path) -> bundle.EngineRef:
    """``artifact`` as the manifest of the bundle in ``folder`` has it."""
    return bundle.EngineRef(
        artifact.kind,
        artifact.path.relative_to(folder).as_posix(),
        artifact.config,
        None if artifact.prebuilt is None else artifact.prebuilt.relative_to(folder).as_posix(),
        artifact.state,
        artifact.reason,
        artifact.estimate,
    )


def _versions() -> dict[str, str]:
    found = {}
    for tool in dict.fromkeys((*TOOLS, *vendors.packages())):
        try:
            found[tool] = version(tool)
        except PackageNotFoundError:
            continue
    return found
