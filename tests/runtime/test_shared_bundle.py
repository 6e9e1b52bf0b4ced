"""A bundle whose tasks share one UNet, of any batch: the same pictures as with a UNet for each task."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

from mtu_compile import bundle, runtime
from mtu_compile.accuracy.host.compare import compare_runner
from mtu_compile.accuracy.host.engine_runner import EngineRunner
from mtu_compile.accuracy.recorded import RecordedCall
from mtu_compile.bundle import EngineRef
from mtu_compile.bundle.files import _sealed
from mtu_compile.core.errors import BundleError, ConfigError, InputError, NotFiniteError
from mtu_compile.runtime import Request, Runtime
from mtu_compile.runtime.engine import Array, Engine, open_engine

SOURCE = Image.effect_mandelbrot((32, 32), (-2, -1, 1, 1), 20).convert("RGB")
MASK = Image.new("L", (32, 32))
ImageDraw.Draw(MASK).rectangle((0, 0, 15, 31), fill=255)
REQUESTS = (
    Request("t2i", "a cat", negative_prompt="blurry", seed=1, steps=3),
    Request("edit", "make it red", image=SOURCE, seed=2, steps=3),
    Request("sr", image=SOURCE.resize((8, 8)), seed=3, steps=3),
    Request("inpaint", "a hat", image=SOURCE, mask=MASK, seed=4, steps=3),
)
#: UNet samples of each, a step.
SAMPLES = (2, 3, 1, 3)


class Counted:
    """Opens a bundle's networks, and counts what is opened and how many samples the UNets are given."""

    def __init__(self, root: Path) -> None:
        self.root, self.opened, self.runs = root, list[str](), list[int]()

    def __call__(self, ref: EngineRef) -> Engine:
        self.opened.append(ref.path)
        engine = open_engine(ref.kind, self.root / ref.path, ref.config)
        return _CountedRuns(engine, self.runs) if ref.path.startswith("unet") else engine


class _CountedRuns:
    def __init__(self, engine: Engine, runs: list[int]) -> None:
        self.engine, self.runs = engine, runs
        self.inputs, self.outputs, self.close = engine.inputs, engine.outputs, engine.close

    def __call__(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        self.runs.append(len(inputs["sample"]))
        return self.engine(inputs)


def run(loaded: Runtime, request: Request) -> runtime.Result:
    return loaded.run(**{name: getattr(request, name) for name in vars(request)})


def kinds(result: runtime.Result) -> list[str]:
    return [notice.kind for notice in result.notices]


@pytest.fixture(scope="module")
def static(tiny_bundle: Any) -> list[runtime.Result]:
    """What a UNet for each task makes."""
    with runtime.load(tiny_bundle[0]) as loaded:
        return [run(loaded, request) for request in REQUESTS]


@pytest.mark.parametrize("batch", [-1, 1, 2])
def test_every_task_is_as_with_a_unet_of_its_own(
    batch: int, make_shared: Callable[..., Path], static: list[runtime.Result]
) -> None:
    counted = Counted(make_shared(batch))
    with runtime.load(counted.root, opener=counted) as loaded:
        for request, samples, expected in zip(REQUESTS, SAMPLES, static, strict=True):
            counted.runs.clear()
            result = run(loaded, request)
            np.testing.assert_allclose(result.latents, expected.latents, atol=1e-4)
            wasted = batch == 2 and samples % 2 == 1
            assert counted.runs == [samples if batch == -1 else batch] * 3 * (
                1 if batch == -1 else -(-samples // batch)
            )
            assert kinds(result) == ["guidance-samples"] * wasted
    assert [path for path in counted.opened if path.startswith("unet")] == ["unet/openvino_model.xml"]


@pytest.mark.parametrize("batch", [-1, 1])
def test_without_guidance_one_sample_is_computed(batch: int, make_shared: Callable[..., Path]) -> None:
    counted = Counted(make_shared(batch))
    with runtime.load(counted.root, opener=counted) as loaded:
        assert kinds(loaded.run("t2i", "a cat", steps=2, guidance_scale=1)) == []
        assert kinds(loaded.run("edit", "red", image=SOURCE, steps=2, guidance_scale=1)) == []
    assert counted.runs == [1] * 4


def test_there_and_back_again_is_bit_equal_and_loads_nothing(make_shared: Callable[..., Path]) -> None:
    counted = Counted(make_shared())
    with runtime.load(counted.root, opener=counted) as loaded:
        first = [run(loaded, request).latents for request in REQUESTS]
        opened = list(counted.opened)
        for index in (0, 3, 0, 2, 1, 3, 0):
            np.testing.assert_array_equal(run(loaded, REQUESTS[index]).latents, first[index])
        assert counted.opened == opened


@pytest.mark.parametrize("batch", [-1, 1, 2])
def test_pictures_of_all_tasks_in_one_call(batch: int, make_shared: Callable[..., Path]) -> None:
    counted, told, said = Counted(make_shared(batch)), list[tuple[int, int]](), list[tuple[int, str]]()
    with runtime.load(counted.root, opener=counted) as loaded:
        alone = [run(loaded, request) for request in REQUESTS]
        counted.runs.clear()
        together = loaded.run_batch(
            REQUESTS,
            progress=lambda done, total: told.append((done, total)),
            notify=lambda index, notice: said.append((index, notice.kind)),
        )
    for one, expected in zip(together, alone, strict=True):
        np.testing.assert_allclose(one.latents, expected.latents, atol=1e-5)
        np.testing.assert_allclose(np.asarray(one.image, int), np.asarray(expected.image, int), atol=1)
        assert one.frame == expected.frame
        if batch == 1:  # each sample is computed by itself, whatever is asked for beside it
            np.testing.assert_array_equal(one.latents, expected.latents)
    assert counted.runs == {-1: [3] * 3, 1: [1] * 9, 2: [2] * 5}[batch] * 3
    assert told == [(4, 12), (8, 12), (12, 12)]
    assert said == ([(index, "guidance-samples") for index in range(4)] if batch == 2 else [])


def test_only_the_same_timesteps_share_a_call(make_shared: Callable[..., Path]) -> None:
    counted = Counted(make_shared())
    requests = [
        REQUESTS[0],
        Request("sr", image=SOURCE, steps=5),
        REQUESTS[2],
        Request("t2i", "a dog", seed=9, steps=3, scheduler="dpm++"),  # another sampler of the same timesteps
        Request("t2i", "a dog", steps=3, scheduler="euler"),
    ]
    with runtime.load(counted.root, opener=counted) as loaded:
        expected = [run(loaded, request) for request in requests]
        counted.runs.clear()
        results = loaded.run_batch(requests)
        samplers = {name: loaded.calls("t2i", 3, name) for name in ("ddim", "dpm++", "euler")}
        assert samplers == {"ddim": 3, "dpm++": 3, "euler": 3}
        assert counted.runs == [3, 3, 1] * 3 + [1] * 5
        counted.runs.clear()
        turns = loaded.run_batch(requests, most_samples=3)
        assert counted.runs == [3] * 3 + [1] * 5 + [2] * 3 + [2] * 3
    for some in (results, turns):
        for one, wanted in zip(some, expected, strict=True):
            np.testing.assert_allclose(one.latents, wanted.latents, atol=1e-5)
        assert [kinds(one) for one in some] == [[], ["batch-alone"], [], [], []]


def test_without_a_shared_unet_pictures_take_turns(tiny_bundle: Any, static: list[runtime.Result]) -> None:
    with runtime.load(tiny_bundle[0]) as loaded:
        results = loaded.run_batch(REQUESTS)
        assert kinds(loaded.run_batch(REQUESTS[:1])[0]) == []
        assert loaded.run_batch([]) == ()
    for one, expected in zip(results, static, strict=True):
        np.testing.assert_array_equal(one.latents, expected.latents)
        np.testing.assert_array_equal(one.image, expected.image)
        assert kinds(one) == ["batch-alone"]
        assert "--routing shared" in one.notices[0].hint


@pytest.mark.parametrize(
    ("wrong", "error", "words"),
    [
        (Request("paint", "x"), ConfigError, "request 2: unknown task 'paint'"),
        (Request("edit", "x"), ConfigError, "request 2: task 'edit' needs a picture"),
        (Request("t2i", "x", steps=0), ConfigError, "request 2: 0 steps"),
        (Request("t2i", "x", seed=-1), ConfigError, "request 2: .*-1 is not a seed"),
        (Request("edit", "x", image=Path("gone.png")), InputError, "request 2: picture 'gone.png' does not exist"),
    ],
)
def test_an_impossible_request_is_named_before_any_step(
    wrong: Request, error: Any, words: str, make_shared: Callable[..., Path]
) -> None:
    counted = Counted(make_shared())
    with runtime.load(counted.root, opener=counted) as loaded, pytest.raises(error, match=words) as caught:
        loaded.run_batch([REQUESTS[0], wrong, REQUESTS[2]])
    assert str(caught.value) == caught.value.message and caught.value.hint
    assert counted.runs == []


def test_a_picture_that_is_lost_is_named(make_shared: Callable[..., Path]) -> None:
    """NaN noise of one request: the message says which it is, and the step."""
    lost = Request("sr", image=SOURCE, steps=3, latents=np.full((1, 4, 8, 8), np.nan, np.float32))
    words = r"request 3: the UNet of task 'sr' gave .* in step 1 of 3"
    with runtime.load(make_shared()) as loaded, pytest.raises(NotFiniteError, match=words) as caught:
        loaded.run_batch([*REQUESTS[:2], lost])
    assert (caught.value.task, caught.value.step) == ("sr", 1)


def test_polygraphy_runs_a_task_of_a_shared_engine(make_shared: Callable[..., Path], tiny_bundle: Any) -> None:
    """Every task of the shared engine answers recorded calls of the task's own engine."""
    random = np.random.default_rng(0)
    with runtime.load(tiny_bundle[0]) as own, runtime.load(make_shared()) as loaded:
        for task in loaded.tasks:
            shapes = {name: spec.shape for name, spec in own.unet(task.name).inputs.items()}
            feed = {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
            calls = [RecordedCall(feed, own.unet(task.name)(feed), 7.0)]
            for engine in (loaded.unet(task.name), partial(loaded.unet, task.name)):
                (step,) = compare_runner(EngineRunner(engine), calls, guidance=task.guided)
                assert step.sqnr_db > 90


def edited(root: Path, tmp_path: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    copied = shutil.copytree(root, tmp_path / "copied")
    raw = json.loads((copied / "manifest.json").read_text())
    change(raw)
    (copied / "manifest.json").write_bytes(_sealed(raw))
    return copied


def test_engines_that_are_not_what_the_manifest_says(
    make_shared: Callable[..., Path], tiny_bundle: Any, tmp_path: Path
) -> None:
    def wider(raw: dict[str, Any]) -> None:
        raw["tasks"]["edit"]["task"]["condition"] = ["image", "image", "image"]

    with pytest.raises(BundleError, match="takes 9 channels, and its manifest describes a task of 16"):
        runtime.load(edited(make_shared(), tmp_path / "a", wider)).run("t2i", "x", steps=1)

    def static(raw: dict[str, Any]) -> None:
        raw["routing"] = "static"

    with pytest.raises(BundleError, match="has an input 'task', and its manifest says that no tasks share it"):
        runtime.load(edited(make_shared(), tmp_path / "b", static)).run("t2i", "x", steps=1)

    def shared(raw: dict[str, Any]) -> None:
        raw["routing"] = "shared"
        for entry in raw["tasks"].values():
            entry["engine"] = raw["tasks"]["t2i"]["engine"]

    with pytest.raises(BundleError, match="has no input 'task'"):
        runtime.load(edited(tiny_bundle[0], tmp_path / "c", shared)).run("t2i", "x", steps=1)


def test_a_shared_network_is_listed_once(make_shared: Callable[..., Path]) -> None:
    manifest = bundle.read(make_shared())
    assert [where for where, _ in manifest.engines()] == ["text.engine", "vae_encoder", "vae_decoder", "unet"]


def test_a_network_too_large_to_be_compiled_twice_is_compiled_for_any_number_of_samples(
    make_shared: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = make_shared(-1)
    with runtime.load(root) as small:
        expected = small.run("edit", "a red fox", image=SOURCE, steps=2)
    monkeypatch.setattr("targets.openvino.engine.SMALL", 0)
    with runtime.load(root) as large:
        assert large.networks.open(large.manifest.tasks["edit"].engine).inputs["sample"].most is None  # not quantised
        given = large.run("edit", "a red fox", image=SOURCE, steps=2)
    np.testing.assert_allclose(given.latents, expected.latents, rtol=1e-4, atol=1e-5)
