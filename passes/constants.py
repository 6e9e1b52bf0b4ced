"""What can be computed before the graph runs: values that depend on nothing but weights and the bound task."""

from __future__ import annotations

import onnx
import onnx_ir as ir

from mtu_compile.core.errors import PassError, first_line
from mtu_compile.graph.edit import Array, constant, constant_tensor
from mtu_compile.graph.sessions import open_as_written

#: Operators that give another answer each time, whatever their inputs.
_RANDOM = ("RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Bernoulli", "Multinomial")


class Evaluator:
    """Evaluates constant values of one graph, in the graph's own precision, by ONNX Runtime.

    The routing takes decisions (the top-k comparison), so it is computed as the dynamic graph computes it; only the
    arithmetic on weights that follows is done in float64.
    """

    def __init__(self, graph: ir.Model) -> None:
        self._opsets = [onnx.helper.make_opsetid(domain, version) for domain, version in graph.opset_imports.items()]
        self._is_constant: dict[ir.Value, bool] = {}
        self._arrays: dict[ir.Value, Array] = {}

    def is_constant(self, value: ir.Value | None) -> bool:
        """Whether ``value`` is the same in every run."""
        if value is None:
            return True  # an optional input that is left away
        todo = [value]
        while todo:
            current = todo[-1]
            node = current.producer()
            if current in self._is_constant:
                todo.pop()
            elif constant_tensor(current) is not None:
                self._is_constant[current] = True
            elif node is None or node.op_type in _RANDOM or _has_subgraph(node):
                self._is_constant[current] = False
            else:
                inputs = [v for v in node.inputs if v is not None]
                unknown = [v for v in inputs if v not in self._is_constant]
                if unknown:
                    todo.extend(unknown)
                else:
                    self._is_constant[current] = bool(inputs) and all(self._is_constant[v] for v in inputs)
        return self._is_constant[value]

    def array(self, value: ir.Value) -> Array | None:
        """The constant ``value``, or ``None`` if it is not constant.

        Raises:
            PassError: the value cannot be computed (a task id outside the tables, say).
        """
        if not self.is_constant(value):
            return None
        if value not in self._arrays:
            stored = constant(value)
            if stored is not None:
                return stored
            self._evaluate(value)
        return self._arrays[value]

    def _evaluate(self, value: ir.Value) -> None:
        pending = [value]
        while pending:
            current = pending[-1]
            node = current.producer()
            assert node is not None
            missing = [v for v in node.inputs if v is not None and v not in self._arrays and constant_tensor(v) is None]
            if current in self._arrays:
                pending.pop()
            elif missing:
                pending.extend(missing)
            else:
                self._run(node)

    def _run(self, node: ir.Node) -> None:
        inputs = {v: f"input_{i}" for i, v in enumerate(dict.fromkeys(v for v in node.inputs if v is not None))}
        feed = {name: self._known(v) for v, name in inputs.items()}
        outputs = [f"output_{i}" if v.name else "" for i, v in enumerate(node.outputs)]
        proto = ir.to_proto(node)
        proto.ClearField("metadata_props")
        del proto.input[:], proto.output[:]
        proto.input.extend("" if v is None else inputs[v] for v in node.inputs)
        proto.output.extend(outputs)
        helper = onnx.helper
        typed = [
            helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
            for name, array in feed.items()
        ]
        results = [helper.make_empty_tensor_value_info(name) for name in outputs if name]
        body = helper.make_graph([proto], "node", typed, results)
        try:
            model = helper.make_model(body, opset_imports=self._opsets, ir_version=10)
            computed = open_as_written(model.SerializeToString(), threads=1).run(None, feed)
        except Exception as error:  # ONNX Runtime's exceptions have no common class but this
            raise PassError(
                f"node {node.name!r} cannot be computed for this task: {first_line(error)}",
                hint="does the model have a task with this id?",
            ) from error
        self._arrays.update(zip([v for v in node.outputs if v.name], computed, strict=True))

    def _known(self, value: ir.Value) -> Array:
        array = self._arrays[value] if value in self._arrays else constant(value)
        assert array is not None
        return array


def _has_subgraph(node: ir.Node) -> bool:
    kinds = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
    return any(a.type in kinds for a in node.attributes.values())
