"""What was chosen, everything it was chosen by, and its form in a manifest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from calibration.mixed.evaluating import Criteria

Why = Literal["accuracy", "slower"]

#: Fields of a layer that are numbers where they are not ``None``; infinity comes from a manifest as a word.
_NUMBERS = ("sqnr_db", "worst_sqnr_db", "guidance_db", "float_ms", "int8_ms")


@dataclass(frozen=True)
class LayerChoice:
    """One unit of layers that are quantised together.

    Attributes:
        name, members, op: see ``calibration.units.Unit``.
        sqnr_db, worst_sqnr_db: of the UNet's output when only these are INT8: pooled over the calls, the worst call.
        guidance_db: of the guidance delta, pooled, in the worst direction; ``None`` without guidance.
        float_ms, int8_ms: what they cost on the device, ``None`` where nothing is known.
        kept: why they stay float, or ``None`` where they are INT8.
    """

    name: str
    members: tuple[str, ...]
    op: str
    sqnr_db: float
    worst_sqnr_db: float
    guidance_db: float | None
    float_ms: float | None
    int8_ms: float | None
    kept: Why | None

    @property
    def gain_ms(self) -> float | None:
        """Milliseconds that INT8 saves."""
        return None if self.float_ms is None or self.int8_ms is None else self.float_ms - self.int8_ms

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> LayerChoice:
        """From a manifest."""
        decibels = {key: None if data[key] is None else float(data[key]) for key in _NUMBERS}
        return cls(**{**data, **decibels, "members": tuple(map(str, data["members"]))})


@dataclass(frozen=True)
class MixedPrecision:
    """What was chosen, and everything it was chosen by.

    Attributes:
        criteria: what had to be met.
        met: whether the choice, run as a whole, meets them.
        calls: UNet calls each layer was measured on.
        check_calls: UNet calls the whole was run on.
        layers: every unit, in graph order.
        costs: where the times come from, and whether they were measured on the device.
        all_int8: accuracy with everything in INT8.
        chosen: accuracy of the choice.
    """

    criteria: Criteria
    met: bool
    calls: int
    check_calls: int
    layers: tuple[LayerChoice, ...]
    costs: Mapping[str, Any] | None
    all_int8: Mapping[str, Any]
    chosen: Mapping[str, Any]

    @property
    def float_layers(self) -> tuple[str, ...]:
        """Node names of the layers that stay float."""
        return tuple(name for layer in self.layers if layer.kept for name in layer.members)

    @property
    def kept(self) -> tuple[LayerChoice, ...]:
        """The units that stay float, most sensitive first."""
        return tuple(sorted((layer for layer in self.layers if layer.kept), key=lambda layer: layer.sqnr_db))

    def to_json(self) -> dict[str, Any]:
        """For the manifest."""
        return {**asdict(self), "layers": [{**asdict(layer), "members": list(layer.members)} for layer in self.layers]}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> MixedPrecision:
        """The inverse of ``to_json``; ``KeyError``, ``TypeError`` or ``ValueError`` for what is none."""
        layers = tuple(LayerChoice.from_json(layer) for layer in data["layers"])
        return cls(**{**data, "layers": layers, "criteria": Criteria(**data["criteria"])})


def to_blame(record: Mapping[str, Any] | None, count: int = 3) -> str:
    """In words, the INT8 layers of a recorded choice (``MixedPrecision.to_json``) that cost the most accuracy."""
    layers = [layer for layer in (record or {}).get("layers", ()) if layer["kept"] is None]
    worst = sorted(layers, key=lambda layer: float(layer["sqnr_db"]))[:count]
    return ", ".join(f"{layer['name']} ({layer['sqnr_db']:.1f} dB alone)" for layer in worst)
