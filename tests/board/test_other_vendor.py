"""A vendor of another package, known by its entry point alone: a board shows it, builds with it, opens its engines."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from mtu_compile import bundle, runtime
from mtu_compile.board import build_bundle
from mtu_compile.cli.board import command
from mtu_compile.core import vendors
from mtu_compile.core.errors import BundleError, TargetError
from mtu_compile.core.vendors import Vendor
from mtu_compile.runtime import Request, built
from tests.board.toy_vendor import VENDOR, Chip, ToyBuilder, ToyEngine


class Entry:
    """What ``importlib.metadata`` finds of the other package."""

    name = "toy"

    @staticmethod
    def load() -> Vendor:
        return VENDOR


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Iterator[ToyBuilder]:
    module: Any = ModuleType("toy_vendor")
    module.ToyEngine, module.BUILDER = ToyEngine, ToyBuilder()
    monkeypatch.setitem(sys.modules, "toy_vendor", module)
    monkeypatch.setattr(vendors, "entry_points", lambda group: [Entry] if group == vendors.GROUP else [])
    vendors.vendors.cache_clear()
    yield module.BUILDER
    vendors.vendors.cache_clear()


def test_a_board_builds_and_runs_what_it_knows_from_an_entry_point(
    toy: ToyBuilder, make_bundle: Callable[..., Path]
) -> None:
    root = make_bundle("toy", {})
    with pytest.raises(TargetError, match="nothing was built"), runtime.load(root) as loaded:
        loaded.run("t2i", "a red cat")
    result = build_bundle(root)
    assert len(result.engines) == 5 and result.notes == ("5 networks for the toy",)
    assert {one.toolchain for one in result.engines} == {"toy 1"}
    assert json.loads((root / built.INDEX).read_text())["engines"]["unet/model.onnx"]["device"] == {"revision": "A1"}
    with runtime.load(root) as loaded:
        assert loaded.run("t2i", "a red cat").image.size == (32, 32)


def test_a_board_builds_a_unet_that_tasks_share_once(toy: ToyBuilder, make_bundle: Callable[..., Path]) -> None:
    root = make_bundle("toy", {}, shared=True)
    result = build_bundle(root)
    assert [one.graph for one in result.engines][-1:] == ["unet/model.onnx"] and len(result.engines) == 4
    assert len(build_bundle(root).reused) == 4
    picture = Image.new("RGB", (32, 32), "red")
    with runtime.load(root) as loaded:
        first = loaded.run("t2i", "a red cat").latents
        other = loaded.run("edit", "make it blue", image=picture).latents
        both = loaded.run_batch([Request("edit", "make it blue", image=picture), Request("t2i", "a red cat")])
        np.testing.assert_allclose(both[0].latents, other, atol=1e-5)
        np.testing.assert_allclose(both[1].latents, first, atol=1e-5)
        assert not both[0].notices and sum(path.startswith("unet") for path in loaded.networks.engines) == 1


def test_an_engine_of_another_revision_is_refused_in_the_vendors_words(
    toy: ToyBuilder, make_bundle: Callable[..., Path]
) -> None:
    root = make_bundle("toy", {})
    build_bundle(root)
    toy.chip = Chip("B2")
    manifest = bundle.read(root)
    with pytest.raises(TargetError, match="it is for revision A1, and this is B2"):
        built.find(root, manifest, manifest.tasks["t2i"].engine)
    assert build_bundle(root).reused == ()


def test_a_board_shows_every_vendor_it_knows(toy: ToyBuilder) -> None:
    shown = CliRunner().invoke(command, ["info"])
    assert shown.exit_code == 0 and "toy:          A1" in shown.output and "TensorRT:" in shown.output
    body = json.loads(CliRunner().invoke(command, ["info", "--json"]).output)["board"]
    assert body["toy"] == "A1" and {"gpu", "tensorrt", "missing"} <= body.keys()


def test_without_the_entry_point_its_bundle_is_refused(make_bundle: Callable[..., Path]) -> None:
    with pytest.raises(BundleError, match='kind is "toy", expected one of openvino'):
        make_bundle("toy", {})
