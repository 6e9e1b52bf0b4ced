"""A graph that is quantised once for all tests here."""

from __future__ import annotations

import pytest

from calibration.quantize import quantize_onnx
from tests.calibration.small_graph import (
    Quantised,
    make_samples,
    write_graph,
)


@pytest.fixture(scope="session")
def quantised(tmp_path_factory: pytest.TempPathFactory) -> Quantised:
    import contextlib
    import io

    folder = tmp_path_factory.mktemp("quantised")
    source = write_graph(folder / "float.onnx")
    progress: list[tuple[int, int]] = []
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        report = quantize_onnx(
            source, make_samples(16), folder / "int8.onnx", progress=lambda *done: progress.append(done)
        )
    return Quantised(source, folder / "int8.onnx", report, progress, printed.getvalue())
