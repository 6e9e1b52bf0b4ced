"""What OpenVINO GenAI and optimum-intel read beside the IRs (docs/interop.md)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from targets.openvino.tokenizer_ir import convert_tokenizer


def write_layout(folder: Path, index: Mapping[str, Any] | None, configs: Mapping[str, Mapping[str, Any]]) -> None:
    """Write the files beside the engines in ``folder``; a part whose folder is not there is left out.

    Args:
        folder: a bundle, with its ``tokenizer/``, and ``tokenizer_2/`` if it has a second.
        index: ``model_index.json``, if there is to be one.
        configs: ``config.json`` by folder.
    """
    if index is not None:
        _dump(folder / "model_index.json", index)
    for name, config in configs.items():
        if (folder / name).is_dir():
            _dump(folder / name / "config.json", config)
    for tokenizer in sorted(folder.glob("tokenizer*")):
        convert_tokenizer(tokenizer)


def _dump(path: Path, data: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2, default=str) + "\n", encoding="utf-8")
