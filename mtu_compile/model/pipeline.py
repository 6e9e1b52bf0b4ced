"""The multi-task pipeline in PyTorch: the float reference of every compiled bundle."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from mtu_compile.core.errors import ConfigError
from mtu_compile.core.families import TEXT_EMBEDS, TIME_IDS, Family, family_of
from mtu_compile.core.finite import require_finite_original
from mtu_compile.core.fit import Fit
from mtu_compile.core.guidance import ROWS, combine
from mtu_compile.core.noise import initial_noise
from mtu_compile.core.notices import Notice
from mtu_compile.core.seeds import check_seed
from mtu_compile.core.sizes import Sizes
from mtu_compile.core.tasks import MAX_SCALE, Task, find_task
from mtu_compile.model import encode
from mtu_compile.model.components import load_components
from mtu_compile.model.folder import (
    check_folder,
    make_portable,
    silent_libraries,
    zeros_for_empty_prompt,
)
from mtu_compile.model.inputs import read_source, unet_batch
from mtu_compile.model.plain import require_multi_task
from mtu_compile.model.sampler import SCHEDULER, save_scheduler, seeded_step, set_timesteps
from mtu_compile.model.text import Encoded, TextEncoders
from mtu_compile.model.unet import MTUUNet2DConditionModel, call_unet
from mtu_compile.runtime import guidance, images
from mtu_compile.runtime.masks import MaskMode
from mtu_compile.runtime.text import cut_by

#: Called after every UNet call with the static graph's inputs (``sample`` [b, 4+c, h, w], ``timestep`` [1],
#: ``encoder_hidden_states`` [b, L, D], ``text_embeds`` [b, P] and ``time_ids`` [b, 6] of SDXL, and ``timestep_cond``
#: [b, W] of a UNet that takes the guidance scale), its output [b, 4, h, w], and the timestep.
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

    How a task is conditioned and guided comes from the task's description alone (``mtu_compile.core.tasks.Task``), and
    what its UNet is told beside from its family (``mtu_compile.core.families``).

    Args:
        text_encoder_2, tokenizer_2: of families that have a second text encoder.
        force_zeros_for_empty_prompt: an empty negative prompt is all zeros to the UNet (SDXL).
    """

    model_cpu_offload_seq = "text_encoder->text_encoder_2->unet->vae"
    _optional_components: ClassVar[list[str]] = ["text_encoder_2", "tokenizer_2"]

    def __init__(
        self,
        unet: MTUUNet2DConditionModel,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        scheduler: SchedulerMixin,
        text_encoder_2: CLIPTextModelWithProjection | None = None,
        tokenizer_2: CLIPTokenizer | None = None,
        force_zeros_for_empty_prompt: bool = False,
    ) -> None:
        super().__init__()
        self.register_modules(
            unet=unet,
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            scheduler=scheduler,
            text_encoder_2=text_encoder_2,
            tokenizer_2=tokenizer_2,
        )
        self.register_to_config(force_zeros_for_empty_prompt=force_zeros_for_empty_prompt)
        self.set_progress_bar_config(disable=True)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        folder: str | Path,
        *,
        torch_dtype: torch.dtype = torch.float32,
        weights: bool = True,
        tried: bool = False,
        widened: bool = False,
        **components: Any,
    ) -> MTUPipeline:
        """Load an MTU pipeline folder.

        Only safetensors are read, only the classes of ``mtu_compile.model.folder.CLASSES`` are made, and nothing
        outside the folder is opened.

        Args:
            folder: a local folder.
            torch_dtype: of UNet, autoencoder and text encoder.
            weights: read them; without, the pipeline says what it is, and cannot be run.
            tried: as for ``check_folder``.
            widened: leave weights of half precision mapped from their files (``mtu_compile.model.widened``).
            components: ready-made components instead of the folder's.

        Raises:
            ModelError: naming what is missing, damaged or not multi-task.
        """
        folder = Path(folder)
        listed = check_folder(folder, tried=tried)
        if "unet" not in components:
            require_multi_task(folder)
        parts = load_components(folder, listed, components, dtype=torch_dtype, weights=weights, widened=widened)
        zeros = zeros_for_empty_prompt(folder, family_of(listed))
        return cls(**parts, force_zeros_for_empty_prompt=zeros)

    def save_pretrained(self, folder: str | Path, **options: Any) -> None:
        """Write a pipeline folder, weights as safetensors."""
        with silent_libraries():
            super().save_pretrained(folder, safe_serialization=True, **options)
        make_portable(Path(folder))
        save_scheduler(self.scheduler, Path(folder) / SCHEDULER)

    @property
    def family(self) -> Family:
        """What kind of pipeline it is."""
        return family_of(name for name in ("text_encoder", "text_encoder_2") if getattr(self, name) is not None)

    @property
    def texts(self) -> TextEncoders:
        """Its text encoders, as one."""
        branches = self.family.texts
        return TextEncoders(
            self.family,
            [getattr(self, branch.tokenizer) for branch in branches],
            [getattr(self, branch.encoder) for branch in branches],
            bool(self.config.force_zeros_for_empty_prompt),
        )

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
        original_size: tuple[int, int] | None = None,
        crops_coords_top_left: tuple[int, int] | None = None,
        target_size: tuple[int, int] | None = None,
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
            original_size, crops_coords_top_left, target_size: what a UNet of SDXL is told, see
                ``mtu_compile.core.sizes``.
            output_type: ``"latent"`` leaves the picture undecoded.
            paste_unmasked: for tasks with a mask, take the pixels outside the mask from ``image``.
            on_unet_call: sees every UNet call.

        Raises:
            ConfigError: an unknown task or seed, a missing picture or mask, a size the model cannot take, or sizes that
                its UNet is not told.
            ModelError: the decoded picture has NaN or Inf values.
        """
        task_id, spec = find_task(self.unet.tasks, task)
        for value in (guidance_scale, image_guidance_scale):
            if value is not None and not 0 <= value <= MAX_SCALE:
                raise ConfigError(f"a guidance scale of {value:g} is impossible", hint=f"take 0 to {MAX_SCALE}")
        spec = spec.at(guidance_scale, image_guidance_scale)
        seed = None if seed is None else check_seed(seed)
        height, width = self.resolve_size(height, width)
        sizes = Sizes(original_size, crops_coords_top_left, target_size)
        sizes.check()
        sizes.require_taken(self.family)
        pixels, mask, notices = read_source(
            spec, image, mask_image, (height, width), fit, mask_mode, scale=self.vae_scale, device=self.vae.device
        )
        condition = encode.condition_pieces(spec, self.vae, pixels, mask)
        for what, given in (("prompt", prompt), ("negative prompt", negative_prompt)):
            if given and (cut := cut_by(self.tokenizer, given)) is not None:
                notices += (cut.notice(what),)
        text = self._text(spec, prompt, negative_prompt)
        constant = {
            "encoder_hidden_states": text.states,
            **self._added(text, sizes, (height, width), spec.unet_batch),
            **self._embedded_scale(spec.guidance_scale, spec.unet_batch),
        }
        task_ids = torch.full((spec.unet_batch,), task_id, dtype=torch.int64, device=self.unet.device)
        scale, image_scale = spec.guidance_scale, spec.image_guidance_scale

        set_timesteps(self.scheduler, num_inference_steps, self.unet.device)
        x = self._noise(seed, generator, latents, height, width) * self.scheduler.init_noise_sigma
        step_options = self._step_options(generator)
        own_seed = seed if generator is None else None
        with self.progress_bar(total=len(self.scheduler.timesteps)) as bar:
            for call, t in enumerate(self.scheduler.timesteps):
                noisy = self.scheduler.scale_model_input(x, t)
                inputs = {
                    "sample": unet_batch(spec, noisy, condition).to(self.unet.dtype),
                    "timestep": t.reshape(1).to(torch.float32),
                    **constant,
                }
                output = call_unet(self.unet, inputs, task_ids=task_ids)
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

    def _text(self, task: Task, prompt: str, negative_prompt: str) -> Encoded:
        """Embeddings [b, …] in the order of the guidance batch."""
        texts, rows = self.texts, ROWS[task.guidance]
        full = texts.encode([prompt])
        empty = full if all(row.prompt for row in rows) else texts.encode_negative(negative_prompt)
        chosen = [full if row.prompt else empty for row in rows]
        pooled = [one.pooled for one in chosen if one.pooled is not None]
        states = torch.cat([one.states for one in chosen]).to(self.unet.dtype)
        return Encoded(states, torch.cat(pooled).to(self.unet.dtype) if pooled else None)

    def _added(self, text: Encoded, sizes: Sizes, size: tuple[int, int], samples: int) -> dict[str, Tensor]:
        """What the UNet of this family is told beside the text."""
        if text.pooled is None:
            return {}
        ids = torch.from_numpy(sizes.time_ids(size)).to(self.unet.device)  # the UNet makes float32 waves of them
        return {TEXT_EMBEDS: text.pooled, TIME_IDS: ids.repeat(samples, 1)}

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
