"""PyTorch → ONNX: the UNet once, with the task as an input, and the parts around it.

Nodes are named after the module they come from, ``<module path>/<operator>``: passes name what they refuse by it, and
quantisation finds layers by it.
"""

from __future__ import annotations

import ast
import contextlib
import logging
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn

from mtu_compile.core.errors import ModelError
from mtu_compile.core.families import FAMILIES, TEXT_EMBEDS, TIME_IDS, TextBranch
from mtu_compile.graph import io as graph_io
from mtu_compile.model.simplify import lazy, simplify
from mtu_compile.model.unet import call_unet
from mtu_compile.model.widened import is_widened, without_content
from mtu_compile.runtime.engine import OUTPUT
from mtu_compile.runtime.guidance import SCALE_INPUT

#: The newest opset that TensorRT 10.3 (JetPack 6.1) and OpenVINO 2026 both read.
OPSET = 20

_SCOPES = "pkg.torch.onnx.name_scopes"


class _UNet(nn.Module):  # type: ignore[misc]
    """A UNet behind positional inputs, as a graph has them."""

    def __init__(self, unet: nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        self.model = unet
        self.names = names

    def forward(self, *values: Tensor) -> Tensor:
        return call_unet(self.model, dict(zip(self.names, values, strict=True)))


class _TextEncoder(nn.Module):  # type: ignore[misc]
    """A text encoder that gives the outputs of these names."""

    def __init__(self, text_encoder: nn.Module, outputs: tuple[str, ...]) -> None:
        super().__init__()
        self.model = text_encoder
        self.outputs = outputs

    def forward(self, input_ids: Tensor) -> tuple[Tensor, ...]:
        inner = any(name.startswith("hidden_states.") for name in self.outputs)
        output = self.model(input_ids=input_ids, return_dict=True, output_hidden_states=inner)
        states = {f"hidden_states.{index}": one for index, one in enumerate(output.hidden_states or ())}
        return tuple(states[name] if name in states else getattr(output, name) for name in self.outputs)


class _VaeEncoder(nn.Module):  # type: ignore[misc]
    def __init__(self, vae: nn.Module) -> None:
        super().__init__()
        self.model = vae

    def forward(self, sample: Tensor) -> Tensor:
        return self.model.encode(sample).latent_dist.parameters  # type: ignore[operator, no-any-return]


class _VaeDecoder(nn.Module):  # type: ignore[misc]
    def __init__(self, vae: nn.Module) -> None:
        super().__init__()
        self.model = vae

    def forward(self, latent_sample: Tensor) -> Tensor:
        return self.model.decode(latent_sample, return_dict=False)[0]  # type: ignore[operator, no-any-return]


def export_unet(unet: Any, out: Path, *, text_length: int) -> Path:
    """Export a multi-task UNet with the task of each sample as an input.

    The graph's inputs are ``sample`` f32 [batch, sample_channels, height, width], ``timestep`` f32 [1],
    ``encoder_hidden_states`` f32 [batch, text_length, D] and ``task_ids`` i64 [batch], for SDXL also ``text_embeds``
    f32 [batch, P] and ``time_ids`` f32 [batch, 6], for a latent consistency model ``timestep_cond`` f32 [batch, W]; its
    output is ``out_sample`` f32 [batch, 4, height, width]. Batch, height and width are free; height and width are
    multiples of the UNet's total downsampling.

    Args:
        unet: an ``MTUUNet2DConditionModel`` in float32.
        out: folder to write ``model.onnx`` to (and ``model.onnx.data``, above 256 MiB of weights).
        text_length: tokens of a prompt.

    Returns:
        Path of ``model.onnx``.

    Raises:
        ModelError: the UNet is not float32, or is not multi-task.
    """
    if not hasattr(unet, "sample_channels"):
        raise ModelError("the UNet is not multi-task", hint="upcycle it first: mtu-compile upcycle BASE -o DIR")
    inputs = _unet_inputs(unet, unet.sample_channels, text_length)
    inputs["task_ids"] = torch.arange(2) % len(unet.tasks)
    return _export_unet(unet, inputs, out)


def export_plain_unet(unet: Any, out: Path, *, text_length: int) -> Path:
    """Export a pretrained ``UNet2DConditionModel`` the same way, for comparisons; there is no ``task_ids``."""
    return _export_unet(unet, _unet_inputs(unet, unet.config.in_channels, text_length), out)


def export_text_encoder(text_encoder: Any, out: Path, length: int, branch: TextBranch | None = None) -> Path:
    """Export a text encoder: ``input_ids`` i64 [batch, length] → f32 ``branch.outputs``: ``last_hidden_state`` and each
    ``hidden_states.N`` [batch, length, D], ``pooler_output`` [batch, D], ``text_embeds`` [batch, P].

    Args:
        branch: says which outputs there are; the first two of a ``CLIPTextModel`` otherwise.
    """
    branch = branch or FAMILIES["sd"].texts[0]
    inputs = {"input_ids": torch.zeros(2, length, dtype=torch.int64)}
    free = {"input_ids": {0: "batch"}}
    outputs = branch.outputs(int(text_encoder.config.num_hidden_layers))
    return _export(_TextEncoder(text_encoder, outputs), inputs, free, outputs, out)


def export_vae_encoder(vae: Any, out: Path, height: int, width: int) -> Path:
    """Export the encoder for pictures of ``height`` × ``width`` pixels: ``sample`` f32 [1, 3, height, width] in [-1, 1]
    → ``latent_parameters`` f32 [1, 2·4, h, w], the mean of the latent and then its log variance, unscaled."""
    inputs = {"sample": torch.zeros(1, vae.config.in_channels, height, width)}
    return _export(_VaeEncoder(vae), inputs, {}, ("latent_parameters",), out)


def export_vae_decoder(vae: Any, out: Path, height: int, width: int) -> Path:
    """Export the decoder for pictures of ``height`` × ``width`` pixels: ``latent_sample`` f32 [1, 4, h, w], already
    divided by the scaling factor → ``sample`` f32 [1, 3, height, width] in [-1, 1]."""
    scale = 2 ** (len(vae.config.block_out_channels) - 1)
    if height % scale or width % scale:
        raise ModelError(f"pictures of {height}×{width} pixels do not divide by the autoencoder's {scale}")
    inputs = {"latent_sample": torch.zeros(1, vae.config.latent_channels, height // scale, width // scale)}
    return _export(_VaeDecoder(vae), inputs, {}, ("sample",), out)


def _unet_inputs(unet: Any, channels: int, text_length: int) -> dict[str, Tensor]:
    """Example inputs. Sizes that stay free differ from each other and from 0 and 1, which tracing would bake in."""
    step = 2 ** (len(unet.config.block_out_channels) - 1)
    width = unet.config.encoder_hid_dim or unet.config.cross_attention_dim
    inputs = {
        "sample": torch.zeros(2, channels, 2 * step, 3 * step),
        "timestep": torch.tensor([1.0]),
        "encoder_hidden_states": torch.zeros(2, text_length, width if isinstance(width, int) else width[0]),
    }
    if unet.config.addition_embed_type == "text_time":
        pooled = unet.config.projection_class_embeddings_input_dim - 6 * unet.config.addition_time_embed_dim
        inputs |= {TEXT_EMBEDS: torch.zeros(2, pooled), TIME_IDS: torch.zeros(2, 6)}
    elif unet.config.addition_embed_type is not None:
        raise ModelError(f"added conditions of type {unet.config.addition_embed_type!r} are not supported")
    if unet.config.time_cond_proj_dim is not None:
        inputs[SCALE_INPUT] = torch.zeros(2, unet.config.time_cond_proj_dim)
    return inputs


def _export_unet(unet: Any, inputs: Mapping[str, Tensor], out: Path) -> Path:
    free = {name: {0: "batch"} for name in inputs if name != "timestep"}
    free["sample"] |= {2: "height", 3: "width"}
    shapes = {OUTPUT: ("batch", int(unet.config.out_channels), "height", "width")}
    return _export(_UNet(unet, tuple(inputs)), inputs, free, (OUTPUT,), out, shapes)


def _export(
    module: nn.Module,
    inputs: Mapping[str, Tensor],
    free: Mapping[str, Mapping[int, str]],
    outputs: tuple[str, ...],
    out: Path,
    output_shapes: Mapping[str, tuple[int | str, ...]] | None = None,
) -> Path:
    dtype = next((one.dtype for one in module.parameters() if one.dtype != torch.float32), None)
    if dtype is not None and not is_widened(module):
        raise ModelError(f"weights are {dtype}, exports start from float32", hint="load with torch_dtype=torch.float32")
    axes: Any = tuple(dict(free[name]) if name in free else None for name in inputs)
    if len(axes) > 1 and isinstance(module, _UNet):
        axes = (axes,)  # one *args parameter takes them all
    with _quiet(), torch.no_grad(), without_content(module) as stored:
        program = torch.onnx.export(
            module.eval(),
            tuple(inputs.values()),
            dynamo=True,
            opset_version=OPSET,
            input_names=list(inputs),
            output_names=list(outputs),
            dynamic_shapes=axes if free else None,
            optimize=False,
            verbose=False,
        )
        assert program is not None
        model: ir.Model = program.model
        _give_content(model, stored)
        simplify(model)
    for value in model.graph.outputs:
        if output_shapes and value.name and value.name in output_shapes:
            value.shape = ir.Shape(output_shapes[value.name])
    _name_nodes(model)
    return graph_io.save(model, out / "model.onnx")


def _give_content(model: ir.Model, stored: Mapping[str, Tensor]) -> None:
    """Let weights be what is ``stored`` of them, in float32, when they are written."""
    if missing := sorted(stored.keys() - model.graph.initializers.keys()):
        raise ModelError(f"the exported graph has no weight {missing[0]!r}")
    for name, half in stored.items():
        model.graph.initializers[name].const_value = lazy(partial(_wide, half), half.shape, name)


def _wide(half: Tensor) -> Any:
    return half.float().numpy()


def _name_nodes(model: ir.Model) -> None:
    """Name nodes ``<module path>/<operator>[_<number>]`` and drop the exporter's notes, stack traces among them."""
    seen: Counter[str] = Counter()
    scope = ""
    for node in model.graph:
        scopes = node.metadata_props.get(_SCOPES)
        if scopes is not None:
            scope = ast.literal_eval(scopes)[-2].removeprefix("model").removeprefix(".")
            scope = "" if scope.startswith("_empty") else scope  # sizes of inputs belong to no module
        name = f"{scope}/{node.op_type}" if scope else node.op_type
        node.name = f"{name}_{seen[name]}" if seen[name] else name
        seen[name] += 1
    values = [*model.graph.inputs, *model.graph.initializers.values(), *(v for n in model.graph for v in n.outputs)]
    for item in (model, model.graph, *model.graph, *values):
        item.metadata_props.clear()
        item.doc_string = None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter's advice is for whoever wrote the model's code; errors still come through as exceptions."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
