"""Content hashes: of one file, and of what makes a pipeline folder the model it is."""

from __future__ import annotations

import hashlib
from pathlib import Path

from mtu_compile.core.errors import ModelError
from mtu_compile.core.schema import read_json

#: What decides a model's output: weights, configs and vocabularies. Pictures, cards and logs beside them do not.
MODEL_SUFFIXES = frozenset({".safetensors", ".json", ".txt", ".model"})

#: Components of published pipelines that make no picture: they filter finished ones, or prepare those of adapters.
IGNORED = frozenset({"safety_checker", "feature_extractor", "image_encoder"})


def file_sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def model_files(folder: Path) -> tuple[str, ...]:
    """Paths, relative to a pipeline folder and sorted, of the files that make up the model.

    These are ``model_index.json`` and the weights, configs and vocabularies in the folders of the components it lists.

    Raises:
        ModelError: there is no readable ``model_index.json``.
    """
    index_file = folder / "model_index.json"
    index = read_json(index_file, hint="give a diffusers pipeline folder")
    if not isinstance(index, dict):
        raise ModelError(f"{index_file} is not a JSON object", hint="give a diffusers pipeline folder")
    components = [
        name for name, value in index.items() if isinstance(value, list) and value[:1] != [None] and name not in IGNORED
    ]
    found = [index_file, *(path for name in components for path in sorted((folder / name).rglob("*")))]
    files = {path.relative_to(folder).as_posix() for path in found if path.is_file() and path.suffix in MODEL_SUFFIXES}
    return tuple(sorted(files))


def model_sha256(folder: Path) -> str:
    """SHA-256 over the lines ``<sha256 of the file>  <relative path>`` of a pipeline folder's ``model_files``."""
    lines = (f"{file_sha256(folder / name)}  {name}\n" for name in model_files(folder))
    return hashlib.sha256("".join(lines).encode()).hexdigest()
