"""What a ``scheduler_config.json`` may say: every option of a sampler, its default, and what is implemented.

A sampler lists all options its namesake in diffusers has, also those it does not implement: for these only the value
that changes nothing is accepted, so that a configuration diffusers would obey is never quietly ignored.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from mtu_compile.core.errors import ConfigError
from mtu_compile.runtime.schedulers.noise_schedule import BETA_SCHEDULES

#: More timesteps than any model is trained with; keeps a damaged file from asking for gigabytes.
MOST_TRAIN_STEPS = 100_000

#: Noise variances that are neither nothing nor everything in float32.
BETAS = (1e-7, 0.9999)


@dataclass(frozen=True)
class Option:
    """One option.

    Attributes:
        default: its value where a configuration leaves it out; ``None`` is accepted where it is the default.
        wanted: what values are accepted, for messages.
        accept: the value to use; ``ValueError`` for one that is not accepted.
    """

    default: Any
    wanted: str
    accept: Callable[[Any], Any]


Options = Mapping[str, Option]


def flag(default: bool) -> Option:
    """True or false; ``null`` is false, as in diffusers."""

    def accept(value: Any) -> bool:
        if value is None or isinstance(value, bool):
            return bool(value)
        raise ValueError

    return Option(default, "true or false", accept)


def number(default: float | None, low: float = -math.inf, high: float = math.inf) -> Option:
    """A number from ``low`` to ``high``; infinities may be written as strings, as a manifest does."""

    def accept(value: Any) -> float:
        if value in ("inf", "-inf"):
            value = float(value)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
            raise ValueError
        try:
            return float(value)
        except OverflowError:  # a whole number of more than 308 digits
            raise ValueError from None

    bounds = "a number" if math.isinf(high) else f"a number from {low:g} to {high:g}"
    return Option(default, bounds, accept)


def count(default: int, low: int, high: int) -> Option:
    """A whole number from ``low`` to ``high``."""

    def accept(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise ValueError
        return value

    return Option(default, f"a whole number from {low} to {high}", accept)


def one_of(default: Any, *values: Any, reads: Mapping[Any, Any] | None = None) -> Option:
    """One of ``default`` and ``values``; or a key of ``reads``, which diffusers takes for the value it maps to."""
    allowed = (default, *values)

    def accept(value: Any) -> Any:
        known = next((one for one in allowed if one == value and type(one) is type(value)), None)
        if known is not None:
            return known
        if isinstance(value, str) and reads and value in reads:
            return reads[value]
        raise ValueError

    return Option(default, ", ".join(map(str, allowed)), accept)


def neutral(default: Any, *others: Any) -> Option:
    """An option that is not implemented: only its default and ``others``, which change nothing, are accepted."""

    def accept(value: Any) -> Any:
        if any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in (default, *others)):
            return value
        if default is False and value is None:
            return False
        raise ValueError

    return Option(default, f"{default!r}, or leaving it out", accept)


def unused(default: Any) -> Option:
    """An option that has no effect unless another one, which is not implemented, is set: accepted whatever it is."""
    return Option(default, "anything", lambda value: value)


def _betas(value: Any) -> list[float]:
    if not isinstance(value, (list, tuple)) or not 1 <= len(value) <= MOST_TRAIN_STEPS:
        raise ValueError
    one_beta = number(None, *BETAS)
    return [one_beta.accept(beta) for beta in value]


def training(start: float = 0.0001, end: float = 0.02, schedule: str = "linear") -> Options:
    """The options of the noise schedule, with a class's own defaults."""
    return {
        "num_train_timesteps": count(1000, 2, MOST_TRAIN_STEPS),
        "beta_start": number(start, *BETAS),
        "beta_end": number(end, *BETAS),
        "beta_schedule": one_of(schedule, *(name for name in BETA_SCHEDULES if name != schedule)),
        "trained_betas": Option(None, "a list of numbers between 0 and 1", _betas),
    }


def spacing(default: str) -> Options:
    """The options of where the timesteps lie."""
    others = [name for name in ("leading", "linspace", "trailing") if name != default]
    return {"timestep_spacing": one_of(default, *others), "steps_offset": count(0, 0, MOST_TRAIN_STEPS)}


#: Dynamic thresholding is for models of pixels.
NO_THRESHOLDING: Options = {
    "thresholding": neutral(False),
    "dynamic_thresholding_ratio": unused(0.995),
    "sample_max_value": unused(1.0),
}

#: Karras' and exponential spacing; the quantiles of the beta distribution want scipy, which a board does not have.
SPREADS: Options = {
    "use_karras_sigmas": flag(False),
    "use_exponential_sigmas": flag(False),
    "use_beta_sigmas": neutral(False),
}

#: Flow matching is another family of models.
NO_FLOW: Options = {
    "use_flow_sigmas": neutral(False),
    "flow_shift": unused(1.0),
    "use_dynamic_shifting": neutral(False),
    "time_shift_type": unused("exponential"),
}


def read(sampler: str, options: Options, config: Mapping[str, Any]) -> dict[str, Any]:
    """The value of every option, by name.

    What ``config`` left out (``_use_default_values`` of diffusers counts as left out) has the sampler's own default,
    which may be another than that of the class that wrote the configuration.

    Raises:
        ConfigError: naming the option and its value.
    """
    listed = config.get("_use_default_values")
    unset = listed if isinstance(listed, (list, tuple)) else ()
    values: dict[str, Any] = {}
    for name, option in options.items():
        if name not in config or name in unset or (config[name] is None and option.default is None):
            values[name] = option.default
            continue
        try:
            values[name] = option.accept(config[name])
        except ValueError:
            shown = repr(config[name])
            raise ConfigError(
                f"the {sampler} sampler does not implement {name}={shown if len(shown) <= 60 else shown[:57] + '...'} "
                "of the scheduler's configuration",
                hint=f"implemented: {option.wanted}; or choose another one with --scheduler",
            ) from None
    betas = values.get("trained_betas")
    if betas is not None and len(betas) != values["num_train_timesteps"]:
        raise ConfigError(
            f"trained_betas of the scheduler's configuration has {len(betas)} values, and num_train_timesteps is "
            f"{values['num_train_timesteps']}",
            hint="one value for each timestep",
        )
    return values
