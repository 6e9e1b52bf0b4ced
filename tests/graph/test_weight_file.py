"""A file of weights holds each content once, where a graph may compute with it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mtu_compile.graph.weight_file import ALIGNMENT, Weight, WeightFile, common_bytes


def test_each_content_is_stored_once_whole_and_aligned(tmp_path: Path) -> None:
    data = np.random.default_rng(0).bytes(3 << 20)
    (tmp_path / "a").write_bytes(data)
    one, same, other = Weight(tmp_path / "a", 5, 2_500_001), Weight(data, 5, 2_500_001), Weight(data, 6, 2_500_001)
    with (tmp_path / "merged").open("wb") as file:
        merged = WeightFile(file)
        places = [merged.put(weight, weight.digest()) for weight in (one, same, other)]
    stored = (tmp_path / "merged").read_bytes()
    assert places[0] == places[1] == 0 and places[2] > 2_500_001 and places[2] % ALIGNMENT == 0
    assert [stored[place : place + 2_500_001] for place in places] == [data[5:2_500_006]] * 2 + [data[6:2_500_007]]
    assert merged.end == len(stored) == places[2] + 2_500_001


def test_what_is_there_already_is_not_stored_again(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(10) + b"weight")
    with (tmp_path / "file").open("ab") as file:
        merged = WeightFile(file, 16, {Weight(b"weight", 0, 6).digest(): 10})
        assert merged.put(Weight(b"weight", 0, 6), Weight(b"weight", 0, 6).digest()) == 10
        assert merged.put(Weight(b"other", 0, 5), Weight(b"other", 0, 5).digest()) == ALIGNMENT
    assert (tmp_path / "file").read_bytes()[ALIGNMENT:] == b"other"


def test_a_file_that_ends_too_early_is_not_padded(tmp_path: Path) -> None:
    (tmp_path / "short").write_bytes(bytes(10))
    with pytest.raises(EOFError, match="before byte 11"):
        Weight(tmp_path / "short", 4, 7).digest()


def test_common_is_what_is_there_twice_or_more() -> None:
    assert common_bytes([{"a": 3, "b": 5}, {"a": 3, "c": 7}, {"a": 3, "c": 7}]) == 3 + 3 + 7
    assert common_bytes([{"a": 3}, {"b": 5}]) == 0
