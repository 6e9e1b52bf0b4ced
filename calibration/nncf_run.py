"""NNCF itself, kept quiet, modest and private."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from calibration.nncf_weights import weights_in_files
from calibration.quant_settings import RANGE_ESTIMATORS, QuantSettings
from mtu_compile.core.errors import PassError

if TYPE_CHECKING:
    import onnx

Feed = Mapping[str, NDArray[Any]]


def run_nncf(
    model: onnx.ModelProto,
    path: Path,
    samples: Sequence[Feed],
    ignored: Sequence[str],
    settings: QuantSettings,
    progress: Callable[[int, int], None] | None,
) -> onnx.ModelProto:
    """``model`` with quantisers, those of weights among them: weights are as they were, in the files they were in."""
    with quiet_nncf():
        import nncf
        from nncf.onnx.quantization.backend_parameters import BackendParameters
        from nncf.quantization.advanced_parameters import (
            AdvancedQuantizationParameters,
            AdvancedSmoothQuantParameters,
            OverflowFix,
        )
        from nncf.quantization.range_estimator import RangeEstimatorParametersSet

        smooth = settings.smooth_quant_alpha is not None
        alpha = settings.smooth_quant_alpha if smooth else -1.0
        total = len(samples) * (2 if smooth else 1)  # SmoothQuant collects statistics of its own first
        seen = 0

        def feed(sample: Feed) -> dict[str, NDArray[Any]]:
            nonlocal seen
            seen += 1
            if progress is not None:
                progress(min(seen, total), total)
            return dict(sample)

        advanced = AdvancedQuantizationParameters(
            overflow_fix=OverflowFix.FIRST_LAYER if settings.weight_bits_fix else OverflowFix.DISABLE,
            activations_range_estimator_params=getattr(
                RangeEstimatorParametersSet, RANGE_ESTIMATORS[settings.range_estimator]
            ),
            smooth_quant_alphas=AdvancedSmoothQuantParameters(convolution=-1, matmul=alpha),
            disable_bias_correction=not settings.fast_bias_correction,
            backend_params={
                BackendParameters.EXTERNAL_DATA_DIR: str(path.parent.resolve()),
                BackendParameters.COMPRESS_WEIGHTS: False,
            },
        )
        # The decorator around nncf.quantize reports every call to its vendor's analytics service.
        quantize = getattr(nncf.quantize, "__wrapped__", nncf.quantize)
        try:
            with weights_in_files(model):
                return quantize(
                    model,
                    nncf.Dataset(list(samples), feed),
                    preset=nncf.QuantizationPreset.PERFORMANCE,
                    model_type=nncf.ModelType.TRANSFORMER,
                    subset_size=len(samples),
                    ignored_scope=nncf.IgnoredScope(names=list(ignored)) if ignored else None,
                    advanced_parameters=advanced,
                )
        except MemoryError:
            raise
        except Exception as error:  # NNCF, ONNX and ONNX Runtime each have their own
            raise PassError(f"nncf cannot quantise {path.name}: {error}") from error


@contextmanager
def quiet_nncf() -> Iterator[None]:
    """Keep NNCF's log and progress bars, which go to standard output, out of it."""
    logger = logging.getLogger("nncf")
    with redirect_stdout(StringIO()):
        import nncf  # noqa: F401 (its import sets the logger up)

        level = logger.level
        logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            logger.setLevel(level)
