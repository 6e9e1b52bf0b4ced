"""Exported tiny models, each exported once per test run, and ways to run and compare graphs."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from mtu_compile.graph import io as graph_io

TEXT = 5
HEIGHT, WIDTH = 8, 4

#: Options of upcycling: N of 1, 2 and 4 (8: "full-sdxl"), both kinds of norm, and top-k. Exporting takes seconds, so
#: only "sd15" has the two levels of the other tests' tiny models; "full-…" are for the slow tests.
MODELS: dict[str, dict[str, Any]] = {
    "sd15": {"num_experts": 4},
    "sd2": {"num_experts": 4, "norm_per_expert": True, "top_k": [3, 4, 1, 2]},
    "sdxl": {"num_experts": 1},
    "micro": {"num_experts": 2, "top_k": [1, 2, 1, 2]},
    "full-sd2": {"num_experts": 4, "norm_per_expert": True},
    "full-sdxl": {"num_experts": 8, "top_k": [3, 8, 1, 5]},
}

#: One level instead of two, and what makes the anatomy.
ONE_LEVEL: dict[str, dict[str, Any]] = {
    "micro": {},
    "sd2": {"use_linear_projection": True, "attention_head_dim": (8,)},
    "sdxl": {
        "use_linear_projection": True,
        "transformer_layers_per_block": (2,),
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 80,
    },
}


def one_level_unet(name: str) -> Any:
    import torch
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    common: dict[str, Any] = {
        "sample_size": 8,
        "block_out_channels": (32,),
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "down_block_types": ("CrossAttnDownBlock2D",),
        "up_block_types": ("CrossAttnUpBlock2D",),
        "mid_block_type": None,
        "cross_attention_dim": 32,
        "attention_head_dim": 4,
    }
    return UNet2DConditionModel(**common | ONE_LEVEL[name]).eval()


def one_level_mtu(name: str) -> Any:
    import torch

    from mtu_compile.core.tasks import PAPER_TASKS
    from mtu_compile.model.upcycle import upcycle_unet

    unet = upcycle_unet(one_level_unet(name), PAPER_TASKS, d_task=16, router_width=16, **MODELS[name])
    with torch.no_grad():
        for key, parameter in unet.named_parameters():
            if any(part in key for part in (".ff.", "task_conv_in", "task_embedding")):
                parameter += (1.0 if ".router." in key else 0.1) * torch.randn_like(parameter)
    return unet.eval()


@pytest.fixture(scope="session")
def mtu_model(tiny_mtu: Any) -> Callable[[str], Any]:
    """Factory of the torch models in ``MODELS``."""
    return lambda name: (
        one_level_mtu(name) if name in ONE_LEVEL else tiny_mtu(name.removeprefix("full-"), **MODELS[name])
    )


@pytest.fixture(scope="session")
def exported(made_once: Any, mtu_model: Any, tiny_unet: Any) -> Callable[[str], Path]:
    """``exported("sd15")`` is the multi-task graph, ``exported("plain-sd15")`` the pretrained UNet's."""
    from mtu_compile.model import export

    def get(name: str) -> Path:
        def make(folder: Path) -> None:
            plain = name.removeprefix("plain-")
            if plain == name:
                export.export_unet(mtu_model(name), folder, text_length=TEXT)
            else:
                unet = one_level_unet(plain) if plain in ONE_LEVEL else tiny_unet(plain.removeprefix("full-"))
                export.export_plain_unet(unet, folder, text_length=TEXT)

        return Path(made_once(f"graph-{name}", make)) / "model.onnx"

    return get


@pytest.fixture
def micro(exported: Any, tmp_path: Path) -> Path:
    """A copy of the smallest multi-task graph, to work on."""
    return Path(shutil.copy(exported("micro"), tmp_path / "micro.onnx"))


@pytest.fixture(scope="session")
def run_graph() -> Callable[..., dict[str, Any]]:
    """``run_graph(model or path, feeds)`` → outputs, by ONNX Runtime without its optimisations."""
    import onnxruntime as ort

    def run(model: ir.Model | Path, feeds: dict[str, Any]) -> dict[str, Any]:
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        source = str(model) if isinstance(model, Path) else ir.to_proto(model).SerializeToString()
        session = ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        names = [output.name for output in session.get_outputs()]
        return dict(zip(names, session.run(names, feeds), strict=True))

    return run


@pytest.fixture(scope="session")
def assert_close() -> Callable[..., None]:
    """``assert_close(actual, expected, tolerance=1e-5)``: same outputs, shapes, finite, relative difference."""

    def check(actual: dict[str, Any], expected: dict[str, Any], tolerance: float = 1e-5) -> None:
        assert actual.keys() == expected.keys()
        for name, wanted in expected.items():
            assert actual[name].shape == wanted.shape, name
            assert np.isfinite(wanted).all() and np.abs(wanted).max() > 0, f"{name} says nothing"
            difference = np.abs(actual[name] - wanted).max() / np.abs(wanted).max()
            assert difference <= tolerance, f"{name} differs by {difference:.2e}"

    return check


@pytest.fixture(scope="session")
def random_feeds() -> Callable[..., dict[str, Any]]:
    """``random_feeds(path, batch, channels, height, width)`` for the inputs of an exported UNet, without the task."""

    def make(path: Path, batch: int, channels: int, height: int = HEIGHT, width: int = WIDTH) -> dict[str, Any]:
        generator = np.random.default_rng(0)
        feeds: dict[str, Any] = {}
        for value in graph_io.load(path).graph.inputs:
            assert value.shape is not None and value.name is not None
            if value.name == "task_ids":
                continue
            fixed = {0: batch, 1: channels, 2: height, 3: width} if value.name == "sample" else {0: batch}
            size = [1] if value.name == "timestep" else [fixed.get(i, d) for i, d in enumerate(value.shape)]
            feeds[value.name] = generator.standard_normal(size).astype(np.float32)
        feeds["timestep"][:] = 321.0
        return feeds

    return make


@pytest.fixture(scope="session")
def parse() -> Callable[..., ir.Model]:
    """``parse(text, weight=array, …)``: a graph in ONNX's textual syntax, with the named inputs made initialisers."""
    import onnx

    def build(text: str, **weights: Any) -> ir.Model:
        proto = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 20]>\n{text}')
        for name, array in weights.items():
            proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
        for number, node in enumerate(proto.graph.node):
            node.name = node.name or f"{node.op_type}_{number}"
        model: ir.Model = ir.from_proto(proto)
        return model

    return build


@pytest.fixture(scope="session")
def mixture(parse: Any) -> Callable[..., ir.Model]:
    """``mixture(gates=(0.25, 0.75), …)``: experts behind a norm, C = 4, h = 3, as they are after routing is folded.

    ``affines``: one affine for all experts (1) or one each (N). ``gate``: expression for the gates instead of
    constants; it may read the graph's inputs x [B, L, 4] and timestep [1].
    """

    def build(gates: tuple[float, ...] = (0.25, 0.75), affines: int = 1, gate: str = "", seed: int = 0) -> ir.Model:
        generator = np.random.default_rng(seed)

        def weight(*shape: int) -> Any:
            return generator.standard_normal(shape).astype(np.float32)

        weights: dict[str, Any] = {"ones": np.ones(4, dtype=np.float32)}
        lines = ["norm = LayerNormalization(x, ones)"]
        for i in range(affines):
            weights |= {f"gamma_{i}": weight(1, 1, 4), f"beta_{i}": weight(1, 1, 4)}
            lines += [f"scaled_{i} = Mul(norm, gamma_{i})", f"normed_{i} = Add(beta_{i}, scaled_{i})"]
        for i, value in enumerate(gates):
            weights |= {f"up_{i}": weight(4, 6), f"up_bias_{i}": weight(6)}
            weights |= {f"down_{i}": weight(3, 4), f"down_bias_{i}": weight(4)}
            lines += [f"gate_{i} = {gate}"] if gate else []
            weights |= {} if gate else {f"gate_{i}": np.full((1, 1, 1), value, dtype=np.float32)}
            lines += [
                f"u_{i} = MatMul(normed_{i % affines}, up_{i})",
                f"p_{i} = Add(u_{i}, up_bias_{i})",
                f"v_{i}, g_{i} = Split<axis = -1, num_outputs = 2>(p_{i})",
                f"a_{i} = Gelu(g_{i})",
                f"h_{i} = Mul(v_{i}, a_{i})",
                f"d_{i} = MatMul(h_{i}, down_{i})",
                f"e_{i} = Add(d_{i}, down_bias_{i})",
                f"w_{i} = Mul(e_{i}, gate_{i})",
            ]
        total = "w_0"
        for i in range(1, len(gates)):
            lines.append(f"t_{i} = Add({total}, w_{i})")
            total = f"t_{i}"
        lines.append(f"y = Add({total}, x)")
        body = "\n".join(lines)
        text = f"agraph (float[B, L, 4] x, float[1] timestep) => (float[B, L, 4] y) {{\n{body}\n}}"
        model: ir.Model = parse(text, **weights)
        for node in model.graph:
            value = node.outputs[0].name or ""
            if value.startswith("u_"):
                node.name = f"block.ff.experts.{value.removeprefix('u_')}.net.0.proj/MatMul"
        return model

    return build
