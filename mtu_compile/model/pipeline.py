"""The multi-task pipeline in PyTorch: the float reference of every compiled bundle."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import diffusers
import numpy as np
import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from mtu_compile.core.errors import ConfigError, ModelError
from mtu_compile.core.finite import require_finite_original
from mtu_compile.core.fit import Fit
from mtu_compile.core.guidance import ROWS, combine
from mtu_compile.core.noise import initial_noise
from mtu_compile.core.notices import Notice
from mtu_compile.core.seeds import check_seed
from mtu_compile.core.tasks import MAX_SCALE, Task, find_task
from mtu_compile.model import encode
from mtu_compile.model.autoencoder import fold_statistics
from mtu_compile.model.folder import check_folder, load_component, make_portable, silent_libraries
from mtu_compile.model.plain import SDXL, SDXL_HINT, require_multi_task
from mtu_compile.model.sampler import SCHEDULER, save_scheduler, seeded_step, set_timesteps
from mtu_compile.model.tokenizer import load_tokenizer
from mtu_compile.model.unet import MTUUNet2DConditionModel
from mtu_compile.runtime import guidance, images
from mtu_compile.runtime.masks import MaskMode, check_selection, read_mask
from mtu_compile.runtime.text import cut_by

#: Called after every UNet call with the static graph's inputs (``sample`` [b, 4+c, h, w], ``timestep`` [1],
#: ``encoder_hidden_states`` [b, L, D], and ``timestep_cond`` [b, W] of a UNet that takes the guidance scale), its
#: output [b, 4, h, w], and the timestep.
UNetHook = Callable[[dict[str, Tensor], Tensor, float], None]


@dataclass
class MTUPipelineOutput(BaseOutput):  # type: ignore[misc]
    """What a run gives back.

    Attributes:
        images: one PIL picture, or an array [1, H, W, 3] in [0, 1] (``output_type="np"``), or ``None`` for latents.
        latents: [1, C, h, w], float, after the last step.
        notices: what may not be as it was meant, see ``mtu_compile.runtime.pipeline.Result``.
    """

    images: list[Image.Image] | NDArray[np.float32] | None
    latents: Tensor
    notices: tuple[Notice, ...] = ()


class MTUPipeline(DiffusionPipeline):  # type: ignore[misc]
    """Text-to-image, editing, super-resolution, inpainting and any other task its UNet describes.

    How a task is conditioned and guided comes from the task's description alone (``mtu_compile.core.tasks.Task``).
    """

    model_cpu_offload_seq = "text_encoder->unet->vae"

    def __init__(
        self,
        unet: MTUUNet2DConditionModel,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        scheduler: SchedulerMixin,
    ) -> None:
        super().__init__()
        self.register_modules(unet=unet, vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, scheduler=scheduler)
        self.set_progress_bar_config(disable=True)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, folder: str | Path, *, torch_dtype: torch.dtype = torch.float32, **components: Any
    ) -> MTUPipeline:
        """Load an MTU pipeline folder.

        Only safetensors are read, only the classes of ``mtu_compile.model.folder.CLASSES`` are made, and nothing
        outside the folder is opened.

        Args:
            folder: a local folder.
            torch_dtype: of UNet, autoencoder and text encoder.
            components: ready-made components instead of the folder's.

        Raises:
            ModelError: naming what is missing, damaged or not multi-task.
        """
        folder = Path(folder)
        listed = check_folder(folder)
        if "unet" not in components:
            require_multi_task(folder)
        if "text_encoder_2" in listed:
            raise ModelError(SDXL.format(folder), hint=SDXL_HINT)
        loaders: dict[str, Callable[[], Any]] = {
            "unet": lambda: load_component(MTUUNet2DConditionModel, folder / "unet", dtype=torch_dtype),
            "vae": lambda: fold_statistics(load_component(AutoencoderKL, folder / "vae", dtype=torch_dtype)),
            "text_encoder": lambda: load_component(CLIPTextModel, folder / "text_encoder", dtype=torch_dtype),
            "tokenizer": lambda: load_tokenizer(folder / "tokenizer"),
            "scheduler": lambda: load_scheduler(listed["scheduler"][1], folder / "scheduler"),
        }
        return cls(**{name: components[name] if name in components else load() for name, load in loaders.items()})

    def save_pretrained(self, folder: str | Path, **options: Any) -> None:
        """Write a pipeline folder, weights as safetensors."""
        with silent_libraries():
            super().save_pretrained(folder, safe_serialization=True, **options)
        make_portable(Path(folder))
        save_scheduler(self.scheduler, Path(folder) / SCHEDULER)

    @property
    def vae_scale(self) -> int:
        """Picture pixels per latent pixel."""
        return int(2 ** (len(self.vae.config.block_out_channels) - 1))

    @property
    def default_size(self) -> tuple[int, int]:
        """Height and width, in pixels, of the pictures the UNet was made for; ``ConfigError`` if it does not say."""
        size = self.unet.config.sample_size
        if size is None:
            raise ConfigError("the UNet's config has no sample_size", hint="say which size with --size")
        height, width = size if isinstance(size, Sequence) else (size, size)
        return int(height) * self.vae_scale, int(width) * self.vae_scale

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def __call__(
        self,
        prompt: str = "",
        *,
        task: str,
        image: Image.Image | None = None,
        mask_image: Image.Image | None = None,
        negative_prompt: str = "",
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 20,
        guidance_scale: float | None = None,
        image_guidance_scale: float | None = None,
        seed: int | None = None,
        generator: torch.Generator | None = None,
        latents: Tensor | None = None,
        fit: Fit = "crop",
        mask_mode: MaskMode = "auto",
        output_type: Literal["pil", "np", "latent"] = "pil",
        paste_unmasked: bool = True,
        on_unet_call: UNetHook | None = None,
    ) -> MTUPipelineOutput:
        """Make one picture.

        Args:
            prompt: what to show, or the instruction of an edit.
            task: name of one of the UNet's tasks.
            image: source picture of tasks with an image condition; any size.
            mask_image: where to repaint, for tasks with a mask condition: see ``mask_mode``.
            negative_prompt: takes the place of the empty prompt in guidance.
            height, width: of the output in pixels; the UNet's own size by default.
            guidance_scale, image_guidance_scale: the task's own by default; at 1 or less there is no guidance.
            seed: of the initial noise and of what the scheduler draws (``core.noise``), as in the on-board runtime.
            generator: draws the initial noise instead, as elsewhere in diffusers.
            latents: [1, C, h, w], initial noise of unit variance instead of a drawn one.
            fit: what becomes of a picture of other proportions than the output's, see ``mtu_compile.runtime.fitting``.
            mask_mode: what of ``mask_image`` selects, see ``mtu_compile.runtime.masks``.
            output_type: ``"latent"`` leaves the picture undecoded.
            paste_unmasked: for tasks with a mask, take the pixels outside the mask from ``image``.
            on_unet_call: sees every UNet call.

        Raises:
            ConfigError: an unknown task or seed, a missing picture or mask, or a size the model cannot take.
            ModelError: the decoded picture has NaN or Inf values.
        """
        task_id, spec = find_task(self.unet.tasks, task)
        for value in (guidance_scale, image_guidance_scale):
            if value is not None and not 0 <= value <= MAX_SCALE:
                raise ConfigError(f"a guidance scale of {value:g} is impossible", hint=f"take 0 to {MAX_SCALE}")
        spec = spec.at(guidance_scale, image_guidance_scale)
        seed = None if seed is None else check_seed(seed)
        height, width = self.resolve_size(height, width)
        pixels, mask, notices = self._source(spec, image, mask_image, height, width, fit, mask_mode)
        condition = encode.condition_pieces(spec, self.vae, pixels, mask)
        for what, given in (("prompt", prompt), ("negative prompt", negative_prompt)):
            if given and (cut := cut_by(self.tokenizer, given)) is not None:
                notices += (cut.notice(what),)
        text = self._text(spec, prompt, negative_prompt)
        task_ids = torch.full((spec.unet_batch,), task_id, dtype=torch.int64, device=self.unet.device)
        scale, image_scale = spec.guidance_scale, spec.image_guidance_scale

        set_timesteps(self.scheduler, num_inference_steps, self.unet.device)
        x = self._noise(seed, generator, latents, height, width) * self.scheduler.init_noise_sigma
        step_options = self._step_options(generator)
        own_seed = seed if generator is None else None
        constant = {"encoder_hidden_states": text, **self._embedded_scale(scale, spec.unet_batch)}
        with self.progress_bar(total=len(self.scheduler.timesteps)) as bar:
            for call, t in enumerate(self.scheduler.timesteps):
                noisy = self.scheduler.scale_model_input(x, t)
                inputs = {
                    "sample": _unet_batch(spec, noisy, condition).to(self.unet.dtype),
                    "timestep": t.reshape(1).to(torch.float32),
                    **constant,
                }
                output = self.unet(**inputs, task_ids=task_ids).sample
                if on_unet_call is not None:
                    on_unet_call(inputs, output, float(t))
                guided = combine(spec.guidance, output.to(x.dtype).split(1), scale, image_scale)
                with seeded_step(own_seed, call):
                    x = self.scheduler.step(guided, t, x, **step_options).prev_sample
                bar.update()
        if output_type == "latent":
            return MTUPipelineOutput(images=None, latents=x, notices=notices)
        decoded = self.vae.decode(x.to(self.vae.dtype) / self.vae.config.scaling_factor).sample
        require_finite_original(decoded.float().cpu().numpy(), "the VAE decoder")
        if mask is not None and pixels is not None and paste_unmasked:
            keep = mask.to(decoded)
            decoded = decoded * keep + pixels.to(decoded) * (1 - keep)
        if output_type == "pil":
            made = [images.to_picture(decoded.float().cpu().numpy())]
            return MTUPipelineOutput(images=made, latents=x, notices=notices)
        array = (decoded.float() / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).cpu().numpy()
        return MTUPipelineOutput(images=array, latents=x, notices=notices)

    def resolve_size(self, height: int | None = None, width: int | None = None) -> tuple[int, int]:
        """Height and width in pixels, the UNet's own where not given; ``ConfigError`` for a size it cannot make."""
        if height is None or width is None:
            default = self.default_size
            height, width = height or default[0], width or default[1]
        # Every down block but the last halves the latent.
        unit = self.vae_scale * 2 ** (len(self.unet.config.block_out_channels) - 1)
        if height % unit or width % unit or height < unit or width < unit:
            raise ConfigError(
                f"{width}x{height} is not a size this model can make", hint=f"use multiples of {unit} pixels"
            )
        return height, width

    def _source(
        self,
        task: Task,
        image: Image.Image | None,
        mask: Image.Image | None,
        height: int,
        width: int,
        fit: Fit,
        mask_mode: MaskMode,
    ) -> tuple[Tensor | None, Tensor | None, tuple[Notice, ...]]:
        needs_image = {"image", "masked_image"} & set(task.condition)
        if needs_image and image is None:
            raise ConfigError(f"task {task.name!r} needs a source picture", hint="pass image")
        if "mask" in task.condition and mask is None:
            raise ConfigError(f"task {task.name!r} needs a mask", hint="pass mask_image, white where to repaint")
        pixels = grey = None
        notices: tuple[Notice, ...] = ()
        if needs_image:
            assert image is not None
            pixels = encode.to_pixels(image, height, width, fit).to(self.vae.device)
        if {"mask", "masked_image"} & set(task.condition):
            if mask is None:
                raise ConfigError(f"task {task.name!r} needs a mask", hint="pass mask_image, white where to repaint")
            selected, notices = read_mask(mask, mask_mode)
            over = None if image is None else image.size
            grey = encode.to_mask(selected, height, width, fit, over=over)
            at_latent = encode.latent_mask(grey, height // self.vae_scale, width // self.vae_scale)
            notices += check_selection(grey[0, 0].numpy(), at_latent[0, 0].numpy())
            grey = grey.to(self.vae.device)
        return pixels, grey, notices

    def _text(self, task: Task, prompt: str, negative_prompt: str) -> Tensor:
        """Embeddings [b, L, D] in the order of the guidance batch."""
        empty, full = encode.encode_prompts(self.tokenizer, self.text_encoder, [negative_prompt, prompt])
        return torch.stack([full if row.prompt else empty for row in ROWS[task.guidance]]).to(self.unet.dtype)

    def _embedded_scale(self, scale: float, samples: int) -> dict[str, Tensor]:
        """The guidance scale as an input, for a UNet that takes it."""
        if (width := self.unet.config.time_cond_proj_dim) is None:
            return {}
        embedded = torch.from_numpy(guidance.embed_scale(scale, int(width), samples))
        return {guidance.SCALE_INPUT: embedded.to(self.unet.device, self.unet.dtype)}

    def _noise(
        self, seed: int | None, generator: torch.Generator | None, latents: Tensor | None, height: int, width: int
    ) -> Tensor:
        # Schedulers add many small steps up: half precision is for the networks only.
        dtype = torch.promote_types(self.unet.dtype, torch.float32)
        shape = (1, self.unet.latent_channels, height // self.vae_scale, width // self.vae_scale)
        if latents is not None:
            if tuple(latents.shape) != shape:
                raise ConfigError(f"latents have shape {tuple(latents.shape)} instead of {shape}")
            noise = latents
        elif generator is not None:
            noise = torch.randn(shape, generator=generator, device=generator.device)
        else:
            noise = torch.from_numpy(initial_noise(seed, shape))
        return noise.to(self.unet.device, dtype)

    def _step_options(self, generator: torch.Generator | None) -> dict[str, Any]:
        """A generator for the schedulers that draw noise at every step."""
        takes = "generator" in inspect.signature(self.scheduler.step).parameters
        return {"generator": generator} if takes else {}


def _unet_batch(task: Task, noisy: Tensor, condition: Tensor | None) -> Tensor:
    """The noisy latent [1, 4, h, w] with its condition, once for each part of the guidance: [b, 4+c, h, w]."""
    batch = noisy.expand(task.unet_batch, -1, -1, -1)
    if condition is None:
        return batch.contiguous()
    given, none = condition.to(noisy), torch.zeros_like(condition).to(noisy)
    conditions = torch.cat([given if row.condition else none for row in ROWS[task.guidance]])
    return torch.cat([batch, conditions], dim=1)


def load_scheduler(name: str, folder: Path) -> Any:
    """The scheduler of diffusers called ``name`` with the configuration in ``folder``."""
    cls = getattr(diffusers, name, None)
    if not (isinstance(cls, type) and issubclass(cls, SchedulerMixin)):
        raise ModelError(f"{name!r} is not a scheduler of diffusers {diffusers.__version__}")
    try:
        return cls.from_pretrained(folder, local_files_only=True)  # type: ignore[attr-defined]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ModelError(f"{folder} cannot be loaded: {error}", hint="fetch the model again") from error
