"""A vendor of another package, which needs nothing of the tests: its engines are copies of graphs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mtu_compile.bundle import EngineRef
from mtu_compile.core.errors import TargetError
from mtu_compile.core.vendors import Vendor
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


BUILDER = ToyBuilder()
VENDOR = Vendor(engines={"toy": "toy_vendor:ToyEngine"}, builders={"toy": "toy_vendor:BUILDER"})
