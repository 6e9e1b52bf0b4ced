"""``mtu::fold-routing``: what the bound task decides becomes constants."""

from __future__ import annotations

import onnx_ir as ir

from mtu_compile.core.errors import PassError
from mtu_compile.graph.edit import (
    BOUND_TASK,
    TASK_IDS,
    add_constant,
    ancestors,
    constant_tensor,
    find_input,
    reached_inputs,
    remove_unused,
    replace_value,
    scope,
)
from passes.base import PassContext, PassResult, Skipped
from passes.constants import Evaluator
from passes.experts import find_mixtures

_HINT = "only routers fed by the task alone can be specialised"


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
        for mixture in find_mixtures(graph):
            for expert in mixture.experts:
                if not evaluator.is_constant(expert.gate):
                    raise _refusal(expert.gate, evaluator)
        task = graph.graph.initializers.get(BOUND_TASK)
        if task is None:
            return PassResult(self.id, graph, 0, (Skipped(BOUND_TASK, "no task is bound"),))
        boundary = _boundary(graph, task, evaluator)
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


def _boundary(graph: ir.Model, task: ir.Value, evaluator: Evaluator) -> list[ir.Value]:
    """Constant values computed from ``task`` that a node which is not constant reads."""
    from_task: set[ir.Value] = {task}
    boundary: dict[ir.Value, None] = {}
    for node in graph.graph:
        read = [v for v in node.inputs if v in from_task and v is not None]
        if not read:
            continue
        if all(evaluator.is_constant(v) for v in node.outputs):
            from_task.update(node.outputs)
        elif task in read:
            inputs = ", ".join(sorted({name for v in node.inputs if v is not None for name in reached_inputs(v)}))
            raise PassError(f"node {node.name!r} mixes the task id with {inputs or 'run-time values'}", hint=_HINT)
        else:
            boundary.update(dict.fromkeys(read))
    return list(boundary)


def _refusal(gate: ir.Value, evaluator: Evaluator) -> PassError:
    """Say which node of the router reads what it must not."""
    softmax = next((n for v in ancestors((gate,)) if (n := v.producer()) is not None and n.op_type == "Softmax"), None)
    router = scope(softmax) if softmax is not None else ""
    node, value = _entry(gate, router, evaluator)
    inputs = reached_inputs(value)
    hidden = bool({"sample", "encoder_hidden_states"} & set(inputs))
    if hidden:
        what = "the hidden state"
    elif inputs == ("timestep",):
        what = "the timestep"
    else:
        what = ", ".join(repr(name) for name in inputs) or "a value that changes from run to run"
    name = node.name if node is not None else (gate.name or "")
    return PassError(f"router node {name!r} depends on {what} (value {value.name!r})", hint=_HINT)


def _entry(gate: ir.Value, router: str, evaluator: Evaluator) -> tuple[ir.Node | None, ir.Value]:
    """The node of the module ``router`` that reads a run-time value made outside it, and that value."""
    for value in ancestors((gate,)):
        node = value.producer()
        if node is None or not _inside(node, router) or evaluator.is_constant(value):
            continue
        for source in node.inputs:
            producer = source.producer() if source is not None else None
            outside = producer is None or not _inside(producer, router)
            if source is not None and outside and constant_tensor(source) is None and not evaluator.is_constant(source):
                return node, source
    return gate.producer(), gate


def _inside(node: ir.Node, router: str) -> bool:
    return bool(router) and f"{scope(node)}.".startswith(f"{router}.")
