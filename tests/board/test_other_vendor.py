"""A vendor of another package, known by its entry point alone: a board shows it, builds with it, opens its engines."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from mtu_compile import bundle, runtime
from mtu_compile.board import build_bundle
from mtu_compile.bundle import EngineRef
from mtu_compile.cli.board import command
from mtu_compile.core import vendors
from mtu_compile.core.errors import BundleError, TargetError
from mtu_compile.core.vendors import Vendor
from mtu_compile.runtime import Request, built
from mtu_compile.runtime.builder import Built, Host
from targets.onnxruntime.engine import OnnxRuntimeEngine


@dataclass(frozen=True)
class Chip:
    """The fingerprint of a toy's chip."""

    revision: str

    def foreign(self, kind: str, recipe: Mapping[str, str], here: Any) -> str | None:
        return None if self == here else f"it is for revision {self.revision}, and this is {here.revision}"


@dataclass(frozen=True)
class Toy:
    """A machine with a toy chip."""

    device: str = "toy"
    free_bytes: int | None = None
    missing: Mapping[str, TargetError] = field(default_factory=dict)
    chip: Chip = Chip("A1")

    def fingerprint(self, kind: str) -> Chip:
        return self.chip

    def check(self, target: str, refs: Sequence[EngineRef], requirements: Any) -> tuple[str, ...]:
        return (f"{len(refs)} networks for the toy",)

    def rows(self) -> tuple[tuple[str, str], ...]:
        return (("toy", self.chip.revision),)

    def to_json(self) -> dict[str, Any]:
        return {"toy": self.chip.revision}


class ToyBuilder:
    """Copies the graph."""

    peak_factor, engine_factor = 1.0, 1.0
    chip = Chip("A1")

    def probe(self, host: Host) -> Toy:
        return Toy(chip=self.chip)

    def fingerprint(self, kind: str) -> Chip:
        return self.chip

    def read_fingerprint(self, raw: Mapping[str, Any]) -> Chip:
        return Chip(**raw)

    def build(self, graph: Path, out: Path, config: Any, *, kind: str, folder: Path, advance: Any) -> Built:
        out.write_bytes(graph.read_bytes())
        return Built(out, 0.1, out.stat().st_size, "toy 1")


class ToyEngine(OnnxRuntimeEngine):
    """Opens what was built, and nothing else."""

    def __init__(self, path: Path, config: Any, prebuilt: Path | None = None, cache: Path | None = None) -> None:
        if prebuilt is None:
            raise TargetError("nothing was built")
        super().__init__(prebuilt, config)


class Entry:
    """What ``importlib.metadata`` finds of the other package."""

    name = "toy"

    @staticmethod
    def load() -> Vendor:
        return Vendor(engines={"toy": "toy_vendor:ToyEngine"}, builders={"toy": "toy_vendor:BUILDER"})


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
