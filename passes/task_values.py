"""What the task alone decides: values that are constants once the task is one."""

from __future__ import annotations

import onnx_ir as ir

from mtu_compile.core.errors import PassError
from mtu_compile.graph.edit import ancestors, constant_tensor, reached_inputs, scope, users
from passes.constants import Evaluator
from passes.experts import find_mixtures

_HINT = "only routers fed by the task alone can be specialised"


def take_batch_from(sample: ir.Value, task_ids: ir.Value) -> None:
    """Let what asks ``task_ids`` for its only size, the batch, ask ``sample``; the exporter may choose either."""
    for node in users(task_ids):
        if node.op_type == "Shape":
            node.replace_input_with(0, sample)
            node.attributes["start"] = ir.AttrInt64("start", 0)
            node.attributes["end"] = ir.AttrInt64("end", 1)


def require_task_gates(graph: ir.Model, evaluator: Evaluator) -> None:
    """``PassError``, naming the node, if an expert's gate depends on anything but the task (bound by now)."""
    for mixture in find_mixtures(graph):
        for expert in mixture.experts:
            if not evaluator.is_constant(expert.gate):
                raise _refusal(expert.gate, evaluator)


def decided_by(graph: ir.Model, task: ir.Value, evaluator: Evaluator) -> list[ir.Value]:
    """Constant values computed from ``task`` that a node which is not constant reads.

    Raises:
        PassError: the task id itself is mixed with run-time values.
    """
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
