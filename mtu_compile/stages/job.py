"""What passes between the stages of a compilation, and what the drivers are asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from calibration.quant_settings import QuantSettings
from calibration.samples import Sample
from mtu_compile import bundle
from mtu_compile.accuracy.host.half_range import HalfRange
from mtu_compile.accuracy.host.parity import Parity
from mtu_compile.accuracy.verdict import CheckResult
from mtu_compile.bundle.quantisation import CompressionRecord, DecoderRecord, QuantisationRecord
from mtu_compile.core.fit import Fit
from mtu_compile.core.routing import RoutingChoice
from mtu_compile.core.tasks import Task, find_task
from mtu_compile.steps import NOT_CONTENT, Ran
from targets.base import Artifact, Precision

if TYPE_CHECKING:
    from mtu_compile.model.pipeline import MTUPipeline

Gate = Literal["off", "warn", "fail"]

#: Largest interval between whole UNet steps, 2 or more; ``"auto"`` leaves it to the build.
StepCacheChoice = int | Literal["auto"]

#: Name of the UNet that is for all tasks, among those of a build.
SHARED = "shared"

#: What a manifest says of a calibration set that the build captured itself; else it is the name of a folder of sets.
CAPTURED = "captured by this build"


@dataclass(frozen=True)
class Workload:
    """How much a build runs the UNet.

    Attributes:
        steps: denoising steps of calibration and check.
        calibration_pictures, check_pictures: trajectories, per task.
        search: layers are measured one by one, to choose those that stay float.
    """

    steps: int = 20
    calibration_pictures: int = 12
    check_pictures: int = 4
    search: bool = True


@dataclass(frozen=True)
class PlanOptions:
    """What to plan a build of; the attributes are those of ``BuildOptions``."""

    model: Path
    target: str = "cpu"
    precision: Precision = "int8"
    routing: RoutingChoice = "auto"
    tasks: tuple[str, ...] | None = None
    as_task: str | None = None
    size: tuple[int, int] | None = None
    memory: int | None = None
    build_memory: int | None = None
    cache: Path | None = None


@dataclass(frozen=True)
class BuildOptions:
    """What to build.

    Attributes:
        model: MTU pipeline folder, or a plain one with ``as_task``.
        output: bundle folder to write.
        target: name of a target (``mtu-compile targets``).
        precision: one of the target's.
        routing: an engine for each task, or one for all; ``"auto"`` does as the planner recommends.
        tasks: names of the tasks to build, or ``None`` for all.
        as_task: compile a plain diffusers pipeline as this one task (``mtu_compile.model.plain.AS_TASKS``).
        size: height and width of the pictures in pixels, or ``None`` for the model's own.
        data: folder with prompts and pictures to calibrate and check with, or ``None`` for the model's ``samples/``.
        calibration: folder of calibration sets (``mtu-compile calibrate``) to quantise with, or ``None`` to capture
            the inputs of the model on ``data``.
        quant_config: a bundle or a JSON file that says how each task is quantised, or ``None`` to find out.
        thresholds: file of thresholds to judge by, or ``None`` for the model's own.
        mixed: keep layers float where the device runs INT8 slower, or where accuracy needs it.
        passes: graph passes of the user's own (``FILE.py:function``, or an entry point's name), run in this order on
            each task's float graph (``passes.user``).
        sampler: of calibration, check, and the bundle's default; ``None`` for the model's own.
        steps: denoising steps of calibration, check, and the bundle's default.
        fit: what becomes of pictures of other proportions in calibration and check, and in the bundle unless its user
            says otherwise.
        calibration_pictures: trajectories calibrated with, per task.
        check_pictures: trajectories the bundle is checked with, per task.
        gate: what a task below its threshold does: ``"fail"`` raises, ``"warn"`` only records.
        memory: bytes the device has, or the machine whose memory it shares; asked of the target if not given.
        build_memory: bytes the build may use of this machine; all there are if not given.
        seed: of everything random.
        fetch_wheels: put the packages a board needs into its bundle, for boards without internet.
        force: replace an existing output.
        cache: folder where the results of steps are kept, or ``None`` to keep nothing.
        executor: where steps are run (``steps.executors.named``).
        step_cache: let fewer UNet steps be whole, with at most this interval between them; ``None``: all are whole.
        int8_decoder: quantise the VAE decoder, too.
    """

    model: Path
    output: Path
    target: str = "cpu"
    precision: Precision = "int8"
    routing: RoutingChoice = "auto"
    tasks: tuple[str, ...] | None = None
    as_task: str | None = None
    size: tuple[int, int] | None = None
    data: Path | None = None
    calibration: Path | None = None
    quant_config: Path | None = None
    thresholds: Path | None = None
    mixed: bool = True
    passes: tuple[str, ...] = ()
    sampler: str | None = None
    steps: int = Workload.steps
    fit: Fit = "crop"
    calibration_pictures: int = Workload.calibration_pictures
    check_pictures: int = Workload.check_pictures
    gate: Gate = "fail"
    memory: int | None = None
    build_memory: int | None = None
    seed: int = 0
    fetch_wheels: bool = True
    force: bool = False
    cache: Path | None = None
    executor: str = "auto"
    step_cache: StepCacheChoice | None = None
    int8_decoder: bool = False

    @property
    def workload(self) -> Workload:
        """How much the build runs the UNet."""
        search = self.mixed and self.quant_config is None
        return Workload(self.steps, self.calibration_pictures, self.check_pictures, search)


@dataclass(frozen=True)
class BuildResult:
    """Where the bundle is, what is in it, how accurate it is (``None`` where the gate is off), and its steps."""

    path: Path
    manifest: bundle.Manifest
    check: CheckResult | None
    steps: tuple[Ran, ...] = ()


@dataclass(frozen=True)
class Checkpoint:
    """A model on the disk.

    Attributes:
        folder: where it is.
        sha256: what it is (``core.hashing.model_sha256``).
        as_task: the task that a plain pipeline is taken as.
    """

    folder: Path = field(metadata=NOT_CONTENT)
    sha256: str
    as_task: str | None = None


@dataclass(frozen=True)
class Model:
    """A model in memory, and what is made of it.

    Steps have one with its weights. What runs the steps has one without, and is told only what there is.

    Attributes:
        checkpoint: where it was read from.
        pipeline: the float original.
        tasks: those asked for.
        size: height and width of the pictures in pixels.
    """

    checkpoint: Checkpoint
    pipeline: MTUPipeline
    tasks: tuple[Task, ...]
    size: tuple[int, int]

    def task_id(self, task: Task) -> int:
        """Index of a task among all that the model knows."""
        return find_task(self.pipeline.unet.tasks, task.name)[0]

    @property
    def latent_size(self) -> tuple[int, int]:
        """Height and width of the latent."""
        scale = self.pipeline.vae_scale
        return self.size[0] // scale, self.size[1] // scale

    def channels(self, task: Task) -> int:
        """Of the UNet's input: those of the latent and those of the task's condition."""
        latent = int(self.pipeline.unet.latent_channels)
        return latent + task.condition_channels(latent)

    @property
    def text_length(self) -> int:
        """Tokens of a prompt."""
        return int(self.pipeline.tokenizer.model_max_length)

    @property
    def most_channels(self) -> int:
        """Of the UNet's input: those of the task with the widest condition, built or not."""
        return int(self.pipeline.unet.sample_channels)


@dataclass(frozen=True)
class Rows:
    """Rows of a data folder for one task: those to calibrate with and those to check with."""

    calibrating: tuple[Sample, ...]
    checking: tuple[Sample, ...] = ()


@dataclass(frozen=True)
class Drawing:
    """How the float original makes its pictures for calibration and check.

    Attributes:
        steps: denoising steps.
        seed: of the first picture's noise.
        fit: what becomes of pictures of other proportions.
        sampler: instead of the model's own.
    """

    steps: int
    seed: int
    fit: Fit
    sampler: str | None = None


@dataclass(frozen=True)
class Specialised:
    """A float graph without a router: of one task, or of all with the task as an input.

    Attributes:
        name: the task's, or ``SHARED``.
        tasks: what it is for, by index in the model.
        channels: by task name, those of its ``sample`` that the task reads.
        width: all of them.
        graph: ONNX file; static, but for the batch of one that is for all tasks.
        passes: what the passes did to it.
        user_passes: what the user's own passes did to it.
    """

    name: str
    tasks: Mapping[int, Task]
    channels: Mapping[str, int]
    width: int
    graph: Path
    passes: tuple[bundle.PassRecord, ...]
    user_passes: tuple[bundle.UserPassRecord, ...] = ()

    @property
    def shared(self) -> bool:
        """Whether the task is an input."""
        return self.name == SHARED

    @property
    def label(self) -> str:
        """For people."""
        return "all tasks" if self.shared else self.name


@dataclass(frozen=True)
class Observed:
    """What the float original did on real inputs of one task.

    Attributes:
        calibration: file of UNet inputs (``calibration.sets``), or ``None`` where nothing is quantised.
        reference: file of the float reference.
    """

    calibration: Path | None
    reference: Path


@dataclass(frozen=True)
class QuantRecipe:
    """How a UNet is quantised.

    Attributes:
        settings: as given, or ``None`` for the compiler's own.
        config: name of the bundle or file that gave them.
        search: measure layers one by one, and keep float what should stay so.
    """

    settings: QuantSettings | None = None
    config: str | None = None
    search: bool = True


@dataclass(frozen=True)
class Lowered:
    """A UNet's graph in the precision asked for, as the target takes it.

    Attributes:
        graph: ONNX file.
        passes: what the lowering passes did to it.
        quantisation: by task, what was done to quantise it; nothing where it is not.
        compression: what was done to compress its weights, or ``None``.
    """

    graph: Path
    passes: tuple[bundle.PassRecord, ...]
    quantisation: Mapping[str, QuantisationRecord] = field(default_factory=dict)
    compression: CompressionRecord | None = None


@dataclass(frozen=True)
class Parts:
    """Text encoder and autoencoder as engines.

    Attributes:
        engines: of the family's text encoders, ``vae_encoder`` and ``vae_decoder``.
        ranges: by name, the float type of a part and how far its numbers go, where that type could be too small.
        decoder: how the VAE decoder was quantised; ``None`` where it is float.
    """

    engines: Mapping[str, Artifact]
    ranges: Mapping[str, tuple[Precision, HalfRange]]
    decoder: DecoderRecord | None = None


@dataclass(frozen=True)
class Cut:
    """A UNet's lowered graph, cut behind its deep part.

    Attributes:
        whole: with the deep feature as an output.
        shallow: with it as an input.
        passes: what cut them.
        share: multiply-adds of the shallow one, of the whole one's.
        shallow_bytes: of its weights.
    """

    whole: Path
    shallow: Path
    passes: tuple[bundle.PassRecord, ...]
    share: float
    shallow_bytes: int


@dataclass(frozen=True)
class Shallow:
    """The shallow part of a UNet as an engine; ``share``: its multiply-adds, of the whole one's."""

    artifact: Artifact
    share: float


@dataclass(frozen=True)
class BuiltUnet:
    """A UNet as an engine.

    Attributes:
        artifact: the engine.
        seconds: what building it took.
        ranges: by task, how far its numbers go, where float16 could be too small for them.
        parity: by task, the graph on every backend of this machine.
        shallow: its shallow part, where fewer steps are to be whole.
    """

    artifact: Artifact
    seconds: float
    ranges: Mapping[str, HalfRange]
    parity: Mapping[str, Parity]
    shallow: Shallow | None = None
