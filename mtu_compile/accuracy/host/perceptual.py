"""Metrics of pictures that need torch: visual information fidelity, and a CLIP model where the user has one."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mtu_compile.accuracy.formulas import unit_picture
from mtu_compile.accuracy.pictures import Perceptual
from mtu_compile.accuracy.task_metrics import ClipMetrics
from mtu_compile.core.errors import ConfigError, ModelError, first_line

#: Least side of a picture that has a VIF: four scales of a Gaussian window of 17 (torchmetrics 1.9).
VIF_SIDE = 41

#: ITU-R BT.601 luma: VIF is defined on grey pictures.
LUMA = (0.299, 0.587, 0.114)


def perceptual(clip: Path | None = None) -> Perceptual:
    """What this machine can measure.

    Args:
        clip: folder of a CLIP model in transformers' layout, or ``None`` to do without.

    Raises:
        ConfigError, ModelError: see ``ClipModel``.
    """
    measure = None if clip is None else ClipModel(clip)
    try:
        import torchmetrics  # noqa: F401
    except ImportError:
        return Perceptual(None, "not measured: torchmetrics is not installed here", measure)
    return Perceptual(vif, None, measure)


def vif(reference: NDArray[Any], candidate: NDArray[Any]) -> float | None:
    """Visual information fidelity of two pictures [H, W, 3], on their luma, in the pixel domain.

    Sheikh & Bovik, "Image information and visual quality", 2006: how much of the information an eye takes from the
    reference it still takes from the candidate. Equal pictures have 1, an unrelated one has about 0; it needs no
    weights. ``None`` for pictures smaller than ``VIF_SIDE``, or a reference without any information.
    """
    import torch
    from torchmetrics.functional.image import visual_information_fidelity

    if min(reference.shape[:2]) < VIF_SIDE:
        return None
    # The noise of the eye in torchmetrics is for values up to 255.
    want, have = (
        torch.from_numpy(255 * unit_picture(picture) @ np.array(LUMA))[None, None] for picture in (reference, candidate)
    )
    fidelity = float(visual_information_fidelity(have, want))
    return fidelity if math.isfinite(fidelity) else None


class ClipModel:
    """A CLIP model from a local folder: what pictures and prompts have in common (Radford et al., 2021).

    Weights are read from safetensors only, nothing is downloaded, and no code of the folder is run.

    Args:
        folder: in transformers' layout, with tokenizer and ``preprocessor_config.json``.

    Raises:
        ConfigError: not a folder.
        ModelError: it holds no CLIP model, or one whose weights are a pickle.
    """

    def __init__(self, folder: Path) -> None:
        from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

        if not folder.is_dir():
            raise ConfigError(
                f"CLIP model {str(folder)!r} is not a folder", hint="give a folder in transformers' layout"
            )
        local: dict[str, Any] = {"local_files_only": True}
        try:
            self._model = CLIPModel.from_pretrained(folder, use_safetensors=True, **local).eval()
            self._tokenizer = CLIPTokenizer.from_pretrained(folder, **local)
            # Without torchvision, which the other processor wants.
            self._processor = CLIPImageProcessorPil.from_pretrained(folder, **local)
        except Exception as error:  # transformers raises whatever the file it stumbles over makes it raise
            raise ModelError(
                f"{folder} is not a CLIP model that can be read: {first_line(error)}",
                hint="it needs config.json, model.safetensors, the tokenizer's files and preprocessor_config.json",
            ) from error

    def __call__(self, reference: Image.Image, candidate: Image.Image, prompt: str) -> ClipMetrics:
        """Cosines of the embeddings of the float original's picture, the candidate's, and the prompt."""
        import torch

        with torch.no_grad():
            want, have = self._pictures(reference, candidate)
            image = float(want @ have)
            if not prompt.strip():
                return ClipMetrics(image, None, None)
            text = self._text(prompt)
            return ClipMetrics(image, float(text @ have), float(text @ want))

    def _pictures(self, *pictures: Image.Image) -> Any:
        """[pictures, D], each of unit length."""
        import torch

        pixels = self._processor(images=list(pictures), return_tensors="pt")["pixel_values"]
        pooled = self._model.vision_model(pixel_values=pixels).pooler_output
        return torch.nn.functional.normalize(self._model.visual_projection(pooled), dim=-1)

    def _text(self, prompt: str) -> Any:
        """[D], of unit length."""
        import torch

        length = self._model.config.text_config.max_position_embeddings
        tokens = self._tokenizer([prompt], truncation=True, max_length=length, return_tensors="pt")
        pooled = self._model.text_model(**tokens).pooler_output
        return torch.nn.functional.normalize(self._model.text_projection(pooled), dim=-1)[0]
