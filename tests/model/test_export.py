from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from mtu_compile.core.errors import ModelError
from mtu_compile.graph import io as graph_io
from mtu_compile.model import export


def shapes(values: Any) -> dict[str, list[int | str]]:
    return {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in values}


def run(path: Path, feeds: dict[str, Any]) -> list[Any]:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return list(ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"]).run(None, feeds))


@pytest.fixture(scope="module")
def one_level(one_level_unet: Any) -> Any:
    return one_level_unet()


@pytest.fixture(scope="module")
def multi_task(one_level: Any) -> Any:
    from mtu_compile.core.tasks import PAPER_TASKS
    from mtu_compile.model.upcycle import upcycle_unet

    return upcycle_unet(one_level, PAPER_TASKS, num_experts=2, d_task=8, router_width=8).eval()


@pytest.fixture(scope="module")
def unet_graph(multi_task: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graph_io, "save", partial(graph_io.save, external_bytes=0))
        return export.export_unet(multi_task, tmp_path_factory.mktemp("unet"), text_length=5)


def test_unet_inputs_and_outputs(unet_graph: Path) -> None:
    model = onnx.load(str(unet_graph))
    onnx.checker.check_model(model, full_check=True)
    assert [opset.version for opset in model.opset_import] == [20]
    assert shapes(model.graph.input) == {
        "sample": ["batch", 9, "height", "width"],
        "timestep": [1],
        "encoder_hidden_states": ["batch", 5, 32],
        "task_ids": ["batch"],
    }
    assert shapes(model.graph.output) == {"out_sample": ["batch", 4, "height", "width"]}


def test_large_weights_lie_beside_the_model(unet_graph: Path) -> None:
    assert {p.name for p in unet_graph.parent.iterdir()} == {"model.onnx", "model.onnx.data"}


def test_nodes_are_named_after_their_modules_and_carry_no_paths(unet_graph: Path) -> None:
    model = onnx.load(str(unet_graph), load_external_data=False)
    names = [node.name for node in model.graph.node]
    assert len(set(names)) == len(names)
    assert "down_blocks.0.attentions.0.transformer_blocks.0.ff.router/Softmax" in names
    assert "down_blocks.0.attentions.0.transformer_blocks.0.ff.experts.1.net.0.proj/MatMul" in names
    assert b"/site-packages/" not in model.SerializeToString()


def test_plain_unet_is_exported_the_same_way(one_level: Any, tmp_path: Path) -> None:
    import torch

    path = export.export_plain_unet(one_level, tmp_path, text_length=5)
    assert list(shapes(onnx.load(str(path)).graph.input)) == ["sample", "timestep", "encoder_hidden_states"]
    inputs = torch.randn(3, 4, 6, 10), torch.tensor([7.0]), torch.randn(3, 5, 32)
    with torch.no_grad():
        expected = one_level(*inputs, return_dict=False)[0].numpy()
    feeds = dict(zip(("sample", "timestep", "encoder_hidden_states"), (v.numpy() for v in inputs), strict=True))
    np.testing.assert_allclose(run(path, feeds)[0], expected, atol=1e-5 * np.abs(expected).max())


def test_a_unet_that_is_not_multi_task_is_refused(one_level: Any, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="not multi-task") as caught:
        export.export_unet(one_level, tmp_path, text_length=5)
    assert "upcycle" in str(caught.value.hint)


def test_weights_in_half_precision_are_refused(one_level: Any, tmp_path: Path) -> None:
    import copy

    with pytest.raises(ModelError, match="exports start from float32"):
        export.export_plain_unet(copy.deepcopy(one_level).half(), tmp_path, text_length=5)


def test_text_encoder(base_pipeline_dir: Path, tmp_path: Path) -> None:
    import torch
    from transformers import CLIPTextModel

    model = CLIPTextModel.from_pretrained(base_pipeline_dir / "text_encoder").eval()
    path = export.export_text_encoder(model, tmp_path, 16)
    assert shapes(onnx.load(str(path)).graph.output) == {
        "last_hidden_state": ["batch", 16, 32],
        "pooler_output": ["batch", 32],
    }
    ids = torch.randint(0, 50, (3, 16))
    ids[:, 9] = model.config.eos_token_id
    with torch.no_grad():
        expected = model(ids)
    hidden, pooled = run(path, {"input_ids": ids.numpy()})
    np.testing.assert_allclose(hidden, expected.last_hidden_state.numpy(), atol=1e-5)
    np.testing.assert_allclose(pooled, expected.pooler_output.numpy(), atol=1e-5)


def test_vae(base_pipeline_dir: Path, tmp_path: Path) -> None:
    import torch
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(base_pipeline_dir / "vae").eval()
    encoder = export.export_vae_encoder(vae, tmp_path / "encoder", 32, 16)
    decoder = export.export_vae_decoder(vae, tmp_path / "decoder", 32, 16)
    picture, latent = torch.randn(1, 3, 32, 16), torch.randn(1, 4, 8, 4)
    with torch.no_grad():
        moments = vae.encode(picture).latent_dist
        decoded = vae.decode(latent, return_dict=False)[0].numpy()
    (parameters,) = run(encoder, {"sample": picture.numpy()})
    np.testing.assert_allclose(parameters[:, :4], moments.mean.numpy(), atol=1e-5)
    np.testing.assert_allclose(parameters, moments.parameters.numpy(), atol=1e-5)
    np.testing.assert_allclose(
        run(decoder, {"latent_sample": latent.numpy()})[0], decoded, atol=1e-5 * np.abs(decoded).max()
    )
    assert list(shapes(onnx.load(str(encoder)).graph.output)) == ["latent_parameters"]
    with pytest.raises(ModelError, match="do not divide"):
        export.export_vae_decoder(vae, tmp_path / "odd", 30, 16)
