"""A bundle whose tasks share one UNet, through every command."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mtu_compile import bundle, runtime
from mtu_compile.accuracy.formulas import sqnr_db
from mtu_compile.accuracy.host.check import check_bundle
from mtu_compile.runtime import Request, cpu_isa
from mtu_compile.runtime.engine import open_engine
from mtu_compile.runtime.task_engine import TaskEngine
from tests.cli.conftest import BUILD, SHARED

Run = Callable[..., Any]


@pytest.fixture
def requests(tmp_path: Path, tiny_model: Path) -> Path:
    """A file of three requests of two tasks, and one with other steps."""
    shutil.copy(tiny_model / "samples" / "inpaint" / "0.png", tmp_path / "in.png")
    mask = Image.new("L", (32, 32))
    mask.paste(255, (0, 0, 16, 32))
    mask.save(tmp_path / "mask.png")
    inpaint = {"task": "inpaint", "prompt": "disc", "image": "in.png", "mask": "mask.png"}
    rows = [
        {"task": "t2i", "prompt": "disc", "seed": 1, "steps": 3},
        {**inpaint, "seed": 2, "steps": 3, "output": "hole.png"},
        {"task": "t2i", "prompt": "disc", "seed": 1, "steps": 2, "guidance_scale": 5},
        {"task": "t2i", "prompt": "disc", "seed": 4, "steps": 3, "guidance_scale": 1},
    ]
    (tmp_path / "requests.json").write_text(json.dumps(rows))
    return tmp_path / "requests.json"


def test_a_check_finds_the_shared_unet_as_good(shared_float: Path) -> None:
    """On the build machine, at every instruction set, and as a board checks: within float32's rounding of the model."""
    from mtu_compile import board

    result, on_board = check_bundle(shared_float, everywhere=False), board.check_bundle(shared_float)
    assert not result.failures and not on_board.failures
    assert [proof.level for proof in on_board.instruction_sets] == list(cpu_isa.up_to(cpu_isa.level()))
    for name, task in result.tasks.items():
        assert task.worst_sqnr > 90, name
        assert on_board.tasks[name].worst_sqnr == pytest.approx(task.worst_sqnr, rel=1e-6)


def test_a_row_of_another_task_is_seen_by_the_check(shared_float: Path, tmp_path: Path) -> None:
    """A seeded defect: the tasks' rows exchanged."""
    copy = shutil.copytree(shared_float, tmp_path / "copy")
    manifest = bundle.read(copy)
    rows = {"t2i": 1, "inpaint": 0}
    tasks = {name: replace(entry, task_id=rows[name]) for name, entry in manifest.tasks.items()}
    bundle.write(copy, replace(manifest, tasks=tasks))
    failures = check_bundle(copy, everywhere=False).failures
    assert any(failure.startswith("t2i: ") for failure in failures)
    assert any(failure.startswith("inpaint: ") for failure in failures)


def test_run_makes_a_batch_of_pictures(
    shared_float: Path, float_bundle: Path, requests: Path, tmp_path: Path, mtu: Run
) -> None:
    done = mtu("run", shared_float, "--batch", requests, "-o", tmp_path / "out", "--json")
    assert done.code == 0, done.err
    made = json.loads(done.out)["pictures"]
    names = ["1-t2i.png", "hole.png", "3-t2i.png", "4-t2i.png"]
    assert [one["output"] for one in made] == [str(tmp_path / "out" / name) for name in names]
    assert [[notice["kind"] for notice in one["notices"]] for one in made] == [[], [], ["batch-alone"], []]
    single = mtu("run", shared_float, "--task", "t2i", "--prompt", "disc", "--seed", 1, "--steps", 2, "--guidance", 5,
                 "-o", tmp_path / "single.png")  # fmt: skip
    assert single.code == 0, single.err
    together, alone = (
        np.asarray(Image.open(path), int) for path in (tmp_path / "out/3-t2i.png", tmp_path / "single.png")
    )
    np.testing.assert_array_equal(together, alone)
    static = mtu("run", float_bundle, "--batch", requests, "-o", tmp_path / "static")
    assert static.code == 0, static.err
    assert static.err.count("each task of this bundle has a UNet of its own") == 1
    for name in names:
        shared, own = (np.asarray(Image.open(tmp_path / folder / name), int) for folder in ("out", "static"))
        assert np.abs(shared - own).max() <= 1


@pytest.mark.parametrize(
    ("change", "arguments", "code", "words"),
    [
        ({"task": "paint", "steps": None}, (), 2, "request 3: unknown task 'paint'"),
        ({"scheduler": "plms"}, (), 2, "request 3: unknown sampler 'plms'"),
        ({"promt": "a"}, (), 5, "requests.json: [2].promt"),
        ({"seed": -1}, (), 5, "[2].seed is -1"),
        ({"output": "../a.png"}, (), 5, "[2].output"),
        ({"output": "hole.png"}, (), 5, "two pictures are called 'hole.png'"),
        ({"image": "in.png"}, (), 2, "request 3: task 't2i' has no use for a picture"),
        ({}, ("--seed", 1), 2, "--seed"),
        ({}, ("-o", "{here}/in.png"), 2, "is not a folder"),
    ],
)
def test_a_batch_that_cannot_be_made_is_refused(
    change: dict[str, Any], arguments: Any, code: int, words: str, shared_float: Path, requests: Path, mtu: Run
) -> None:
    rows = json.loads(requests.read_text())
    rows[2].update(change)
    requests.write_text(json.dumps(rows))
    here = requests.parent
    more = [str(argument).format(here=here) for argument in arguments]
    done = mtu("run", shared_float, "--batch", requests, "-o", here / "out", *more)
    assert done.code == code and words in done.err and "hint:" in done.err, done.err
    assert not (here / "out").exists()


SOURCE, MASK = Image.new("RGB", (32, 32), "red"), Image.new("L", (32, 32), 255)
MASK.paste(0, (16, 0, 32, 32))
T2I, INPAINT = Request("t2i", "disc", steps=2), Request("inpaint", "disc", image=SOURCE, mask=MASK, steps=2)


@pytest.mark.parametrize("precision", ["float", "int8"])
def test_there_and_back_again_is_bit_equal(precision: str, request: pytest.FixtureRequest) -> None:
    with runtime.load(request.getfixturevalue(f"shared_{precision}")) as loaded:
        first, other, again = (loaded.run_batch([one])[0].latents for one in (T2I, INPAINT, T2I))
        np.testing.assert_array_equal(first, again)
        assert not np.allclose(first, other, atol=0.1)
        assert sum(path.startswith("unet") for path in loaded.networks.engines) == 1


def test_pictures_of_two_tasks_in_one_call_are_as_by_themselves(shared_float: Path) -> None:
    with runtime.load(shared_float) as loaded:
        alone = [loaded.run_batch([one])[0].latents for one in (INPAINT, T2I)]
        for one, expected in zip(loaded.run_batch([INPAINT, T2I]), alone, strict=True):
            assert not one.notices
            # Bit by bit with the kernels of OpenVINO 2026.4.1 on AVX2, AVX-512 and AMX, which nobody promises.
            np.testing.assert_allclose(one.latents, expected, atol=1e-5 * np.abs(expected).max())


def test_inspect_and_report_show_one_unet(shared_float: Path, tmp_path: Path, mtu: Run) -> None:
    done = mtu("inspect", shared_float)
    assert done.code == 0, done.err
    lines = [line for line in done.out.splitlines() if "unet_shared/openvino_model.xml" in line]
    assert len(lines) == 1 and "shared" in done.out
    done = mtu("report", shared_float, "--json", "-o", tmp_path / "report.html")
    assert done.code == 0, done.err
    networks = [one["name"] for one in json.loads(done.out)["networks"]]
    assert networks == ["text encoder", "vae encoder", "vae decoder", "UNet of all tasks"]


def test_one_task_of_it_is_exported_for_other_tools(
    shared_float: Path, float_bundle: Path, tmp_path: Path, mtu: Run
) -> None:
    """The folder has what a static bundle of the task has; its UNet computes what the shared one does."""
    done = mtu("export-static", shared_float, tmp_path / "out", "--task", "inpaint", "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["pipeline"] == "StableDiffusionInpaintPipeline"
    found = {p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert {"unet/openvino_model.xml", "unet/openvino_model.bin", "unet/config.json", "model_index.json"} <= found
    assert {"text_encoder/openvino_model.xml", "vae_decoder/config.json", "scheduler/scheduler_config.json"} <= found
    assert not any(name.startswith(("reference", "manifest")) for name in found)
    assert json.loads((tmp_path / "out" / "unet" / "config.json").read_text())["in_channels"] == 9
    index, before = (json.loads((at / "model_index.json").read_text()) for at in (tmp_path / "out", float_bundle))
    assert index == {**before, "_class_name": "StableDiffusionInpaintPipeline"}
    graph = tmp_path / "out" / "unet" / "openvino_model.xml"
    engine = open_engine("openvino", graph, {"device": "CPU", "INFERENCE_PRECISION_HINT": "f32"})
    assert "task" not in engine.inputs and engine.inputs["sample"].shape[0] == 3
    engine.close()


@pytest.mark.parametrize(
    ("precision", "least_db"), [("int8", 25.0), pytest.param("bf16", 35.0, marks=pytest.mark.heavy)]
)
def test_an_exported_task_computes_what_the_shared_engine_does(
    precision: str, least_db: float, tiny_model: Path, build_once: Any, tmp_path: Path, mtu: Run
) -> None:
    """In the bundle's own precision; where a graph rounds, another batch may round a few numbers another way."""
    bundled = build_once(tiny_model, *SHARED, f"--{precision}", "--accuracy-gate", "warn", *BUILD)
    manifest = bundle.read(bundled)
    for name, entry in manifest.tasks.items():
        done = mtu("export-static", bundled, tmp_path / name, "--task", name, "--quiet")
        assert done.code == 0, done.err
        config, channels = entry.engine.config, 4 + entry.task.condition_channels(4)
        shared = open_engine("openvino", bundle.resolve(bundled, entry.engine.path), config)
        alone = open_engine("openvino", tmp_path / name / "unet" / "openvino_model.xml", config)
        rng, feed = np.random.default_rng(5), {}
        for key, spec in alone.inputs.items():
            shape = [entry.task.unet_batch if size is None else size for size in spec.shape]
            drawn = np.full(shape, 499) if key == "timestep" else rng.standard_normal(shape)
            feed[key] = drawn.astype(spec.dtype)
        (wanted,) = TaskEngine(shared, entry.task_id, channels)(feed).values()
        (given,) = alone(feed).values()
        assert sqnr_db(wanted, given) > least_db, name
        shared.close()
        alone.close()


def test_what_cannot_be_exported_leaves_nothing(
    shared_float: Path, float_bundle: Path, tmp_path: Path, mtu: Run
) -> None:
    for source, task, said in ((shared_float, "colour", "unknown task"), (float_bundle, "t2i", "graph of its own")):
        done = mtu("export-static", source, tmp_path / "out", "--task", task)
        assert done.code == 2 and said in done.err and not list(tmp_path.iterdir())
