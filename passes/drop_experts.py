"""``mtu::drop-experts``: experts the task never uses are taken out."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from mtu_compile.core.errors import PassError
from mtu_compile.graph.edit import constant, only_user, other_input, replace_value
from passes.base import PassContext, PassResult
from passes.experts import Expert, Mixture, find_mixtures, require_bound_task, rewrite_mixtures


class DropExperts:
    """Remove experts whose gate is zero.

    *Given*::

        y = Add(Add(Mul(expert_0, 0.7), Mul(expert_1, 0.0)), Mul(expert_2, 0.3))

    *Result*::

        y = Add(Mul(expert_0, 0.7), Mul(expert_2, 0.3))

    Fires on experts (see ``passes.experts``) of checkpoints with top-k routers. Does not fire on a gate that is small
    but not zero, on a gate that is not constant, on any other multiplication by zero, nor on a mixture all of whose
    gates are zero, which no softmax produces.
    """

    id = "mtu::drop-experts"
    after: tuple[str, ...] = ("mtu::bind-task", "mtu::fold-routing")

    def requires(self, graph: ir.Model, context: PassContext) -> None:
        require_bound_task(graph)

    def run(self, graph: ir.Model, context: PassContext) -> PassResult:
        return rewrite_mixtures(self.id, graph, _drop_unused)

    def ensures(self, graph: ir.Model, context: PassContext) -> None:
        for mixture in find_mixtures(graph):
            if _droppable(mixture):
                raise PassError(f"{self.id} left an expert with a gate of zero in {mixture.name!r}")


def _is_zero(expert: Expert) -> bool:
    gate = constant(expert.gate)
    return gate is not None and not np.any(gate)


def _droppable(mixture: Mixture) -> bool:
    constants = all(constant(expert.gate) is not None for expert in mixture.experts)
    return constants and 0 < sum(map(_is_zero, mixture.experts)) < len(mixture.experts)


def _drop_unused(mixture: Mixture) -> int | str:
    """Drop the experts whose gate is zero, and count them; or say why none can be dropped."""
    unused = [expert for expert in mixture.experts if _is_zero(expert)]
    if any(constant(expert.gate) is None for expert in mixture.experts):
        return "a gate is not constant"
    if len(unused) == len(mixture.experts):
        return "every gate is zero"
    for expert in unused:
        _drop(expert)
    return len(unused)


def _drop(expert: Expert) -> None:
    add = only_user(expert.output, "Add")
    assert add is not None  # a mixture of several experts adds up all of them
    rest = other_input(add, expert.output)
    assert rest is not None
    replace_value(add.outputs[0], rest)
    assert add.graph is not None
    add.graph.remove(add, safe=True)
