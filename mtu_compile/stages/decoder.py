"""The VAE decoder in INT8, where that is asked for: quantised with what the float original denoised."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calibration.quant_settings import QuantSettings
from calibration.quantize import load_float, quantize_onnx
from calibration.sets import CalibrationSet
from mtu_compile.accuracy.formulas import picture_psnr_db
from mtu_compile.bundle.quantisation import DecoderRecord, QuantisationRecord
from mtu_compile.core.schema import conform
from mtu_compile.graph.sessions import open_as_written
from mtu_compile.runtime import images
from mtu_compile.runtime.reference import Reference
from mtu_compile.steps import Work, step

#: Name of the part.
DECODER = "vae_decoder"

#: Latents the decoder is quantised with, and latents of other pictures that it is tried on; spread over the tasks.
CALIBRATING, TRYING = 16, 8

#: What stays float, where a decoder has it: what comes first and last, and attention over all pixels of the latent,
#: which together are a hundredth of the products of Stable Diffusion's.
FLOAT = ("post_quant_conv/.*", "decoder.conv_in/.*", "decoder.conv_out/.*", "decoder.mid_block.attentions.*")


@dataclass(frozen=True)
class QuantisedDecoder:
    """A decoder's Q/DQ graph, and what is said of it."""

    graph: Path
    record: DecoderRecord


@step(tools=("nncf", "onnx", "onnx-ir", "onnxruntime", "numpy"), cpu=True)
def int8_decoder(
    work: Work, graph: Path, sets: tuple[Path, ...], references: tuple[Path, ...], scaling_factor: float
) -> QuantisedDecoder:
    """The decoder ``graph`` in INT8, and how far its pictures are from the float one's.

    Args:
        sets: calibration sets of all tasks, whose final latents it is quantised with.
        references: what the original made of other rows of all tasks, which it is tried on.
    """
    final = [loaded.latents for loaded in map(CalibrationSet.load, sets) if loaded.latents is not None]
    feeds = _feeds(final, CALIBRATING, scaling_factor)
    tried = [np.stack([one.latents for one in Reference.load(file).trajectories]) for file in references]
    out = work.folder / "int8.onnx"
    with work.progress.stage("quantise vae decoder", len(feeds)) as advance:
        report = quantize_onnx(graph, feeds, out, settings=_settings(graph), progress=lambda done, total: advance(1))
    trials = _feeds(tried, TRYING, scaling_factor)
    with work.progress.stage("try vae decoder", 2 * len(trials)) as advance:
        pictures: list[list[NDArray[Any]]] = []
        for path in (graph, out):
            session = open_as_written(path)
            pictures.append([])
            for feed in trials:
                pictures[-1].append(np.asarray(images.to_picture(session.run(None, feed)[0])))
                advance(1)
    ratios = [picture_psnr_db(*pair) for pair in zip(*pictures, strict=True)]
    record = DecoderRecord(conform(QuantisationRecord, report.to_json()), len(ratios), min(ratios), fmean(ratios))
    return QuantisedDecoder(out, record)


def _settings(graph: Path) -> QuantSettings:
    names = [node.name for node in load_float(graph).graph.node]
    present = tuple(scope for scope in FLOAT if any(re.fullmatch(scope, name) for name in names))
    return QuantSettings(smooth_quant_alpha=None, range_estimator="histogram", ignored_scopes=present)


def _feeds(latents: Sequence[NDArray[Any]], most: int, scaling_factor: float) -> list[dict[str, NDArray[Any]]]:
    """Inputs of the decoder, at most so many, of each group in turn; ``latents`` are [pictures, 1, C, h, w] each."""
    turns = [one for group in zip(*latents, strict=False) for one in group]
    return [{"latent_sample": (one / np.float32(scaling_factor)).astype(np.float32)} for one in turns[:most]]
