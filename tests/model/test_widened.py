"""Weights in half precision that stay where they are: what is computed, and exported, is float32's to the bit."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mtu_compile.core.errors import ModelError
from mtu_compile.core.tasks import PAPER_TASKS
from mtu_compile.graph import io as graph_io
from mtu_compile.model import export
from mtu_compile.model.folder import MODELS
from mtu_compile.model.pipeline import MTUPipeline
from mtu_compile.model.upcycle import upcycle_unet
from mtu_compile.model.weights import find_weights
from mtu_compile.model.widened import half_of, is_widened, widen_on_use


def in_half(folder: Path, out: Path, dtype: torch.dtype) -> Path:
    """A pipeline folder whose networks are in half precision, as large ones are published."""
    MTUPipeline.from_pretrained(folder, torch_dtype=dtype).save_pretrained(out)
    return out


@pytest.fixture(scope="module")
def folder(sdxl_mtu_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return in_half(sdxl_mtu_dir, tmp_path_factory.mktemp("half") / "model", torch.float16)


def weights(network: Any) -> dict[str, torch.dtype]:
    return {name: one.dtype for name, one in network.named_parameters()}


def test_pictures_are_float32s_and_the_weights_stay_as_they_are(folder: Path) -> None:
    whole, widened = MTUPipeline.from_pretrained(folder), MTUPipeline.from_pretrained(folder, widened=True)
    networks = (widened.unet, widened.text_encoder, widened.text_encoder_2)
    kept = [weights(network) for network in networks]
    for network, found in zip(networks, kept, strict=True):
        halves = sum(dtype != torch.float32 for dtype in found.values())
        assert is_widened(network) and halves > 0.4 * len(found)
    assert not is_widened(whole.unet) and widened.unet.dtype == torch.float32 == widened.vae.dtype
    picture = Image.fromarray(np.random.default_rng(5).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    hole = Image.fromarray(np.kron(np.eye(2), np.full((16, 16), 255)).astype(np.uint8))
    options: dict[str, Any] = {"task": "inpaint", "image": picture, "mask_image": hole, "seed": 0}
    options["num_inference_steps"] = 2
    made = [one("a cat", output_type="latent", **options).latents for one in (whole, widened)]
    assert torch.equal(*made)
    assert [weights(network) for network in networks] == kept


def test_weights_come_back_after_a_layer_that_fails() -> None:
    network = widen_on_use(torch.nn.Sequential(torch.nn.Linear(3, 2)).to(torch.bfloat16))
    with pytest.raises(RuntimeError):
        network(torch.zeros(1, 5))
    assert network[0].weight.dtype == torch.bfloat16
    assert network(torch.zeros(1, 3)).dtype == torch.float32


def test_a_text_encoders_graph_is_float32s(folder: Path, tmp_path: Path) -> None:
    graphs = []
    for widened in (False, True):
        pipeline = MTUPipeline.from_pretrained(folder, widened=widened)
        network = pipeline.text_encoder_2
        graphs.append(export.export_text_encoder(network, tmp_path / str(widened), 16, pipeline.family.texts[1]))
        assert is_widened(network) == widened
        assert {torch.float32} < set(weights(network).values()) or not widened
    assert_same_graph(*graphs)


@pytest.mark.heavy
def test_a_unets_graph_is_float32s(one_level_unet: Any, tmp_path: Path) -> None:
    half = upcycle_unet(one_level_unet(), PAPER_TASKS[:2], num_experts=2, d_task=8, router_width=8).eval().half()
    whole, widened = copy.deepcopy(half).float(), widen_on_use(half)
    assert_same_graph(
        *(
            export.export_unet(one, tmp_path / name, text_length=5)
            for name, one in (("whole", whole), ("widened", widened))
        )
    )


def assert_same_graph(first: Path, second: Path) -> None:
    """The same nodes and, to the bit, the same weights."""
    graphs = [graph_io.load(path).graph for path in (first, second)]
    one, other = (list(graph) for graph in graphs)
    assert [(node.name, node.op_type) for node in one] == [(node.name, node.op_type) for node in other]
    compared = 0
    for mine, theirs in zip(one, other, strict=True):
        for read, wanted in zip(theirs.inputs, mine.inputs, strict=True):
            if wanted is not None and wanted.const_value is not None:
                assert read is not None and read.const_value is not None
                assert np.array_equal(read.const_value.numpy(), wanted.const_value.numpy()), read.name
                compared += read.const_value.size
    assert compared > 10_000


def test_only_files_in_one_half_precision_are_left_as_they_are(
    folder: Path, sdxl_mtu_dir: Path, tmp_path: Path
) -> None:
    assert half_of(find_weights(folder / "unet", MODELS["unet"])) in (torch.float16, torch.bfloat16)
    assert half_of(find_weights(sdxl_mtu_dir / "unet", MODELS["unet"])) is None
    assert not is_widened(MTUPipeline.from_pretrained(sdxl_mtu_dir, widened=True).unet)
    half = MTUPipeline.from_pretrained(folder, torch_dtype=torch.float16).unet
    assert [task.name for task in half.tasks] == [task.name for task in PAPER_TASKS]
    with pytest.raises(ModelError, match="exports start from float32"):
        export.export_unet(half, tmp_path / "half", text_length=16)
