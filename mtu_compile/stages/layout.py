"""The folder layout of diffusers exports, which other tools read, as OpenVINO GenAI does (docs/interop.md)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mtu_compile.core.families import Family
from mtu_compile.core.routing import Routing
from mtu_compile.core.tasks import Task
from mtu_compile.model.unet_config import MTU_KEYS

if TYPE_CHECKING:
    from mtu_compile.model.pipeline import MTUPipeline

#: ``model_index.json`` as optimum-intel's exporter leaves it: the classes of diffusers, which is what OpenVINO GenAI
#: looks for; both tools find ``vae_encoder`` and ``vae_decoder`` by ``vae``.
MODEL_INDEX = {
    "feature_extractor": [None, None],
    "image_encoder": [None, None],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}

#: Condition of diffusers' own inpainting models, in its order.
INPAINTING = ("mask", "masked_image")


def unet_folders(tasks: Sequence[Task], routing: Routing = "static") -> Mapping[str, str]:
    """Folder of each task's UNet by task name; the same for all where it is shared.

    ``unet``, the one that pipelines of diffusers' kind open by themselves, is the first text-to-image task's; without
    one, that of the first inpainting task of diffusers' anatomy.
    """
    if routing == "shared":
        return dict.fromkeys((task.name for task in tasks), f"unet_{routing}")
    plain = [task for task in tasks if task.guidance in ("text", "embedded") and not task.condition]
    chosen = next(iter(plain or [task for task in tasks if task.condition == INPAINTING]), None)
    return {task.name: "unet" if task is chosen else f"unet_{task.name}" for task in tasks}


def pipeline_class(task: Task, family: Family) -> str | None:
    """The pipeline of diffusers whose UNet has the anatomy of ``task``'s; ``None`` if there is none in both tools."""
    if task.condition == INPAINTING:
        return family.pipelines["inpaint"]
    if task.condition or task.guidance not in ("text", "embedded"):
        return None
    return family.pipelines[task.guidance]


def model_index(name: str, family: Family, scheduler: str, *, zeros_for_empty: bool) -> dict[str, Any]:
    """``model_index.json``.

    Args:
        name: class of the pipeline.
        family: of the pipeline.
        scheduler: its class.
        zeros_for_empty: an empty negative prompt is all zeros, in families that have that.
    """
    index: dict[str, Any] = {"_class_name": name, **MODEL_INDEX, "scheduler": ["diffusers", scheduler]}
    for branch in family.texts:
        index |= {
            branch.encoder: ["transformers", branch.kind],
            branch.tokenizer: ["transformers", "CLIPTokenizer"],
        }
    if family.conditions:
        return {**index, "force_zeros_for_empty_prompt": zeros_for_empty}
    return {**index, "requires_safety_checker": False, "safety_checker": [None, None]}


@dataclass(frozen=True)
class Layout:
    """What the other tools want to know of the float model, and all that is kept of it.

    Attributes:
        index: ``model_index.json``; ``None`` where no other tool's pipeline can run the UNet, which has an input
            ``task``.
        configs: ``config.json`` by folder.
    """

    index: Mapping[str, Any] | None
    configs: Mapping[str, Mapping[str, Any]]

    @classmethod
    def of(cls, pipeline: MTUPipeline, tasks: Sequence[Task] | None = None, routing: Routing = "static") -> Layout:
        """The layout of a bundle with ``tasks`` of ``pipeline``, all by default."""
        built = tuple(pipeline.unet.tasks) if tasks is None else tuple(tasks)
        latent = int(pipeline.unet.latent_channels)
        unet = {key: value for key, value in pipeline.unet.config.items() if key not in MTU_KEYS}
        configs: dict[str, dict[str, Any]] = {
            **{branch.encoder: encoder.config.to_dict() for branch, encoder in pipeline.texts.branches()},
            "vae_encoder": dict(pipeline.vae.config),
            "vae_decoder": dict(pipeline.vae.config),
        }
        folders = unet_folders(built, routing)
        for task in built:
            wide = routing == "shared"
            channels = int(pipeline.unet.sample_channels) if wide else latent + task.condition_channels(latent)
            configs[folders[task.name]] = {**unet, "in_channels": channels, "_class_name": "UNet2DConditionModel"}
        # "_name_or_path" is where the model lay on the machine it was built on.
        tidy = {name: {k: v for k, v in one.items() if k != "_name_or_path"} for name, one in configs.items()}
        if routing == "shared":
            return cls(None, tidy)
        opened = next((task for task in built if folders[task.name] == "unet"), None)
        family, zeros = pipeline.family, pipeline.texts.zeros_for_empty
        name = (None if opened is None else pipeline_class(opened, family)) or family.pipelines["text"]
        return cls(model_index(name, family, type(pipeline.scheduler).__name__, zeros_for_empty=zeros), tidy)
