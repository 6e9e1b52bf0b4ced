"""Engines as Polygraphy runners: what they are fed and answer, and who closes them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from polygraphy.comparator import Comparator

from mtu_compile.accuracy.host.compare import compare_runner
from mtu_compile.accuracy.host.engine_runner import EngineRunner
from mtu_compile.core.errors import AccuracyError, TargetError
from mtu_compile.runtime.engine import Array, TensorSpec, check_inputs
from tests.recording import recorded_calls

SPEC = TensorSpec("sample", (2, 3), np.dtype(np.float32))
FEED = {"sample": np.arange(6, dtype=np.float32).reshape(2, 3)}


class Doubling:
    """y = 2 x, as an engine."""

    def __init__(self, factor: float = 2.0) -> None:
        self.factor, self.closed = np.float32(factor), False
        self.inputs: Mapping[str, TensorSpec] = {"sample": SPEC}
        self.outputs: Mapping[str, TensorSpec] = {"out_sample": SPEC}

    def __call__(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        check_inputs("doubling", self.inputs, inputs)
        return {"out_sample": inputs["sample"] * self.factor}

    def close(self) -> None:
        self.closed = True


def test_the_runner_answers_what_the_engine_answers() -> None:
    (_, iterations), *rest = Comparator.run([EngineRunner(Doubling(), name="ours")], data_loader=[FEED]).items()
    assert not rest and len(iterations) == 1
    np.testing.assert_array_equal(iterations[0]["out_sample"], 2 * FEED["sample"])
    assert iterations[0].runtime >= 0


def test_only_an_engine_the_runner_opened_is_closed_with_it() -> None:
    given, opened = Doubling(), list[Doubling]()

    def opener() -> Any:
        opened.append(Doubling())
        return opened[-1]

    Comparator.run([EngineRunner(given), EngineRunner(opener)], data_loader=[FEED])
    assert not given.closed
    assert [one.closed for one in opened] == [True]


def test_a_wrong_engine_is_seen() -> None:
    reference = [{"out_sample": 2 * FEED["sample"]}]
    calls = recorded_calls([FEED], reference)
    good = compare_runner(EngineRunner(Doubling()), calls)
    wrong = compare_runner(EngineRunner(Doubling(1.9)), calls)
    assert good[0].sqnr_db > 100
    assert wrong[0].sqnr_db == pytest.approx(20 * np.log10(2.0 / 0.1), abs=0.1)


def test_inputs_the_engine_has_not_are_refused() -> None:
    with pytest.raises((AccuracyError, TargetError), match="timestep"):
        feed = {**FEED, "timestep": np.zeros(1, np.float32)}
        compare_runner(EngineRunner(Doubling()), recorded_calls([feed], [{"out_sample": FEED["sample"]}]))
