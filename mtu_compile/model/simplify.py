"""A freshly exported graph made as small as the exporter itself would make it, in less time.

The exporter's own step (``torch.onnx.export(optimize=True)``, onnxscript 0.7.2) tries all its rules at every
node. One of them, two ``Slice`` that are a ``Split``, is tried with every pair of nodes: at Stable Diffusion 1.5's size
that alone takes a quarter of the export, and the networks here split by ``Split``. The rules below are those that can
find anything in networks of convolutions, linear layers, norms and attention.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common
from onnxscript.optimizer import fold_constants
from onnxscript.rewriter import RewritePass
from onnxscript.rewriter.rules import common as rules

#: In the exporter's order.
RULES = (
    rules.mul_by_1_rule,
    rules.add_0_rule,
    rules.sub_0_rule,
    rules.div_by_1_rule,
    rules.dropout_zero_rule,
    rules.dropout_inference_rule,
    rules.one_reshape_matmul_reshape_rule,
    rules.two_reshapes_matmul_reshape_rule,
    rules.cast_constant_of_shape_rule,
    rules.cast_constant_of_shape_without_value_rule,
    rules.collapse_slice_rule,
    rules.collapse_slice2_rule,
    rules.materialize_reshape_shape_rule,
    rules.cast_cast_rule,
    rules.no_op_cast_rule,
    rules.no_op_expand_rule,
    rules.reshape_reshape_rule,
    rules.no_op_transpose_rule,
    rules.transpose_transpose_rule,
    rules.unsqueeze_unsqueeze_rule,
    rules.squeeze_reshape_1d_rule,
    rules.fuse_pad_into_conv_rule,
    rules.remove_optional_bias_from_conv_rule,
    rules.remove_optional_bias_from_gemm_rule,
)

#: What one round of folding and rewriting leaves for another to find comes to an end by the second.
_ROUNDS = 2

_LAST: tuple[Callable[[], ir.passes.PassBase], ...] = (
    common.RemoveUnusedFunctionsPass,
    common.RemoveUnusedOpsetsPass,
    partial(common.LiftConstantsToInitializersPass, lift_all_constants=True, size_limit=0),
    common.LiftSubgraphInitializersToMainGraphPass,
    common.DeduplicateInitializersPass,
    common.CommonSubexpressionEliminationPass,
    common.OutputFixPass,
    common.NameFixPass,
)


def simplify(model: ir.Model) -> None:
    """Fold constants, take out what does nothing, and compute what is the same but once; in place."""
    common.InlinePass()(model)
    _transpose_when_written(model)
    for _ in range(_ROUNDS):
        folded = fold_constants(model, onnx_shape_inference=True)
        rewritten = RewritePass(RULES)(model)
        common.RemoveUnusedNodesPass()(model)
        if not (folded.modified or rewritten.modified):
            break
    for last in _LAST:
        last()(model)


def _transpose_when_written(model: ir.Model) -> None:
    """Linear layers of weights that are made when they are written: so are these weights transposed.

    Folded as others are, every one of them would be in memory.
    """
    for node in list(model.graph):
        weight = node.inputs[0].const_value if node.op_type == "Transpose" and node.inputs[0] is not None else None
        if not isinstance(weight, ir.LazyTensor):
            continue
        order = node.attributes["perm"].as_ints() if "perm" in node.attributes else range(len(weight.shape))[::-1]
        shape, old = [weight.shape.numpy()[axis] for axis in order], node.outputs[0]
        turned = lazy(partial(_turned, weight, tuple(order)), shape, f"{weight.name}/transposed")
        made = model.graph.initializers.get(str(turned.name))
        if made is None:
            made = ir.Value(name=turned.name, shape=turned.shape, type=ir.TensorType(turned.dtype), const_value=turned)
            model.graph.register_initializer(made)
        ir.convenience.replace_all_uses_with(old, made)
        model.graph.remove(node, safe=True)


def lazy(make: Callable[[], np.ndarray[Any, Any]], shape: Sequence[int], name: str) -> ir.LazyTensor:
    """A float32 weight that is made when it is written."""
    return ir.LazyTensor(lambda: ir.tensor(make()), dtype=ir.DataType.FLOAT, shape=ir.Shape(shape), name=name)


def _turned(weight: ir.LazyTensor, order: tuple[int, ...]) -> np.ndarray[Any, Any]:
    return np.ascontiguousarray(weight.numpy().transpose(order))
