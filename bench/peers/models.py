"""The models that are compiled: a multi-task network for us, a pretrained pipeline of the same size for the others."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from mtu_compile.model.folder import INDEX

EXAMPLE = Path("examples/emoji/model")
SIZES = {"sd15": 256, "example": 64}
TASK = "t2i"


def make(which: str, work: Path) -> tuple[Path, Path]:
    """Folders of the multi-task and of the plain pipeline; made if they are not there."""
    if which == "example":
        plain = work / "example-plain"
        if not plain.exists():
            of_one_task(EXAMPLE, TASK, plain)
        return EXAMPLE, plain
    multi, plain = work / "sd15-multi-task", work / "sd15-plain"
    for folder, options in ((multi, ()), (plain, ("--plain",))):
        if not folder.exists():
            subprocess.run([sys.executable, "-m", "bench.make_pipeline", "sd15", str(folder), *options], check=True)
            _without_checker(folder)
    return multi, plain


def _without_checker(folder: Path) -> None:
    """Have no library look for the safety checker, which has no weights here."""
    index = json.loads((folder / INDEX).read_text())
    (folder / INDEX).write_text(json.dumps({**index, "safety_checker": [None, None]}, indent=2))
    shutil.rmtree(folder / "safety_checker")


def of_one_task(folder: Path, task: str, out: Path) -> Path:
    """A multi-task pipeline's ``task`` as diffusers' own StableDiffusionPipeline, the same function.

    With the task known, experts side by side are one feed-forward, and what is mixed goes into its weights.
    """
    import torch
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel
    from tokenizers import Tokenizer

    from mtu_compile.model.pipeline import MTUPipeline
    from mtu_compile.model.unet_config import MTU_KEYS

    pipeline = MTUPipeline.from_pretrained(folder)
    multi = pipeline.unet.eval()
    index = next(i for i, one in enumerate(multi.tasks) if one.name == task)
    config = {key: value for key, value in multi.config.items() if key not in MTU_KEYS and not key.startswith("_")}
    plain = UNet2DConditionModel(**config).eval()
    with torch.no_grad():
        plain.load_state_dict(_weights(multi, plain, index))
        inputs = torch.randn(2, multi.latent_channels, 16, 16), torch.tensor(500.0)
        text = torch.randn(2, 8, int(plain.config.cross_attention_dim))
        wide = torch.zeros(2, multi.sample_channels, 16, 16)
        wide[:, : multi.latent_channels] = inputs[0]
        told = multi(wide, inputs[1], text, task_ids=torch.full((2,), index)).sample
        if not torch.allclose(plain(*inputs, text).sample, told, rtol=1e-3, atol=1e-3):
            raise SystemExit("the plain network is not the same function as the multi-task one")
    StableDiffusionPipeline(
        pipeline.vae,
        pipeline.text_encoder,
        pipeline.tokenizer,
        plain,
        pipeline.scheduler,
        None,
        None,
        requires_safety_checker=False,
    ).save_pretrained(out)
    _name_as_published(out / "text_encoder" / "model.safetensors")
    # transformers 5 keeps a tokenizer in one file; optimum-onnx has an older one, which reads the published two.
    Tokenizer.from_file(str(out / "tokenizer" / "tokenizer.json")).model.save(str(out / "tokenizer"))
    return out


def _name_as_published(weights: Path) -> None:
    """A CLIP text encoder's weights by the names that published checkpoints have; transformers 5.6 shortened them.

    Older versions would take a random encoder instead, and say so in a warning.
    """
    from safetensors.torch import load_file, save_file

    found = load_file(weights)
    prefix = "text_model."
    named = {name if name.startswith(prefix) else prefix + name: value for name, value in found.items()}
    save_file(named, weights, metadata={"format": "pt"})


def _weights(multi: Any, plain: Any, index: int) -> dict[str, Any]:
    import torch

    found = {name: value for name, value in multi.state_dict().items() if name in plain.state_dict()}
    ids = torch.tensor([index])
    for name, block in multi.named_modules():
        if type(block).__name__ != "MTUTransformerBlock":
            continue
        experts = block.ff.experts
        mix = block.ff.router(multi.task_embedding(ids), ids)[0]
        if block.ff.norm.weight.shape[1] != 1:
            raise SystemExit("experts with norms of their own are not one plain feed-forward")
        halves = [list(one.net[0].proj.weight.chunk(2)) for one in experts]
        biases = [list(one.net[0].proj.bias.chunk(2)) for one in experts]
        found[f"{name}.norm3.weight"] = block.ff.norm.weight[index, 0]
        found[f"{name}.norm3.bias"] = block.ff.norm.bias[index, 0]
        for kind, parts in (("weight", halves), ("bias", biases)):
            value, gate = zip(*parts, strict=True)
            found[f"{name}.ff.net.0.proj.{kind}"] = torch.cat([*value, *gate])
        scaled = [one.net[2].weight * weight for one, weight in zip(experts, mix, strict=True)]
        found[f"{name}.ff.net.2.weight"] = torch.cat(scaled, dim=1)
        found[f"{name}.ff.net.2.bias"] = sum(one.net[2].bias * weight for one, weight in zip(experts, mix, strict=True))
    conv = multi.task_conv_in.convs[index]
    return {**found, "conv_in.weight": conv.weight, "conv_in.bias": conv.bias}
