"""How a TensorRT engine is built, as it stands in a bundle."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mtu_compile.core.errors import ConfigError

Shape = tuple[int, ...]
Profile = tuple[Shape, Shape, Shape]


@dataclass(frozen=True)
class Recipe:
    """How an engine is built, beside what the graph says.

    Attributes:
        workspace_bytes: scratch memory a layer may use, ``None`` for all of the device's.
        compute_capabilities: GPUs the engine has to run on, as ("8.6", "8.9"). TensorRT-RTX builds for them; none means
            its portable engine (8.0, 8.6, 8.9, 12.0 and later). TensorRT builds for the GPU at hand, which has to be
            one of them; none means whichever it is.
        optimization_level: TensorRT's, 0 to 5; ``None`` for its default, 3.
        profiles: smallest, usual and largest shape of every input of dynamic shape, by name; static graphs need none.
    """

    workspace_bytes: int | None = None
    compute_capabilities: tuple[str, ...] = ()
    optimization_level: int | None = None
    profiles: Mapping[str, Profile] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.workspace_bytes is not None and self.workspace_bytes <= 0:
            raise ConfigError(f"a workspace of {self.workspace_bytes} bytes is no workspace")
        if self.optimization_level not in (None, 0, 1, 2, 3, 4, 5):
            raise ConfigError(f"optimisation level {self.optimization_level} is not between 0 and 5")
        for capability in self.compute_capabilities:
            if not re.fullmatch(r"\d+\.\d", capability):
                raise ConfigError(f"{capability!r} is not a compute capability", hint="write it as 8.9")
        for name, profile in self.profiles.items():
            if len({len(shape) for shape in profile}) != 1 or any(size < 1 for shape in profile for size in shape):
                raise ConfigError(f"the shapes of input {name!r} are not three shapes of one rank")

    def to_config(self) -> dict[str, str]:
        """As an engine's config in a bundle; what is not set is left out."""
        config: dict[str, str] = {}
        if self.workspace_bytes is not None:
            config["workspace_bytes"] = str(self.workspace_bytes)
        if self.compute_capabilities:
            config["compute_capabilities"] = ",".join(self.compute_capabilities)
        if self.optimization_level is not None:
            config["optimization_level"] = str(self.optimization_level)
        for name, profile in self.profiles.items():
            config[f"profile.{name}"] = ",".join("x".join(map(str, shape)) for shape in profile)
        return config

    @classmethod
    def from_config(cls, config: Mapping[str, str]) -> Recipe:
        """Read what ``to_config`` wrote; ``ConfigError`` on anything else."""
        values: dict[str, Any] = {}
        profiles: dict[str, Profile] = {}
        for key, text in config.items():
            try:
                if key in ("workspace_bytes", "optimization_level"):
                    values[key] = int(text)
                elif key == "compute_capabilities":
                    values[key] = tuple(text.split(","))
                elif key.startswith("profile."):
                    least, usual, most = (tuple(int(size) for size in shape.split("x")) for shape in text.split(","))
                    profiles[key.removeprefix("profile.")] = (least, usual, most)
                else:
                    raise ConfigError(f"a TensorRT engine has no option {key!r}")
            except ValueError as error:
                raise ConfigError(f"{text!r} is not a value for {key!r} of a TensorRT engine") from error
        return cls(**values, profiles=profiles)
