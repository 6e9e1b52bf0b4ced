"""A bundle of a few small files: whole, but its engines are none."""

from __future__ import annotations

from pathlib import Path

from mtu_compile import bundle
from mtu_compile.bundle import EngineRef, Manifest, Source, TaskEntry, TextPart
from mtu_compile.core.tasks import PAPER_TASKS

CONTENT = {
    "model_index.json": b"{}",
    "tokenizer/tokenizer.json": b"{}",
    "text_encoder/openvino_model.xml": b"<net/>",
    "text_encoder/openvino_model.bin": bytes(range(256)),
    "vae_decoder/openvino_model.xml": b"<net/>",
    "unet/openvino_model.xml": b"<net/>",
    "unet_edit/openvino_model.xml": b"",
    "unet_edit/openvino_model.bin": bytes(5000),
}


def describe() -> Manifest:
    """A manifest for ``CONTENT``."""

    def engine(folder: str) -> EngineRef:
        return EngineRef("openvino", f"{folder}/openvino_model.xml", {"INFERENCE_PRECISION_HINT": "bf16"})

    return Manifest(
        tools={"mtu-compile": "0.1.0"},
        source=Source("emoji", "0" * 64),
        target="cpu",
        precision="int8",
        image_size=(64, 96),
        latent_channels=4,
        vae_scale=8,
        scaling_factor=0.18215,
        text=TextPart("tokenizer/tokenizer.json", 77, 1, engine("text_encoder")),
        vae_encoder=None,
        vae_decoder=engine("vae_decoder"),
        scheduler={"_class_name": "DDIMScheduler"},
        tasks={
            "t2i": TaskEntry(PAPER_TASKS[0], 0, engine("unet"), 20, accuracy_reason="made by a test"),
            "edit": TaskEntry(PAPER_TASKS[1], 1, engine("unet_edit"), 20, accuracy_reason="made by a test"),
        },
    )


def write_small(folder: Path) -> Path:
    """Write the bundle; ``folder`` must not exist."""
    with bundle.staging(folder) as staged:
        for name, content in CONTENT.items():
            (staged / name).parent.mkdir(exist_ok=True)
            (staged / name).write_bytes(content)
        bundle.write(staged, describe())
    return folder
