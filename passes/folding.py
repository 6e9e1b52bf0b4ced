"""Generic constant folding, by onnxscript's optimiser."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes.common import LiftConstantsToInitializersPass

#: Constants of up to this many numbers are folded: shapes, indices, a timestep's frequencies. Weights are left alone.
SMALL = 4096


def fold_small_constants(graph: ir.Model) -> bool:
    """Fold computations on small constants and static shapes; says whether anything changed."""
    from onnxscript import optimizer  # takes half a second to import

    before = len(graph.graph)
    result = optimizer.fold_constants(graph, onnx_shape_inference=True, input_size_limit=SMALL, output_size_limit=SMALL)
    LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(graph)
    return bool(result.modified) or len(graph.graph) != before
