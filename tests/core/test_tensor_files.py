"""A safetensors file with several pieces of metadata is the same bytes each time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from mtu_compile.core.tensor_files import order_metadata


def test_the_order_of_metadata_says_nothing(tmp_path: Path) -> None:
    metadata = {name: f'a "prompt" of \n{name}: Ø 空 \x7f' for name in "hgfedcba"}
    written = set()
    for i in range(8):  # 8! orders, of which one is taken by chance
        path = tmp_path / f"{i}.safetensors"
        save_file({"b": np.arange(3, dtype=np.float32), "a": np.zeros(5, np.uint8)}, path, metadata)
        order_metadata(path)
        written.add(path.read_bytes())
        with safe_open(path, framework="numpy") as file:
            assert file.metadata() == metadata
            assert file.get_tensor("b").tolist() == [0, 1, 2] and file.get_tensor("a").shape == (5,)
    assert len(written) == 1
