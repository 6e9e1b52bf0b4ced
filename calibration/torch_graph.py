"""An ONNX graph run by torch, node by node, for its gradients.

Nothing is compiled or fused, and weights in external data stay mapped from their file: a graph of any size is open at
once, and takes the memory of the activations that are still to be read.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from calibration import torch_ops

if TYPE_CHECKING:
    import onnx_ir as ir

Array = NDArray[Any]
Feed = Mapping[str, Array]

#: Of a run, what is known so far: torch tensors.
Values = dict[Any, Any]


@dataclass(frozen=True)
class Step:
    """A node as it is run.

    Attributes:
        node: of the graph.
        operation: its function of ``torch_ops``; ``None`` of an ``If``.
        reads: values that it and the graphs inside it read.
        on, off: of an ``If``, the steps of its two branches.
    """

    node: ir.Node
    operation: torch_ops.Bound | None
    reads: tuple[ir.Value, ...]
    on: tuple[Step, ...] = ()
    off: tuple[Step, ...] = ()

    @classmethod
    def of(cls, node: ir.Node) -> Step:
        reads = [value for value in node.inputs if value is not None]
        if node.op_type != "If":
            return cls(node, torch_ops.bind(node), tuple(reads))
        graphs = (node.attributes[name].as_graph() for name in ("then_branch", "else_branch"))
        on, off = (tuple(cls.of(inner) for inner in graph) for graph in graphs)
        reads += [value for step in (*on, *off) for value in step.reads]
        return cls(node, None, tuple(reads), on, off)

    @property
    def differentiable(self) -> bool:
        """Whether torch itself runs it."""
        if self.operation is None:
            return all(inner.differentiable for inner in (*self.on, *self.off))
        return self.operation.differentiable


class TorchGraph:
    """A graph whose nodes torch runs one after the other; it is not changed.

    Attributes:
        steps: its nodes, in graph order.
        inputs, output: its inputs, and the first of its outputs.
    """

    def __init__(self, model: ir.Model) -> None:
        self.inputs = tuple(model.graph.inputs)
        self.output = model.graph.outputs[0]
        self.steps = tuple(Step.of(node) for node in model.graph)
        self._last = {value: i for i, step in enumerate(self.steps) for value in step.reads}
        self._last[self.output] = len(self.steps)
        self._constants = _constants(model)

    @property
    def differentiable(self) -> bool:
        """Whether gradients are known of every operation."""
        return all(step.differentiable for step in self.steps)

    def feed(self, arrays: Feed) -> Values:
        """The values a run begins with."""
        import torch

        return {value: torch.from_numpy(np.array(arrays[str(value.name)])) for value in self.inputs}

    def evaluate(self, step: Step, values: Values) -> tuple[Any, ...]:
        """The outputs of a node."""
        if step.operation is not None:
            return step.operation([self._value(value, values) for value in step.node.inputs])
        condition = self._value(step.node.inputs[0], values)
        return (self.branch(step.on if bool(condition) else step.off, values),)

    def branch(self, steps: Sequence[Step], values: Values) -> Any:
        """The output of a graph inside an ``If``."""
        inner: Values = {}
        for step in steps:
            assert step.operation is not None
            inputs = [inner[one] if one in inner else self._value(one, values) for one in step.node.inputs]
            outputs = step.operation(inputs)
            inner.update(zip(step.node.outputs, outputs, strict=True))
        return outputs[0]

    def keep(self, index: int, outputs: Sequence[Any], values: Values) -> None:
        """Add what step ``index`` made to ``values``, and take out what is not read any more."""
        values.update(zip(self.steps[index].node.outputs, outputs, strict=True))
        for value in self._done(index):
            values.pop(value, None)

    def _done(self, index: int) -> Iterator[ir.Value]:
        step = self.steps[index]
        yield from (value for value in step.reads if self._last[value] == index)
        yield from (value for value in step.node.outputs if value not in self._last)

    def _value(self, value: ir.Value | None, values: Values) -> Any:
        if value is None:
            return None
        return values[value] if value in values else self._constants[value]


def _constants(model: ir.Model) -> dict[ir.Value, Any]:
    """The weights, as they lie in memory or in their file."""
    import torch

    found = {}
    with warnings.catch_warnings():
        # Nobody writes to them.
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        for value in model.graph.initializers.values():
            if value.const_value is not None and not value.is_graph_input():
                found[value] = torch.from_numpy(np.asarray(value.const_value.numpy()))
    return found
