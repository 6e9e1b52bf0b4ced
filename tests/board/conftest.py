"""A bundle of tiny ONNX graphs: text encoder, autoencoder, and the UNets of two tasks; 32×32 pictures, 8×8 latents."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mtu_compile import bundle, runtime
from mtu_compile.bundle import BuildProvenance, EngineRef, Manifest, Source, TaskEntry, TextPart
from mtu_compile.bundle.requirements import BoardRequirements
from mtu_compile.core.schema import conform
from mtu_compile.core.tasks import PAPER_TASKS
from mtu_compile.runtime.reference import Reference, Trajectory
from tests.conftest import MadeOnce

T2I, EDIT = PAPER_TASKS[0], PAPER_TASKS[1]
FOLDERS = ("text_encoder", "vae_encoder", "vae_decoder", "unet", "unet_edit")
RTX = {"compute_capabilities": "8.9"}
SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "timestep_spacing": "trailing",
}


def write_graph(path: Path, inputs: Mapping[str, Any], outputs: Mapping[str, Any], nodes: Any, weights: Any) -> None:
    """An ONNX file; inputs and outputs are shapes (float32, but for ids of int64), weights arrays by name."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    def info(name: str, shape: Any) -> Any:
        kind = TensorProto.INT64 if name in ("input_ids", "task") else TensorProto.FLOAT
        return helper.make_tensor_value_info(name, kind, shape)

    graph = helper.make_graph(
        [helper.make_node(op, takes, gives, name=gives[0], **attributes) for op, takes, gives, attributes in nodes],
        path.parent.name,
        [info(*item) for item in inputs.items()],
        [info(*item) for item in outputs.items()],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model)
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, str(path))


def write_unet(path: Path, channels: int, batch: int, *, seed: int, layers: int = 1) -> None:
    """conv(sample) + mean(text), ``layers`` convolutions of 32 channels, and out; the timestep is added everywhere."""
    rng = np.random.default_rng(seed)
    weights: dict[str, Any] = {
        "w_in": (rng.standard_normal((32, channels, 3, 3)) * 0.2).astype(np.float32),
        "w_out": (rng.standard_normal((4, 32, 3, 3)) * 0.05).astype(np.float32),
        "axes_text": np.array([1], np.int64),
        "axes": np.array([2, 3], np.int64),
        "scale": np.array([0.001], np.float32),
    }
    pads = {"pads": [1, 1, 1, 1]}
    nodes: list[Any] = [
        ("Conv", ["sample", "w_in"], ["h_0"], pads),
        ("ReduceMean", ["encoder_hidden_states", "axes_text"], ["text"], {"keepdims": 0}),
        ("Unsqueeze", ["text", "axes"], ["text4"], {}),
        ("Mul", ["timestep", "scale"], ["time"], {}),
        ("Add", ["text4", "time"], ["bias"], {}),
    ]
    for layer in range(layers):
        weights[f"w_{layer}"] = (rng.standard_normal((32, 32, 3, 3)) * 0.05).astype(np.float32)
        nodes.append(("Conv", [f"h_{layer}", f"w_{layer}"], [f"c_{layer}"], pads))
        nodes.append(("Add", [f"c_{layer}", "bias"], [f"a_{layer}"], {}))
        nodes.append(("Tanh", [f"a_{layer}"], [f"h_{layer + 1}"], {}))
    nodes.append(("Conv", [f"h_{layers}", "w_out"], ["out_sample"], pads))
    inputs = {"sample": [batch, channels, 8, 8], "timestep": [1], "encoder_hidden_states": [batch, 16, 32]}
    write_graph(path, inputs, {"out_sample": [batch, 4, 8, 8]}, nodes, weights)


def write_shared_unet(path: Path) -> None:
    """One network for both tasks, of any batch: conv(sample) + the task's row + mean(text) + timestep, and out."""
    rng = np.random.default_rng(5)
    weights: dict[str, Any] = {
        "w_in": (rng.standard_normal((32, 8, 3, 3)) * 0.2).astype(np.float32),
        "w_out": (rng.standard_normal((4, 32, 3, 3)) * 0.05).astype(np.float32),
        "rows": rng.standard_normal((2, 32)).astype(np.float32),
        "axes_text": np.array([1], np.int64),
        "axes": np.array([2, 3], np.int64),
    }
    pads = {"pads": [1, 1, 1, 1]}
    nodes: list[Any] = [
        ("Conv", ["sample", "w_in"], ["h"], pads),
        ("ReduceMean", ["encoder_hidden_states", "axes_text"], ["text"], {"keepdims": 0}),
        ("Gather", ["rows", "task"], ["row"], {"axis": 0}),
        ("Add", ["text", "row"], ["own"], {}),
        ("Unsqueeze", ["own", "axes"], ["bias"], {}),
        ("Add", ["h", "bias"], ["a"], {}),
        ("Add", ["a", "timestep"], ["b"], {}),
        ("Tanh", ["b"], ["c"], {}),
        ("Conv", ["c", "w_out"], ["out_sample"], pads),
    ]
    free = {"sample": ["batch", 8, 8, 8], "encoder_hidden_states": ["batch", 16, 32], "task": ["batch"]}
    write_graph(path, {**free, "timestep": [1]}, {"out_sample": ["batch", 4, 8, 8]}, nodes, weights)


def write_graphs(root: Path, *, layers: int = 1) -> None:
    rng = np.random.default_rng(0)

    def weight(*shape: int) -> Any:
        return (rng.standard_normal(shape) * 0.3).astype(np.float32)

    write_graph(
        root / "text_encoder" / "model.onnx",
        {"input_ids": [1, 16]},
        {"last_hidden_state": [1, 16, 32]},
        [("Gather", ["table", "input_ids"], ["last_hidden_state"], {"axis": 0})],
        {"table": weight(8, 32)},
    )
    write_graph(
        root / "vae_encoder" / "model.onnx",
        {"sample": [1, 3, 32, 32]},
        {"latent_parameters": [1, 8, 8, 8]},
        [("Conv", ["sample", "w"], ["latent_parameters"], {"strides": [4, 4]})],
        {"w": weight(8, 3, 4, 4)},
    )
    write_graph(
        root / "vae_decoder" / "model.onnx",
        {"latent_sample": [1, 4, 8, 8]},
        {"sample": [1, 3, 32, 32]},
        [
            ("Conv", ["latent_sample", "w"], ["wide"], {}),
            ("DepthToSpace", ["wide"], ["large"], {"blocksize": 4}),
            ("Tanh", ["large"], ["sample"], {}),
        ],
        {"w": weight(48, 4, 1, 1)},
    )
    write_unet(root / "unet" / "model.onnx", 4, 2, seed=1, layers=layers)
    write_unet(root / "unet_edit" / "model.onnx", 8, 3, seed=2, layers=layers)


def write_tokenizer(path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["[pad]", "[unk]", "a", "red", "cat", "make", "it", "blue"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[unk]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    path.parent.mkdir(parents=True)
    tokenizer.save(str(path))


def describe(
    kind: str, config: Mapping[str, str], board: Mapping[str, Any] | None, *, suffix: str = ".onnx"
) -> Manifest:
    refs = {folder: EngineRef(kind, f"{folder}/model{suffix}", config) for folder in FOLDERS}
    return Manifest(
        tools={},
        source=Source("tiny", "0" * 64),
        target="a-test",
        precision="fp16",
        image_size=(32, 32),
        latent_channels=4,
        vae_scale=4,
        scaling_factor=0.5,
        text=TextPart("tokenizer/tokenizer.json", 16, 0, refs["text_encoder"]),
        vae_encoder=refs["vae_encoder"],
        vae_decoder=refs["vae_decoder"],
        scheduler=SCHEDULER,
        tasks={
            "t2i": TaskEntry(T2I, 0, refs["unet"], 3, accuracy_reason="built by a test"),
            "edit": TaskEntry(EDIT, 1, refs["unet_edit"], 3, accuracy_reason="built by a test"),
        },
        provenance=BuildProvenance(board=None if board is None else conform(BoardRequirements, board)),
    )


def onnxruntime_bundle(made_once: MadeOnce) -> Path:
    """A tiny bundle with references, for ONNX Runtime; made once for all tests."""

    def make(folder: Path) -> None:
        with bundle.staging(folder / "bundle") as root:
            write_graphs(root)
            write_tokenizer(root / "tokenizer" / "tokenizer.json")
            bundle.write(root, describe("onnxruntime", {}, None))
        add_references(folder / "bundle")

    return made_once("tiny-onnxruntime-bundle", make) / "bundle"


def openvino_bundle(made_once: MadeOnce) -> Path:
    """A tiny bundle with references, as the target ``cpu`` has them: OpenVINO's files, and every one for this CPU."""

    def make(folder: Path) -> None:
        import openvino

        with bundle.staging(folder / "bundle") as root:
            write_graphs(root)
            for path in sorted(root.rglob("model.onnx")):
                openvino.save_model(openvino.convert_model(path), path.with_suffix(".xml"), compress_to_fp16=False)
                path.unlink()
            write_tokenizer(root / "tokenizer" / "tokenizer.json")
            settings = {"device": "CPU", "INFERENCE_PRECISION_HINT": "f32"}
            bundle.write(root, replace(describe("openvino", settings, None, suffix=".xml"), target="cpu"))
        add_references(folder / "bundle")

    return made_once("tiny-openvino-bundle", make) / "bundle"


@pytest.fixture
def make_bundle(tmp_path: Path) -> Callable[..., Path]:
    """Factory: a bundle folder with networks of the given kind and recipe."""

    def make(
        kind: str = "tensorrt-rtx",
        config: Mapping[str, str] = RTX,
        *,
        layers: int = 1,
        board: Mapping[str, Any] | None = None,
        name: str = "bundle",
        shared: bool = False,
    ) -> Path:
        with bundle.staging(tmp_path / name) as folder:
            write_graphs(folder, layers=layers)
            write_tokenizer(folder / "tokenizer" / "tokenizer.json")
            manifest = describe(kind, config, board)
            if shared:
                shutil.rmtree(folder / "unet_edit")
                write_shared_unet(folder / "unet" / "model.onnx")
                ref = manifest.tasks["t2i"].engine
                tasks = {name: replace(entry, engine=ref) for name, entry in manifest.tasks.items()}
                manifest = replace(manifest, routing="shared", tasks=tasks)
            bundle.write(folder, manifest)
        return tmp_path / name

    return make


class Recorder:
    """An engine that keeps what it was given and what it gave."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.inputs, self.outputs = engine.inputs, engine.outputs
        self.given: list[dict[str, Any]] = []
        self.gave: list[Any] = []

    def __call__(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        result = self.engine(inputs)
        self.given.append({name: np.array(array) for name, array in inputs.items()})
        self.gave.append(np.array(result["out_sample"]))
        return dict(result)

    def close(self) -> None:
        self.engine.close()


def add_references(root: Path) -> None:
    """Record what the bundle's own networks do as its reference, and write the manifest anew."""
    from PIL import Image

    loaded = runtime.load(root)
    tasks = {}
    for name, entry in loaded.manifest.tasks.items():
        loaded.unet(name)
        recorder = loaded.networks.engines[entry.engine.path] = Recorder(loaded.unet(name))  # type: ignore[assignment]
        image = None if name == "t2i" else Image.effect_mandelbrot((32, 32), (-2, -1, 1, 1), 20).convert("RGB")
        noise = np.random.default_rng(3).standard_normal((1, 4, 8, 8), dtype=np.float32)
        made = loaded.run(name, "a red cat", image=image, latents=noise)
        one = Trajectory(
            prompt="a red cat",
            seed=3,
            image=image,
            mask=None,
            inputs=recorder.given,
            outputs=np.stack(recorder.gave),
            noise=noise,
            latents=made.latents,
            picture=made.image,
        )
        path = f"reference/{name}.safetensors"
        (root / "reference").mkdir(exist_ok=True)
        Reference(name, 3, "a test", (one,)).save(root / path)
        tasks[name] = replace(entry, reference=path)
    loaded.close()
    bundle.write(root, replace(loaded.manifest, tasks=tasks))


@pytest.fixture
def checked(make_bundle: Callable[..., Path]) -> Path:
    """A bundle with references, whose networks run on any machine through ONNX Runtime."""
    root = make_bundle("onnxruntime", {})
    add_references(root)
    return root
