"""Pipeline folders: what may be read from one, and what may be replaced by one.

Weights are read from safetensors only, components only of the classes named here, and no path is followed out of the
folder; code in a folder is never run.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import transformers

from mtu_compile.core.errors import ConfigError, ModelError, first_line
from mtu_compile.core.families import FAMILIES, Family, family_of
from mtu_compile.core.files import is_inside
from mtu_compile.core.hashing import IGNORED
from mtu_compile.core.schema import Mismatch, conform, read_json
from mtu_compile.model.configs import check_configs
from mtu_compile.model.finite import check_weights
from mtu_compile.model.networks import check_network, outline
from mtu_compile.model.weights import Weights, find_weights

INDEX = "model_index.json"

#: Component → classes it may have. ``None`` stands for any scheduler of diffusers.
CLASSES: dict[str, tuple[str, ...] | None] = {
    "unet": ("UNet2DConditionModel", "MTUUNet2DConditionModel"),
    "vae": ("AutoencoderKL",),
    "scheduler": None,
    **{branch.encoder: (branch.kind,) for family in FAMILIES.values() for branch in family.texts},
    # CLIPTokenizerFast is CLIPTokenizer's other name since transformers 5.
    **{
        branch.tokenizer: ("CLIPTokenizer", "CLIPTokenizerFast")
        for family in FAMILIES.values()
        for branch in family.texts
    },
}

#: Components that hold weights, and the stem of their files' names.
MODELS: dict[str, str] = {
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    **{branch.encoder: "model" for family in FAMILIES.values() for branch in family.texts},
}

#: Keys of an index that are no components, and say how a pipeline of a family works.
ZEROS_FOR_EMPTY, AESTHETICS = "force_zeros_for_empty_prompt", "requires_aesthetics_score"

#: What an index says of a component: its library and class, or null for what the pipeline goes without.
Entry = tuple[str | None, str | None]


def read_index(folder: Path) -> dict[str, tuple[str, str]]:
    """Component → (library, class) of a pipeline folder.

    What filters or measures pictures (``core.hashing.IGNORED``) is left out, and never loaded.

    Raises:
        ModelError: not a pipeline folder, or a component of a class that is not known (it is never imported).
    """
    if not folder.is_dir():
        raise ModelError(f"{folder} is not a folder", hint="give a diffusers pipeline folder")
    path = folder / INDEX
    if not path.is_file():
        raise ModelError(f"{folder} has no {INDEX}", hint="give a diffusers pipeline folder")
    listed = {}
    try:
        index = conform(Mapping[str, Any], read_json(path))
        _check_settings(path, index)
        for name, value in index.items():
            if name in CLASSES or (isinstance(value, list) and not name.startswith("_")):
                library, kind = conform(Entry, value, name)
                if name not in IGNORED and library is not None and kind is not None:
                    listed[name] = (library, kind)
    except Mismatch as mismatch:
        raise mismatch.at(path, hint="fetch the model again") from mismatch
    for name, (library, kind) in listed.items():
        if name not in CLASSES:
            raise ModelError(
                f"{path}: {name}, a {library}.{kind}, is not part of the pipelines that can be compiled",
                hint=f"known are {', '.join(CLASSES)}; {', '.join(sorted(IGNORED))} are left out",
            )
        known = CLASSES[name]
        if (known is not None and kind not in known) or (known is None and library != "diffusers"):
            raise ModelError(
                f"{path}: {name} is a {library}.{kind}, which is not known",
                hint=f"{name} has to be {'one of ' + ', '.join(known) if known else 'a scheduler of diffusers'}",
            )
    if missing := family_of(listed).components - listed.keys():
        raise ModelError(f"{path} does not list {', '.join(sorted(missing))}", hint="fetch the model again")
    return listed


def _check_settings(path: Path, index: Mapping[str, Any]) -> None:
    """Refuse a setting of the wrong kind, or one that the compiled pipeline would not obey."""
    for key in (ZEROS_FOR_EMPTY, AESTHETICS):
        conform(bool | None, index.get(key), key)
    if index.get(AESTHETICS):
        raise ModelError(
            f"{path}: {AESTHETICS} is true: the UNet is told how beautiful a picture is to be, which is no input here",
            hint="compile the base model; the refiner that follows it is not supported",
        )


def zeros_for_empty_prompt(folder: Path, family: Family) -> bool:
    """Whether an empty negative prompt is all zeros to the UNet of a checked folder (``force_zeros_for_empty_prompt``).

    Where the index does not say it is, as in diffusers, for a family whose UNet takes pooled embeddings.
    """
    given = read_json(folder / INDEX).get(ZEROS_FOR_EMPTY)
    return bool(family.conditions) if given is None else bool(given) and bool(family.conditions)


def check_folder(folder: Path, *, tried: bool = False) -> dict[str, tuple[str, str]]:
    """``read_index``, and every component's files are there, whole, finite, inside the folder, and belong together.

    Args:
        tried: that the weights are finite was seen before, on the same files.

    Raises:
        ModelError: naming the file, and the key where it is one.
    """
    listed = read_index(folder)
    weights = {name: _check_component(folder, folder / name, MODELS.get(name)) for name in listed}
    check_configs(folder, listed)
    for name, found in weights.items():
        if found is not None:
            check_network(listed[name][1], folder / name / "config.json", found)
    if tried:
        return listed
    for path in dict.fromkeys(file for found in weights.values() if found is not None for file in found.files):
        check_weights(path)
    return listed


def _check_component(folder: Path, component: Path, stem: str | None) -> Weights | None:
    if not component.is_dir():
        raise ModelError(f"{component} is missing", hint="fetch the model again")
    for path in (component, *sorted(path for path in component.rglob("*") if not path.is_dir())):
        if not is_inside(folder, path):
            raise ModelError(f"{path} points out of {folder}", hint="copy the file into the folder")
        if path.suffix == ".json":
            read_json(path, hint="fetch the model again", infinities=component.name == "scheduler")
    if stem is None:
        return None
    if not (component / "config.json").is_file():
        raise ModelError(f"{component / 'config.json'} is missing", hint="fetch the model again")
    return find_weights(component, stem)


def load_component(cls: Any, folder: Path, *, dtype: Any) -> Any:
    """``cls.from_pretrained(folder)`` of a checked model component, with every weight really read.

    Raises:
        ModelError: weights are missing or of another shape (diffusers and transformers would go on with random ones).
    """
    kind = "dtype" if cls.__module__.startswith("transformers") else "torch_dtype"
    weights = weights_of(cls, folder)
    try:
        with silent_libraries():
            model, info = cls.from_pretrained(
                folder,
                use_safetensors=True,
                local_files_only=True,
                output_loading_info=True,
                variant=weights.variant,
                **{kind: dtype},
            )
    except ModelError:
        raise
    except Exception as error:  # libraries raise what they like; --debug shows it
        raise ModelError(
            f"{folder} cannot be loaded: {first_line(error)}", hint="fetch or build the model again"
        ) from error
    missing = [*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])]
    if missing:
        raise ModelError(
            f"{folder} lacks {len(missing)} weights, the first is {sorted(missing)[0]!r}",
            hint="the weights and config.json do not belong together; fetch or build the model again",
        )
    return model.eval()


def weights_of(cls: Any, folder: Path) -> Weights:
    """The weights in the folder of a component of class ``cls``; ``ModelError`` as ``find_weights``."""
    return find_weights(folder, "model" if cls.__module__.startswith("transformers") else MODELS["unet"])


def outline_component(cls: Any, folder: Path, *, dtype: Any) -> Any:
    """``load_component`` without a weight read: all but the numbers, in no memory (PyTorch's ``meta`` device)."""
    network = outline(cls, folder / "config.json")
    return network if network.dtype == dtype else network.to(dtype)


@contextmanager
def silent_libraries() -> Iterator[None]:
    """Keep diffusers and transformers from drawing progress bars of their own over the command's."""
    libraries = (diffusers.utils.logging, transformers.utils.logging)
    drawing = [library for library in libraries if library.is_progress_bar_enabled()]
    for library in drawing:
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library in drawing:
            library.enable_progress_bar()


def check_destination(destination: Path, *, force: bool) -> None:
    """``ConfigError`` unless ``destination`` is free, or ``force`` is set and it is a model folder or empty.

    Asked before long work; ``core.atomic.staging`` asks again when the folder is written.
    """
    if not destination.exists() and not destination.is_symlink():
        return
    if not force:
        raise ConfigError(f"{destination} exists", hint="choose another folder, or add --force to replace it")
    if not destination.is_dir() or (any(destination.iterdir()) and not (destination / INDEX).is_file()):
        raise ConfigError(f"{destination} exists and is not a model folder", hint="choose another folder")


def make_portable(folder: Path) -> None:
    """Take out of a written pipeline folder what belongs to the machine it was written on.

    diffusers records the folder each part was loaded from (``_name_or_path``), and safetensors writes files that only
    their owner may read.
    """
    for config in sorted(folder.rglob("config.json")):
        data = json.loads(config.read_text(encoding="utf-8"))
        if data.pop("_name_or_path", None) is not None:
            config.write_text(json.dumps(data, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    for weights in folder.rglob("*.safetensors"):
        weights.chmod(0o644)
