"""A graph becomes the same IR whatever the process did before, and what has a name keeps it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from targets.openvino.ir import free_batch, keep_angles_precise, read_graph, whole_timesteps, write_ir
from targets.openvino.names import name_nodes
from targets.openvino.tokenizer_ir import TOKENIZER_IR, convert_tokenizer


def folder_twice(make: Callable[[Path], object], place: Path) -> list[dict[str, bytes]]:
    """What ``make`` leaves in an empty folder, two times in one process."""
    found = []
    for name in ("one", "two"):
        (place / name).mkdir()
        make(place / name)
        found.append({path.name: path.read_bytes() for path in (place / name).iterdir()})
    return found


@pytest.mark.parametrize("fp16", [False, True])
def test_a_graph_written_twice_is_the_same_file(unet_like: Path, tmp_path: Path, fp16: bool) -> None:
    def make(folder: Path) -> None:
        model = read_graph(unet_like)
        assert free_batch(model) and keep_angles_precise(model) == 1 and whole_timesteps(model)
        assert any(node.get_friendly_name() == node.get_name() for node in model.get_ops())
        write_ir(model, folder, fp16_weights=fp16)

    one, two = folder_twice(make, tmp_path)
    assert len(one) == 2 and one == two


def test_a_tokenizer_converted_twice_is_the_same_file(base_pipeline_dir: Path, tmp_path: Path) -> None:
    pytest.importorskip("openvino_tokenizers", reason="pip install openvino-tokenizers")
    source = {path.name: path.read_bytes() for path in (base_pipeline_dir / "tokenizer").iterdir()}

    def make(folder: Path) -> None:
        for name, content in source.items():
            (folder / name).write_bytes(content)
        assert convert_tokenizer(folder)

    one, two = folder_twice(make, tmp_path)
    assert TOKENIZER_IR in one and one == two


def test_names_that_are_there_stay_and_are_not_given_to_others() -> None:
    import openvino
    from openvino import opset13 as ops

    picture = ops.parameter([2], np.float32, name="Add_1")
    first = ops.add(picture, ops.constant(np.float32(1)))
    named = ops.add(first, ops.constant(np.float32(2)), name="Add_0")
    model = openvino.Model([ops.add(named, first)], [picture], "names")
    assert name_nodes(model) == 5  # two additions, two constants, the result
    names = [node.get_friendly_name() for node in model.get_ordered_ops()]
    assert len(set(names)) == len(names) == 7
    assert named.get_friendly_name() == "Add_0" and picture.get_friendly_name() == "Add_1"
    assert {name for name in names if name.startswith("Add")} == {f"Add_{number}" for number in range(4)}
    assert name_nodes(model) == 0
