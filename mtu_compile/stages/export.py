"""The float model as ONNX: the UNet with the task as an input, and the other networks for one sample."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import passes
from mtu_compile.stages.job import Checkpoint, Model
from mtu_compile.stages.opened import open_pipeline
from mtu_compile.steps import Steps, Work, step

#: What exports.
TOOLS = ("torch", "diffusers", "transformers", "onnx", "onnx-ir", "onnxscript")


def export(steps: Steps, model: Model) -> tuple[Path, Mapping[str, Path]]:
    """The UNet with free sizes and the task as an input, and by name the other networks for one sample."""
    return steps.run_both(
        exported_unet.of("export the UNet", model.checkpoint),
        exported_parts.of("export the other networks", model.checkpoint, model.size),
    )


@step(tools=TOOLS, one_core=True)
def exported_unet(work: Work, checkpoint: Checkpoint) -> Path:
    """``export_unet`` of a checkpoint."""
    with work.progress.stage("export the UNet"):
        return export_unet(_model(checkpoint), work.folder)


@step(tools=TOOLS, one_core=True)
def exported_parts(work: Work, checkpoint: Checkpoint, size: tuple[int, int]) -> Mapping[str, Path]:
    """``export_parts`` of a checkpoint, for pictures of ``size``."""
    with work.progress.stage("export the other networks"):
        return export_parts(_model(checkpoint, size), work.folder)


def _model(checkpoint: Checkpoint, size: tuple[int, int] = (0, 0)) -> Model:
    return Model(checkpoint, open_pipeline(checkpoint), (), size)


def export_unet(model: Model, work: Path) -> Path:
    """The UNet with free sizes and the task as an input, in a folder of ``work``."""
    from mtu_compile.model import export

    return export.export_unet(model.pipeline.unet, work / "dynamic", text_length=model.text_length)


def export_parts(model: Model, work: Path) -> dict[str, Path]:
    """The text encoders, ``vae_encoder`` and ``vae_decoder``, each in a folder of ``work``, of static shapes."""
    from mtu_compile.model import export

    pipeline = model.pipeline
    graphs: dict[str, Path] = {
        branch.encoder: export.export_text_encoder(encoder, work / branch.encoder, model.text_length, branch)
        for branch, encoder in pipeline.texts.branches()
    }
    graphs |= {
        "vae_encoder": export.export_vae_encoder(pipeline.vae, work / "vae_encoder", *model.size),
        "vae_decoder": export.export_vae_decoder(pipeline.vae, work / "vae_decoder", *model.size),
    }
    return {name: _freeze(graph) for name, graph in graphs.items()}


def _freeze(graph: Path) -> Path:
    """The graph for one sample; the runtime repeats it where it has more (prompts)."""
    frozen = graph.with_name(f"{graph.stem}-static.onnx")
    # In the folder of the exported one, whose weights it shares where they lie beside it.
    passes.run_pipeline(graph, frozen, passes.STATIC_PIPELINE, passes.PassContext(batch=1), reuse=True)
    return frozen
