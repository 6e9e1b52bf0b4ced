"""What stands for a large tensor where its magnitudes are counted."""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import onnx
import pytest
from nncf.common.tensor_statistics.collectors import HistogramAggregator
from nncf.tensor import Tensor
from numpy.typing import NDArray

from calibration.nncf_weights import weights_in_files
from calibration.ranges import _Counter
from calibration.some_of import some_of


def test_a_small_tensor_is_all_of_it() -> None:
    array = np.arange(12.0, dtype=np.float32).reshape(3, 4)
    np.testing.assert_array_equal(some_of(array, 12), array.ravel())


@pytest.mark.parametrize("size", [13, 100, 4097])
def test_a_large_one_is_a_few_of_it(size: int) -> None:
    array = np.random.default_rng(size).standard_normal(size, dtype=np.float32)
    few = some_of(array, 12)
    assert 12 / 3 <= few.size <= 12 and few.dtype == np.float32 and set(few) <= set(array)


def test_no_column_of_a_feature_map_is_left_out() -> None:
    columns = np.broadcast_to(np.arange(64, dtype=np.float32), (8, 64, 64))
    assert set(some_of(columns, 8192)) == set(range(64))


@pytest.fixture(params=["light tails", "heavy tails"])
def large(request: pytest.FixtureRequest) -> NDArray[np.float32]:
    """Of two million numbers whose size grows from first to last."""
    rng = np.random.default_rng(0)
    numbers = rng.standard_normal(1 << 21) if request.param == "light tails" else rng.standard_t(8, 1 << 21)
    return (numbers * np.geomspace(0.5, 2, 1 << 21)).astype(np.float32)


def test_a_range_by_some_is_the_range_by_all(large: NDArray[np.float32]) -> None:
    of_some, of_all = _Counter(), _Counter()
    of_some.add(large)
    for part in np.split(large, 16):  # each small enough to be counted whole
        of_all.add(part)
    some, everything = of_some.range(), of_all.range()
    assert some.absmax == everything.absmax
    assert some.int8 == pytest.approx(everything.int8, rel=0.1)
    assert some.p9999 == pytest.approx(everything.p9999, rel=0.15)  # a few dozen numbers are beyond
    assert some.rms == pytest.approx(everything.rms, rel=0.01)


def test_nncf_chooses_the_same_range_by_some(large: NDArray[np.float32]) -> None:
    def chosen(parts: list[NDArray[np.float32]], patched: bool) -> tuple[float, float]:
        histogram = HistogramAggregator()
        with weights_in_files(onnx.ModelProto()) if patched else nullcontext():
            for part in parts:
                histogram._register_reduced_input_impl(Tensor(part))
        found = histogram._aggregate_impl()
        return tuple(float(one.data) for one in found.values())

    halves = np.split(large, 2)
    by_some, by_all = chosen(halves, patched=True), chosen(halves, patched=False)
    assert by_some != by_all  # or nothing was left out
    assert by_some == pytest.approx(by_all, rel=0.1)
    small = [part[: 1 << 17] for part in halves]
    assert chosen(small, patched=True) == chosen(small, patched=False)
