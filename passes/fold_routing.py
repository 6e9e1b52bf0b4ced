"""``mtu::fold-routing``: what the bound task decides becomes constants."""

from __future__ import annotations

import onnx_ir as ir

from mtu_compile.core.errors import PassError
from mtu_compile.graph.edit import BOUND_TASK, TASK_IDS, add_constant, find_input, remove_unused, replace_value
from passes.base import PassContext, PassResult, Skipped
from passes.constants import Evaluator
from passes.task_values import decided_by, require_task_gates


class FoldRouting:
    """Replace routers and task norms of the bound task by their values.

    *Given*::

        gates = Softmax(Gemm(Relu(Gemm(Gather(task_embedding, task)))))   # [1, N], perhaps masked to the top k
        weighted_i = Mul(expert_i, gates[:, i])
        x = Add(Mul(norm, Gather(gamma, task)), Gather(beta, task))

    *Result*::

        weighted_i = Mul(expert_i, constant)
        x = Add(Mul(norm, constant), constant)

    Fires on every value that is computed from the bound task and weights, and that anything else reads. Does not fire
    on constants that have nothing to do with the task (that is ``mtu::cleanup``), nor on a graph without a bound task.
    Refuses (``PassError``, naming the node) an expert's gate that depends on anything but the task, like the hidden
    state or the timestep, and a task id that is mixed with run-time values.
    """

    id = "mtu::fold-routing"
    after: tuple[str, ...] = ("mtu::bind-task",)

    def requires(self, graph: ir.Model, context: PassContext) -> None:
        if find_input(graph, TASK_IDS) is not None:
            raise PassError(f"the task is still an input, {TASK_IDS!r}", hint="run mtu::bind-task first")

    def run(self, graph: ir.Model, context: PassContext) -> PassResult:
        evaluator = Evaluator(graph)
        require_task_gates(graph, evaluator)
        task = graph.graph.initializers.get(BOUND_TASK)
        if task is None:
            return PassResult(self.id, graph, 0, (Skipped(BOUND_TASK, "no task is bound"),))
        boundary = decided_by(graph, task, evaluator)
        for value in boundary:
            array = evaluator.array(value)
            assert array is not None
            folded = add_constant(graph, f"{value.name}.folded", array)
            replace_value(value, folded)
        remove_unused(graph)
        return PassResult(self.id, graph, len(boundary))

    def ensures(self, graph: ir.Model, context: PassContext) -> None:
        if BOUND_TASK in graph.graph.initializers:
            raise PassError(f"{self.id} left nodes that read the task")
