"""Tiny training data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mtu_compile.core.tasks import PAPER_TASKS


def write_rows(folder: Path, rows: list[dict[str, Any]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five pictures for each task, and one row for checks that is not a picture at all."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for task in PAPER_TASKS:
        place = folder / task.name
        place.mkdir()
        rows = []
        for i in range(5):
            colour = rng.integers(0, 256, (1, 1, 3)) + rng.integers(-40, 40, (32, 32, 3))
            Image.fromarray(colour.clip(0, 255).astype(np.uint8)).save(place / f"{i}.png")
            row: dict[str, Any] = {"file_name": f"{i}.png", "prompt": "abc"[i % 3]}
            if task.name == "edit":
                row["image_file_name"] = f"{(i + 1) % 5}.png"
            rows.append(row)
        (place / "check.png").write_bytes(b"not a picture")
        check = {"file_name": "check.png", "image_file_name": "check.png", "split": "check"}
        write_rows(place, [*rows, check])
    return folder
