"""Families of pipelines: which text encoders they have, and what else their UNets are told.

The one place that says it. Model folders, exports, manifests and the runtime read this table; a family that differs in
nothing but what the table says is an entry of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

FamilyName = Literal["sd", "sdxl"]

#: Inputs of a UNet beside sample, timestep and text, by the names diffusers and optimum-intel know them:
#: ``text_embeds`` [b, P], the pooled embedding of the prompt, and ``time_ids`` [b, 6], the picture's sizes
#: (``mtu_compile.core.sizes``).
TEXT_EMBEDS, TIME_IDS = "text_embeds", "time_ids"

#: Which of a text encoder's hidden states the UNet attends to: the last one behind its norm, or the input of the last
#: layer.
States = Literal["last", "penultimate"]


#: What text encoders are called, in pipelines, exports and errors.
TextEncoder = Literal["text_encoder", "text_encoder_2"]


@dataclass(frozen=True)
class TextBranch:
    """A text encoder of a family.

    Attributes:
        encoder: its folder in a pipeline, and its name wherever parts are named.
        tokenizer: the folder of the tokenizer it reads.
        kind: its class in transformers.
        states: what the UNet attends to; several branches' states are joined by width.
        pooled: its projected embedding of the whole prompt is the UNet's ``text_embeds``.
    """

    encoder: TextEncoder
    tokenizer: str
    kind: str
    states: States = "last"
    pooled: bool = False

    def outputs(self, layers: int) -> tuple[str, ...]:
        """Outputs of its graph, which optimum-intel's exporter and OpenVINO GenAI know by these names and places.

        Args:
            layers: of the encoder (``num_hidden_layers``).
        """
        first = ("text_embeds", "last_hidden_state") if self.pooled else ("last_hidden_state", "pooler_output")
        inner = () if self.states == "last" else tuple(f"hidden_states.{index}" for index in range(layers + 1))
        return (*first, *inner)

    def states_output(self, layers: int) -> str:
        """The one of ``outputs`` that the UNet attends to."""
        return "last_hidden_state" if self.states == "last" else f"hidden_states.{layers - 1}"

    @property
    def pooled_output(self) -> str | None:
        """The one of ``outputs`` that is the UNet's ``text_embeds``."""
        return "text_embeds" if self.pooled else None


@dataclass(frozen=True)
class Family:
    """What pipelines have in common.

    Attributes:
        name: in manifests.
        label: for people.
        texts: its text encoders, in the order in which their hidden states are joined.
        addition: ``addition_embed_type`` of its UNets.
        conditions: inputs its UNets have for that.
        experts: experts a block that the paper gives it (Chavhan et al., ICML 2025, section 4.1).
        upcasts_vae: diffusers computes its autoencoder in float32 beside networks in float16 where ``force_upcast``
            says so.
        pipelines: diffusers' pipeline by what its UNet is conditioned and guided by (``Anatomy``).
    """

    name: FamilyName
    label: str
    texts: tuple[TextBranch, ...]
    addition: str | None = None
    conditions: tuple[str, ...] = ()
    experts: int = 4
    upcasts_vae: bool = False
    pipelines: Mapping[str, str] = field(default_factory=dict)

    @property
    def components(self) -> frozenset[str]:
        """Folders of a pipeline that it cannot do without."""
        texts = (name for branch in self.texts for name in (branch.encoder, branch.tokenizer))
        return frozenset({"unet", "vae", "scheduler", *texts})


#: Anatomies of a UNet that pipelines of diffusers, OpenVINO GenAI and optimum-intel open: text to picture, the same
#: with the guidance scale as an input, and inpainting.
Anatomy = Literal["text", "embedded", "inpaint"]

FAMILIES: Mapping[FamilyName, Family] = {
    "sd": Family(
        "sd",
        "Stable Diffusion",
        (TextBranch("text_encoder", "tokenizer", "CLIPTextModel"),),
        pipelines={
            "text": "StableDiffusionPipeline",
            "embedded": "LatentConsistencyModelPipeline",
            "inpaint": "StableDiffusionInpaintPipeline",
        },
    ),
    # diffusers 0.42, StableDiffusionXLPipeline: encode_prompt, _get_add_time_ids, upcast_vae.
    "sdxl": Family(
        "sdxl",
        "SDXL",
        (
            TextBranch("text_encoder", "tokenizer", "CLIPTextModel", "penultimate"),
            TextBranch("text_encoder_2", "tokenizer_2", "CLIPTextModelWithProjection", "penultimate", pooled=True),
        ),
        addition="text_time",
        conditions=(TEXT_EMBEDS, TIME_IDS),
        experts=1,
        upcasts_vae=True,
        pipelines={
            "text": "StableDiffusionXLPipeline",
            "embedded": "StableDiffusionXLPipeline",
            "inpaint": "StableDiffusionXLInpaintPipeline",
        },
    ),
}


def family_of(components: Iterable[str]) -> Family:
    """The family of a pipeline with these components: the second text encoder tells."""
    return FAMILIES["sdxl" if "text_encoder_2" in set(components) else "sd"]
