"""Which files a component's weights are read from: published folders have several precisions, whole or in shards.

A name is ``STEM[.VARIANT].safetensors``, or for shards an index ``STEM.safetensors.index[.VARIANT].json`` beside files
that carry the variant before or after their number. Only safetensors are looked at: pickles may lie beside them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from safetensors import SafetensorError, safe_open

from mtu_compile.core.errors import ModelError
from mtu_compile.core.schema import Length, Mismatch, Rule, conform, read_json, show

PICKLES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".msgpack", ".h5"})

#: Where there are several precisions, the first of these is read; ``None`` is the one without a variant.
PREFERRED = (None, "fp32", "bf16", "fp16")

_FETCH = "fetch the model again"


@dataclass(frozen=True)
class Weights:
    """The files one component is loaded from.

    Attributes:
        variant: what diffusers and transformers call ``variant`` (``"fp16"``), or ``None``.
        index: which tensor is in which shard, where there are shards.
        files: the safetensors, each whole.
        shapes: by tensor, what the files hold.
    """

    variant: str | None
    index: Path | None
    files: tuple[Path, ...]
    shapes: Mapping[str, tuple[int, ...]]

    @property
    def count(self) -> int:
        """How many numbers the tensors have together."""
        return sum(math.prod(shape) for shape in self.shapes.values())


def _is_file_name(name: str) -> bool:
    return name.endswith(".safetensors") and Path(name).name == name and "\\" not in name and "\0" not in name


#: ``weight_map`` of an index: tensor → shard.
WeightMap = Annotated[
    Mapping[
        str, Annotated[str, Rule(_is_file_name, "the name of a safetensors file beside it, not outside its folder")]
    ],
    Length(1),
]


def find_weights(component: Path, stem: str) -> Weights:
    """The weights in the folder of one component; headers are read, tensors are not.

    Args:
        component: the folder.
        stem: ``"diffusion_pytorch_model"`` (diffusers) or ``"model"`` (transformers).

    Raises:
        ModelError: there are none, only pickles, or a file is missing, damaged or names what is outside.
    """
    whole = re.compile(rf"{re.escape(stem)}(?:\.(\w+))?\.safetensors")
    indices = re.compile(rf"{re.escape(stem)}\.safetensors\.index(?:\.(\w+))?\.json")
    single: dict[str | None, Path] = {}
    sharded: dict[str | None, Path] = {}
    names = sorted(path.name for path in component.iterdir())
    for name in names:
        if match := whole.fullmatch(name):
            single[match[1]] = component / name
        elif match := indices.fullmatch(name):
            sharded[match[1]] = component / name
    found = {*single, *sharded}
    if not found:
        raise _no_weights(component, stem, names)
    others = sorted(variant for variant in found if variant is not None)
    variant = next(one for one in (*PREFERRED, *others) if one in found)
    shards = {one: _read_index(path) for one, path in sharded.items()}
    # Where both are there diffusers takes the shards, transformers the file.
    if variant in sharded and not (variant in single and stem == "model"):
        files = tuple(component / name for name in sorted(set(shards[variant].values())))
        shapes = _in_shards(sharded[variant], shards[variant])
        return Weights(variant, sharded[variant], files, shapes)
    return Weights(variant, None, (single[variant],), read_header(single[variant]))


def _no_weights(component: Path, stem: str, names: list[str]) -> ModelError:
    if other := [name for name in names if name.endswith(".safetensors")]:
        wanted = f"{stem}.safetensors.index.json" if re.search(r"-\d+-of-\d+", other[0]) else f"{stem}.safetensors"
        return ModelError(f"{component} has {other[0]}, but no {wanted}", hint=_FETCH)
    if pickles := [name for name in names if Path(name).suffix in PICKLES]:
        return ModelError(
            f"{component / pickles[0]} is not safetensors, and pickles are not read",
            hint="save the model again with save_pretrained(..., safe_serialization=True)",
        )
    return ModelError(f"{component} has no weights ({stem}.safetensors)", hint=_FETCH)


def _read_index(path: Path) -> dict[str, str]:
    """Tensor → file name of an index; the files are there."""
    data = read_json(path)
    try:
        shards = conform(WeightMap, conform(Mapping[str, Any], data).get("weight_map"), "weight_map")
    except Mismatch as mismatch:
        raise mismatch.at(path, hint=_FETCH) from mismatch
    for shard in sorted(set(shards.values())):
        if not (path.parent / shard).is_file():
            raise ModelError(f"{path.parent / shard} is missing", hint=_FETCH)
    return dict(shards)


def _in_shards(index: Path, shards: Mapping[str, str]) -> dict[str, tuple[int, ...]]:
    headers = {name: read_header(index.parent / name) for name in sorted(set(shards.values()))}
    for tensor, name in shards.items():
        if tensor not in headers[name]:
            raise ModelError(
                f"{index}: weight_map says {show(tensor)} is in {name}, which does not have it", hint=_FETCH
            )
    return {tensor: headers[name][tensor] for tensor, name in shards.items()}


def read_header(path: Path) -> dict[str, tuple[int, ...]]:
    """By tensor, its shape; ``ModelError`` if the file is damaged or truncated."""
    try:
        with safe_open(path, framework="numpy") as file:  # compares the header with the file's length
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path} is damaged or truncated: {error}", hint="fetch the file again") from error
