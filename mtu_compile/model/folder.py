"""Pipeline folders: what may be read from one, and what may be replaced by one.

Weights are read from safetensors only, components only of the classes named here, and no path is followed out of the
folder; code in a folder is never run.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import transformers
from safetensors import SafetensorError, safe_open

from mtu_compile.core.errors import ConfigError, ModelError

INDEX = "model_index.json"
PICKLES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".msgpack", ".h5"})

#: Component → classes it may have. ``None`` stands for any scheduler of diffusers.
CLASSES: dict[str, tuple[str, ...] | None] = {
    "unet": ("UNet2DConditionModel", "MTUUNet2DConditionModel"),
    "vae": ("AutoencoderKL",),
    "text_encoder": ("CLIPTextModel",),
    "text_encoder_2": ("CLIPTextModelWithProjection",),
    # CLIPTokenizerFast is CLIPTokenizer's other name since transformers 5.
    "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),
    "tokenizer_2": ("CLIPTokenizer", "CLIPTokenizerFast"),
    "scheduler": None,
}

#: Components that hold weights.
MODELS = ("unet", "vae", "text_encoder", "text_encoder_2")


def read_index(folder: Path) -> dict[str, tuple[str, str]]:
    """Component → (library, class) of a pipeline folder, as far as a multi-task pipeline knows the component.

    Raises:
        ModelError: not a pipeline folder, or a component of a class that is not known (it is never imported).
    """
    if not folder.is_dir():
        raise ModelError(f"{folder} is not a folder", hint="give a diffusers pipeline folder")
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        listed = {
            name: (str(value[0]), str(value[1]))
            for name, value in index.items()
            if name in CLASSES and value[0] is not None
        }
    except FileNotFoundError as error:
        raise ModelError(f"{folder} has no {INDEX}", hint="give a diffusers pipeline folder") from error
    except (OSError, ValueError, AttributeError, TypeError, LookupError) as error:
        raise ModelError(f"{folder / INDEX} can not be read: {error}", hint="fetch the model again") from error
    for name, (library, kind) in listed.items():
        known = CLASSES[name]
        if (known is not None and kind not in known) or (known is None and library != "diffusers"):
            raise ModelError(
                f"{folder / INDEX}: {name} is a {library}.{kind}, which is not known",
                hint=f"{name} has to be {'one of ' + ', '.join(known) if known else 'a scheduler of diffusers'}",
            )
    if missing := {"unet", "vae", "text_encoder", "tokenizer", "scheduler"} - listed.keys():
        raise ModelError(f"{folder / INDEX} does not list {', '.join(sorted(missing))}", hint="fetch the model again")
    return listed


def check_folder(folder: Path) -> dict[str, tuple[str, str]]:
    """``read_index``, and every component's files are there, whole, inside the folder and not pickles.

    Raises:
        ModelError: naming the file.
    """
    listed = read_index(folder)
    for name in listed:
        _check_component(folder, folder / name, has_weights=name in MODELS)
    return listed


def _check_component(folder: Path, component: Path, *, has_weights: bool) -> None:
    if not component.is_dir():
        raise ModelError(f"{component} is missing", hint="fetch the model again")
    files = sorted(path for path in component.rglob("*") if not path.is_dir())
    for path in (component, *files):
        if not _is_inside(folder, path):
            raise ModelError(f"{path} points out of {folder}", hint="copy the file into the folder")
        if path.suffix == ".json":
            _check_json(path)
    if not has_weights:
        return
    if not (component / "config.json").is_file():
        raise ModelError(f"{component / 'config.json'} is missing", hint="fetch the model again")
    weights = [path for path in files if path.suffix == ".safetensors"]
    if not weights:
        if pickles := [path for path in files if path.suffix in PICKLES]:
            raise ModelError(
                f"{pickles[0]} is not safetensors, and pickles are not read",
                hint="save the model again with save_pretrained(..., safe_serialization=True)",
            )
        raise ModelError(f"{component} has no weights (*.safetensors)", hint="fetch the model again")
    for path in weights:
        _check_safetensors(path)
    for path in files:
        if path.name.endswith(".safetensors.index.json"):
            _check_shards(path)


def _is_inside(folder: Path, path: Path) -> bool:
    real = path.resolve()
    roots = [folder.resolve()]
    if roots[0].parent.name == "snapshots":
        # A snapshot in the Hugging Face cache is made of links into its own store of blobs.
        roots.append(roots[0].parents[1] / "blobs")
    return any(real.is_relative_to(root) for root in roots)


def _check_json(path: Path) -> None:
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} can not be read: {error}", hint="fetch the model again") from error


def _check_safetensors(path: Path) -> None:
    try:
        with safe_open(path, framework="numpy"):
            pass  # opening checks the header against the file's length
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path} is damaged or truncated: {error}", hint="fetch the file again") from error


def _check_shards(path: Path) -> None:
    """The shards an index names lie beside it and are there."""
    shards = json.loads(path.read_text(encoding="utf-8")).get("weight_map", {}).values()
    for shard in sorted(set(map(str, shards))):
        if Path(shard).name != shard:
            raise ModelError(f"{path} names {shard!r}, outside its folder", hint="fetch the model again")
        if not (path.parent / shard).is_file():
            raise ModelError(f"{path.parent / shard} is missing", hint="fetch the model again")


def load_component(cls: Any, folder: Path, *, dtype: Any) -> Any:
    """``cls.from_pretrained(folder)`` of a checked model component, with every weight really read.

    Raises:
        ModelError: weights are missing or of another shape (diffusers and transformers would go on with random ones).
    """
    kind = "dtype" if cls.__module__.startswith("transformers") else "torch_dtype"
    variant = None
    if not list(folder.glob("*.safetensors.index.json")):
        plain = [path for path in folder.glob("*.safetensors") if ".fp16." not in path.name]
        variant = None if plain else "fp16"
    try:
        with silent_libraries():
            model, info = cls.from_pretrained(
                folder,
                use_safetensors=True,
                local_files_only=True,
                output_loading_info=True,
                variant=variant,
                **{kind: dtype},
            )
    except ModelError:
        raise
    except (OSError, ValueError, TypeError, RuntimeError, KeyError, NotImplementedError, SafetensorError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(f"{folder} can not be loaded: {first}", hint="fetch or build the model again") from error
    missing = [*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])]
    if missing:
        raise ModelError(
            f"{folder} lacks {len(missing)} weights, the first is {sorted(missing)[0]!r}",
            hint="the weights and config.json do not belong together; fetch or build the model again",
        )
    return model.eval()


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
