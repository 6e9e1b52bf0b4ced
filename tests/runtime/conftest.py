"""A tiny bundle with real OpenVINO engines for the four tasks: 32×32 pictures, 8×8 latents, 16 tokens."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from mtu_compile import bundle
from mtu_compile.bundle import EngineRef, Manifest, Source, TaskEntry, TextPart
from mtu_compile.core.tasks import PAPER_TASKS, Task

F32 = {"INFERENCE_PRECISION_HINT": "f32"}
SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
}


@dataclass(frozen=True)
class TorchParts:
    """The torch modules a bundle's engines were converted from."""

    text_encoder: Any
    tokenizer: Any
    vae: Any
    unets: dict[str, Any]


def make_unet(task: Task, seed: int) -> Any:
    """A small network that depends on every element of every input, at every sample's own values."""
    import torch
    from torch import nn

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv_in = nn.Conv2d(4 + task.condition_channels(4), 16, 3, padding=1)
            self.time = nn.Linear(1, 16)
            self.text = nn.Linear(32, 16)
            self.conv_out = nn.Conv2d(16, 4, 3, padding=1)

        def forward(self, sample: Any, timestep: Any, encoder_hidden_states: Any) -> Any:
            hidden = self.conv_in(sample)
            hidden = hidden + self.time(timestep[:, None] / 1000)[:, :, None, None]
            hidden = hidden + self.text(encoder_hidden_states).tanh().mean(1)[:, :, None, None]
            return self.conv_out(torch.tanh(hidden))

    torch.manual_seed(seed)
    return Net().eval()


def save_engine(module: Any, example: dict[str, Any], outputs: tuple[str, ...], folder: Path) -> None:
    """Convert a torch module to a static OpenVINO model with named inputs and outputs."""
    import openvino
    import torch

    folder.mkdir(parents=True)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        model = openvino.convert_model(module, example_input=tuple(example.values()))
    model.reshape({port: tuple(value.shape) for port, value in zip(model.inputs, example.values(), strict=True)})
    for port, name in zip(model.inputs, example, strict=True):
        port.set_names({name})
    for port, name in zip(model.outputs, outputs, strict=True):
        port.set_names({name})
    openvino.save_model(model, folder / "openvino_model.xml", compress_to_fp16=False)


@pytest.fixture(scope="session")
def tiny_bundle(base_pipeline_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TorchParts]:
    """A verified bundle folder, and the torch modules to compare it with. Do not write into it: copy it."""
    import torch
    from diffusers import AutoencoderKL
    from torch import nn
    from transformers import CLIPTextModel, CLIPTokenizer

    text_encoder = CLIPTextModel.from_pretrained(base_pipeline_dir / "text_encoder", attn_implementation="eager").eval()
    tokenizer = CLIPTokenizer.from_pretrained(base_pipeline_dir / "tokenizer")
    vae = AutoencoderKL.from_pretrained(base_pipeline_dir / "vae").eval()
    unets = {task.name: make_unet(task, seed) for seed, task in enumerate(PAPER_TASKS)}

    class Text(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = text_encoder

        def forward(self, input_ids: Any) -> Any:
            output = self.model(input_ids=input_ids)
            return output.last_hidden_state, output.pooler_output

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = vae

        def forward(self, sample: Any) -> Any:
            return self.model.encode(sample).latent_dist.parameters

    class Decoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = vae

        def forward(self, latent_sample: Any) -> Any:
            return self.model.decode(latent_sample).sample

    root = tmp_path_factory.mktemp("bundles") / "tiny"
    with bundle.staging(root) as folder:
        ids = torch.full((2, 16), 53, dtype=torch.int64)
        save_engine(Text(), {"input_ids": ids}, ("last_hidden_state", "pooler_output"), folder / "text_encoder")
        save_engine(Encoder(), {"sample": torch.rand(1, 3, 32, 32)}, ("latent_parameters",), folder / "vae_encoder")
        save_engine(Decoder(), {"latent_sample": torch.rand(1, 4, 8, 8)}, ("sample",), folder / "vae_decoder")
        for task in PAPER_TASKS:
            batch = task.unet_batch
            example = {
                "sample": torch.rand(batch, 4 + task.condition_channels(4), 8, 8),
                "timestep": torch.ones(1),
                "encoder_hidden_states": torch.rand(batch, 16, 32),
            }
            save_engine(unets[task.name], example, ("out_sample",), folder / unet_folder(task.name))
        shutil.copytree(base_pipeline_dir / "tokenizer", folder / "tokenizer")
        bundle.write(folder, make_manifest(vae.config.scaling_factor))
    return root, TorchParts(text_encoder, tokenizer, vae, unets)


def save_shared(unets: dict[str, Any], folder: Path) -> None:
    """One network for all tasks, which answers each sample as the network of its task does."""
    import torch
    from torch import nn

    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.nets = nn.ModuleList(unets.values())

        def forward(self, sample: Any, timestep: Any, encoder_hidden_states: Any, task: Any) -> Any:
            answers = [net(sample[:, : net.conv_in.in_channels], timestep, encoder_hidden_states) for net in self.nets]
            chosen = torch.eye(len(self.nets))[task].T[:, :, None, None, None]
            return (torch.stack(answers) * chosen).sum(0)

    example = {
        "sample": torch.rand(3, 9, 8, 8),
        "timestep": torch.ones(1),
        "encoder_hidden_states": torch.rand(3, 16, 32),
        "task": torch.tensor([0, 1, 3]),
    }
    save_engine(Shared().eval(), example, ("out_sample",), folder)


@pytest.fixture(scope="session")
def make_shared(tiny_bundle: tuple[Path, TorchParts], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``make_shared(batch)``: ``tiny_bundle`` with one UNet for all, of that batch or any; copy it to change it."""
    import openvino

    source, parts = tiny_bundle
    places = tmp_path_factory.mktemp("shared")
    save_shared(parts.unets, places / "unet")

    def make(root: Path, batch: int) -> Path:
        folders = [unet_folder(task.name) for task in PAPER_TASKS]
        shutil.copytree(source, root, ignore=shutil.ignore_patterns(*folders))
        model = openvino.Core().read_model(places / "unet" / "openvino_model.xml")
        shapes = {port.any_name: list(port.shape) for port in model.inputs}
        model.reshape({name: shape if name == "timestep" else [batch, *shape[1:]] for name, shape in shapes.items()})
        (root / "unet").mkdir()
        openvino.save_model(model, root / "unet" / "openvino_model.xml", compress_to_fp16=False)
        manifest = bundle.read(source)
        ref = manifest.tasks["t2i"].engine
        tasks = {name: replace(entry, engine=ref) for name, entry in manifest.tasks.items()}
        bundle.write(root, replace(manifest, routing="shared", tasks=tasks))
        return root

    made: dict[int, Path] = {}

    def get(batch: int = -1) -> Path:
        if batch not in made:
            made[batch] = make(places / str(batch), batch)
        return made[batch]

    return get


def unet_folder(task: str) -> str:
    return "unet" if task == "t2i" else f"unet_{task}"


def make_manifest(scaling_factor: float) -> Manifest:
    def engine(folder: str) -> EngineRef:
        return EngineRef("openvino", f"{folder}/openvino_model.xml", F32)

    return Manifest(
        tools={},
        source=Source("tiny", "0" * 64),
        target="cpu",
        precision="fp32",
        image_size=(32, 32),
        latent_channels=4,
        vae_scale=4,
        scaling_factor=scaling_factor,
        text=TextPart("tokenizer/tokenizer.json", 16, 53, engine("text_encoder")),
        vae_encoder=engine("vae_encoder"),
        vae_decoder=engine("vae_decoder"),
        scheduler=SCHEDULER,
        tasks={
            task.name: TaskEntry(task, i, engine(unet_folder(task.name)), 5, accuracy_reason="built by a test")
            for i, task in enumerate(PAPER_TASKS)
        },
    )
