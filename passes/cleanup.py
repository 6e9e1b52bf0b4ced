"""``mtu::cleanup``: what no longer does anything goes."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import common

from passes.base import TASK_PIPELINE, PassContext, PassResult
from passes.folding import SMALL, fold_small_constants


class Cleanup:
    """Fold what is left of small constants, and remove identities, doubles and what nothing reads.

    *Given*::

        a = Identity(x); b = Sigmoid(a); c = Sigmoid(x); y = Add(b, c); unused = Relu(x)

    *Result*::

        b = Sigmoid(x); y = Add(b, b)

    Fires on nodes, initialisers and opset imports. Does not fire on weights: constants of more than 4096 numbers are
    neither folded nor compared with each other, which would read them into memory. The graph's inputs stay, used or
    not.
    """

    id = "mtu::cleanup"
    after: tuple[str, ...] = TASK_PIPELINE[:-1]  # it is the last

    def requires(self, graph: ir.Model, context: PassContext) -> None:
        pass

    def run(self, graph: ir.Model, context: PassContext) -> PassResult:
        before = _size(graph)
        fold_small_constants(graph)
        ir.passes.PassManager(
            [
                common.IdentityEliminationPass(),
                common.DeduplicateInitializersPass(size_limit=SMALL),
                common.CommonSubexpressionEliminationPass(),
                common.RemoveUnusedNodesPass(),
                common.RemoveUnusedOpsetsPass(),
            ],
            steps=3,
            early_stop=True,
        )(graph)
        return PassResult(self.id, graph, before - _size(graph))

    def ensures(self, graph: ir.Model, context: PassContext) -> None:
        pass


def _size(graph: ir.Model) -> int:
    return len(graph.graph) + len(graph.graph.initializers)
