"""What is quantised with: the tools, and the inputs of calibration sets."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from calibration.merged import MergedSet
from calibration.sets import CalibrationSet
from mtu_compile.stages.job import Specialised

#: What quantises, compresses, lowers, and measures.
TOOLS = ("nncf", "onnx", "onnx-ir", "onnxruntime", "numpy")


def inputs_of(unet: Specialised, sets: Mapping[str, Path]) -> CalibrationSet | MergedSet:
    """What is in the calibration sets' files, for the graph of one task or of several."""
    return merged_inputs(unet, sets) if unet.shared else CalibrationSet.load(sets[unet.name])


def merged_inputs(unet: Specialised, sets: Mapping[str, Path]) -> MergedSet:
    loaded = {name: CalibrationSet.load(file) for name, file in sets.items()}
    return MergedSet.of(loaded, unet.tasks, channels=unet.width)
