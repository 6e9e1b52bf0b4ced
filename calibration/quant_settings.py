"""How a graph is quantised."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from types import NoneType
from typing import Any

from mtu_compile.core.errors import ConfigError

#: Range estimators of activations, by NNCF's name for them (``RangeEstimatorParametersSet``).
RANGE_ESTIMATORS = {
    "minmax": "MINMAX",
    "mean-minmax": "MEAN_MINMAX",
    "median-minmax": "MEDIAN_MINMAX",
    "histogram": "HISTOGRAM",
}


@dataclass(frozen=True)
class QuantSettings:
    """How a graph is quantised.

    Attributes:
        subset_size: calibration samples used, spread evenly over the set; ``None`` for all of them.
        smooth_quant_alpha: SmoothQuant's migration strength of linear layers, 0 to 1; ``None`` switches it off. 0.95 is
            NNCF's default for transformers.
        range_estimator: what becomes of an activation's values over the samples: one of ``RANGE_ESTIMATORS``. NNCF's
            default is the mean of the samples' extremes; a histogram whose range costs the least squared error is
            better where timesteps differ much (emoji example, text-to-image: worst call 26.3 dB instead of 21.2).
        weight_bits_fix: NNCF's overflow fix: the first layers' weights lose a bit, for CPUs that add products of 8 bits
            in 16 (AVX2 without VNNI). Everything this project builds for adds them in 32.
        fast_bias_correction: correct biases for the shift that quantised weights cause. ``False`` leaves them alone
            (NNCF's slow correction, which it would fall back to, breaks ONNX graphs after SmoothQuant: 3.4.0).
        ignored_scopes: what stays float: names of nodes, operation types, or regular expressions that match whole
            node names, looked up in this order. One that matches nothing is an error.
    """

    subset_size: int | None = None
    smooth_quant_alpha: float | None = 0.95
    range_estimator: str = "mean-minmax"
    weight_bits_fix: bool = False
    fast_bias_correction: bool = True
    ignored_scopes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.subset_size is not None and self.subset_size < 1:
            raise ConfigError(f"subset size {self.subset_size} is not at least 1")
        if self.smooth_quant_alpha is not None and not 0 <= self.smooth_quant_alpha <= 1:
            raise ConfigError(f"smooth-quant alpha {self.smooth_quant_alpha} is not between 0 and 1")
        if self.range_estimator not in RANGE_ESTIMATORS:
            known = ", ".join(RANGE_ESTIMATORS)
            raise ConfigError(f"there is no range estimator {self.range_estimator!r}", hint=f"known: {known}")

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "ignored_scopes": list(self.ignored_scopes)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> QuantSettings:
        """The inverse of ``to_json``; ``ConfigError`` naming what is unknown or of the wrong kind."""
        kinds: dict[str, tuple[type, ...]] = {
            "subset_size": (int, NoneType),
            "smooth_quant_alpha": (int, float, NoneType),
            "range_estimator": (str,),
            "weight_bits_fix": (bool,),
            "fast_bias_correction": (bool,),
            "ignored_scopes": (list,),
        }
        for name, value in data.items():
            if name not in kinds:
                raise ConfigError(f"unknown setting {name!r}", hint=f"known: {', '.join(kinds)}")
            strings = name != "ignored_scopes" or (isinstance(value, list) and all(type(v) is str for v in value))
            if type(value) not in kinds[name] or not strings:
                raise ConfigError(f"setting {name!r} is {value!r}, which is not what belongs there")
        return cls(**{**data, "ignored_scopes": tuple(data.get("ignored_scopes", ()))})
