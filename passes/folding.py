"""Generic constant folding, by onnxscript's optimiser."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes.common import LiftConstantsToInitializersPass

from mtu_compile.graph.edit import constant_tensor

#: Constants of up to this many numbers are folded: shapes, indices, a timestep's frequencies. Weights are left alone.
SMALL = 4096


def fold_small_constants(graph: ir.Model) -> None:
    """Fold computations on small constants and static shapes."""
    from onnxscript import optimizer  # takes half a second to import

    optimizer.fold_constants(
        graph,
        onnx_shape_inference=True,
        input_size_limit=SMALL,
        output_size_limit=SMALL,
        should_fold=lambda node: False if _reads_a_weight(node) else None,
    )
    LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(graph)


def _reads_a_weight(node: ir.Node) -> bool:
    """Transposed weights, which the optimiser folds at any size. Their shapes may be folded: nothing is read for it."""
    if node.op_type in ("Shape", "Size"):
        return False
    tensors = (constant_tensor(value) for value in node.inputs)
    return any(tensor is not None and tensor.size > SMALL for tensor in tensors)
