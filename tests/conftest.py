"""Tiny models of every supported anatomy, and what every test shares: each is made once a run, for all workers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from tests.shared_exports import shared_export

MadeOnce = Callable[[str, Callable[[Path], object]], Path]


@pytest.fixture(scope="session")
def run_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of this test run, the same one for every worker of pytest-xdist."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if hasattr(request.config, "workerinput") else base) / "shared"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def made_once(run_folder: Path) -> MadeOnce:
    """``made_once(name, make)``: the folder of that name, which ``make(folder)`` fills for the first who asks in a run.

    The folder is everybody's: copy it to change it.
    """

    def get(name: str, make: Callable[[Path], object]) -> Path:
        folder = run_folder / name
        with FileLock(f"{folder}.lock"):
            if not folder.exists():
                partial = run_folder / f"{name}.partial"
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir()
                make(partial)
                partial.rename(folder)
        return folder

    return get


@pytest.fixture(scope="module")
def shared_exports(run_folder: Path) -> Iterator[Path]:
    """For a module's tests: what was exported once in a run is not exported again; see ``tests.shared_exports``."""
    from mtu_compile.model import export

    folder = run_folder / "exports"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "_export", shared_export(folder))
        yield folder


TINY: dict[str, dict[str, Any]] = {
    "sd15": {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": 32,
        "attention_head_dim": 4,
    },
    "sd2": {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": 32,
        "attention_head_dim": (4, 8),
        "use_linear_projection": True,
    },
    "sdxl": {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": 32,
        "attention_head_dim": (4, 8),
        "transformer_layers_per_block": (1, 2),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 80,
    },
}


def make_unet(kind: str, seed: int = 0) -> Any:
    """A random ``UNet2DConditionModel`` of the given anatomy: 8×8 latents, widths 32 and 64."""
    import torch
    from diffusers import UNet2DConditionModel

    torch.manual_seed(seed)
    common = {"sample_size": 8, "block_out_channels": (32, 64), "layers_per_block": 1, "norm_num_groups": 8}
    return UNet2DConditionModel(**common, **TINY[kind]).eval()


@pytest.fixture(scope="session")
def one_level_unet() -> Any:
    """Factory: ``one_level_unet()``, the smallest random UNet with attention: 8×8 latents, a single level of 32."""
    import torch
    from diffusers import UNet2DConditionModel

    def make() -> Any:
        torch.manual_seed(0)
        return UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(32,),
            layers_per_block=1,
            norm_num_groups=8,
            down_block_types=("CrossAttnDownBlock2D",),
            up_block_types=("CrossAttnUpBlock2D",),
            mid_block_type=None,
            cross_attention_dim=32,
            attention_head_dim=4,
        ).eval()

    return make


def make_mtu(kind: str = "sd15", *, tasks: Any = None, seed: int = 0, **options: Any) -> Any:
    """A tiny multi-task UNet whose experts, routers, norms and input convolutions really differ between tasks."""
    import torch

    from mtu_compile.core.tasks import PAPER_TASKS
    from mtu_compile.model.upcycle import upcycle_unet

    options = {"num_experts": 4, "d_task": 16, "router_width": 16, **options}
    unet = upcycle_unet(make_unet(kind, seed), tasks or PAPER_TASKS, **options).eval()
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if any(part in name for part in (".ff.", "task_conv_in", "task_embedding")):
                scale = 1.0 if ".router." in name else 0.1
                parameter += scale * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return unet


@pytest.fixture(scope="session")
def tiny_unet() -> Any:
    """Factory: ``tiny_unet("sd15" | "sd2" | "sdxl")``."""
    return make_unet


@pytest.fixture(scope="session")
def tiny_mtu() -> Any:
    """Factory: ``tiny_mtu(kind, num_experts=…, norm_per_expert=…, top_k=…)``."""
    return make_mtu


def save_base_pipeline(folder: Path, kind: str = "sd15") -> Path:
    """A tiny Stable Diffusion pipeline folder: 32×32 pictures, 8×8 latents, 16 tokens."""
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    unet = make_unet(kind)
    torch.manual_seed(2)
    vae = AutoencoderKL(
        block_out_channels=(16, 16, 32),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=32,
        mid_block_add_attention=False,
    )
    characters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    vocabulary = [*characters, *(c + "</w>" for c in characters), "<|startoftext|>", "<|endoftext|>"]
    words = folder / "words"
    words.mkdir(parents=True)
    (words / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocabulary)}))
    (words / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer.from_pretrained(words, model_max_length=16)
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(vocabulary),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=16,
            bos_token_id=len(vocabulary) - 2,
            eos_token_id=len(vocabulary) - 1,
            pad_token_id=len(vocabulary) - 1,
        )
    ).eval()
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        timestep_spacing="trailing",
    )
    parts = {"unet": unet, "vae": vae, "text_encoder": text_encoder, "tokenizer": tokenizer, "scheduler": scheduler}
    for name, part in parts.items():
        part.save_pretrained(folder / name)
    for leftover in words.iterdir():
        leftover.unlink()
    words.rmdir()
    index = {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": "0.42.0",
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "scheduler": ["diffusers", "DDIMScheduler"],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2))
    return folder


@pytest.fixture(scope="session")
def base_pipeline_dir(made_once: MadeOnce) -> Path:
    """A tiny pretrained text-to-image pipeline folder (random weights)."""
    return made_once("base", lambda folder: save_base_pipeline(folder / "pipeline")) / "pipeline"


@pytest.fixture(scope="session")
def mtu_pipeline_dir(base_pipeline_dir: Path, made_once: MadeOnce) -> Path:
    """``base_pipeline_dir`` upcycled for the paper's four tasks, with four untrained experts; copy it to change it."""
    from mtu_compile.core.tasks import PAPER_TASKS
    from mtu_compile.model.upcycle import upcycle_folder

    def make(folder: Path) -> None:
        upcycle_folder(base_pipeline_dir, folder / "pipeline", PAPER_TASKS, num_experts=4, d_task=16, router_width=16)

    return made_once("mtu", make) / "pipeline"


@pytest.fixture(scope="session")
def sdxl_pipeline_dir(made_once: MadeOnce) -> Path:
    """A tiny SDXL pipeline folder as it is published (random weights); copy it to change it."""
    from tests.tiny_sdxl import save_sdxl_pipeline

    return made_once("sdxl-base", lambda folder: save_sdxl_pipeline(folder / "pipeline")) / "pipeline"


@pytest.fixture(scope="session")
def sdxl_mtu_dir(sdxl_pipeline_dir: Path, made_once: MadeOnce) -> Path:
    """``sdxl_pipeline_dir`` upcycled for the paper's four tasks, with the paper's one expert, untrained."""
    from mtu_compile.core.tasks import PAPER_TASKS
    from mtu_compile.model.upcycle import upcycle_folder

    def make(folder: Path) -> None:
        upcycle_folder(sdxl_pipeline_dir, folder / "pipeline", PAPER_TASKS, d_task=16, router_width=16)

    return made_once("sdxl-mtu", make) / "pipeline"
