"""A network of any number of samples as networks of one, two and three, whose weights are there once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

#: The most samples a network is compiled for where each number has kernels of its own: what a step of text and image
#: guidance takes.
MOST = 3


def of_batch(model: Any, samples: int) -> Any:
    """A copy of a model whose batch is free, for so many samples; the copy has the same weights."""
    fixed = model.clone()
    shapes = {}
    for index, port in enumerate(fixed.inputs):
        shape = port.partial_shape
        if shape[0].is_dynamic:
            shape[0] = samples
        shapes[index] = shape
    fixed.reshape(shapes)
    return fixed


def branches(model: Any, most: int = MOST) -> Any:
    """A model of any batch as one that chooses, by the samples it is given, among networks of one to ``most``.

    OpenVINO's CPU plugin has slower kernels for a batch that is free: it fuses chains of elementwise operations for
    fixed shapes only. Models compiled for each batch share nothing; the bodies of an ``If`` share their compiled
    weights. Three bodies of Stable Diffusion 1.5's size take as long as models of their own, in 1.25 of the memory of
    one (docs/decisions/0019-batch-of-a-shared-engine.md).

    Args:
        model: its batch is free, the first dimension of all inputs but those that are fixed; it has one output.
        most: samples of the largest body; more are an error when the model is run.

    Returns:
        A model with the same inputs and output. ``model`` is left as it was.
    """
    import openvino
    from openvino import opset13 as ops

    def inputs() -> list[Any]:
        """New inputs like those of ``model``."""
        found = []
        for port in model.inputs:
            found.append(ops.parameter(port.partial_shape, port.element_type, port.node.friendly_name))
            found[-1].output(0).set_names(port.names)
        return found

    def choose(given: Sequence[Any], samples: int) -> Any:
        """The output for ``given``, of which there are ``samples`` or more."""
        sizes = ops.shape_of(given[_free(model)])
        count = ops.gather(sizes, ops.constant(0), ops.constant(0))
        node = ops.if_op(ops.equal(count, ops.constant(samples, count.get_element_type())).output(0))
        this = _body(model, samples)
        if samples + 1 < most:
            that = inputs()
            rest = openvino.Model([ops.result(choose(that, samples + 1))], that)
        else:
            rest = _body(model, samples + 1)
            that = rest.get_parameters()
        node.set_then_body(this)
        node.set_else_body(rest)
        for outer, then, other in zip(given, this.get_parameters(), that, strict=True):
            node.set_input(outer.output(0), then, other)
        return node.set_output(this.get_results()[0], rest.get_results()[0])

    outer = inputs()
    result = ops.result(choose(outer, 1))
    result.output(0).set_names(model.output(0).names)
    result.friendly_name = model.get_results()[0].friendly_name
    return openvino.Model([result], outer, model.get_friendly_name())


def _body(model: Any, samples: int) -> Any:
    """``model`` for so many samples inside; its inputs say that any number may come, as those of an ``If`` must."""
    import openvino
    from openvino import opset13 as ops

    body, parameters = of_batch(model, samples), []
    for inside, port in zip(body.get_parameters(), model.inputs, strict=True):
        outside = ops.parameter(port.partial_shape, port.element_type, inside.friendly_name)
        parameters.append(outside)
        value = outside.output(0)
        if port.partial_shape.is_dynamic:
            value = ops.reshape(outside, ops.constant(list(inside.output(0).shape)), False).output(0)
        for reader in inside.output(0).get_target_inputs():
            reader.replace_source_output(value)
    return openvino.Model(body.get_results(), parameters)


def _free(model: Any) -> int:
    """Which input tells the batch."""
    return next(index for index, port in enumerate(model.inputs) if port.partial_shape[0].is_dynamic)


def is_quantised(model: Any) -> bool:
    """Whether a model quantises what it computes with."""
    return any(node.get_type_name() == "FakeQuantize" for node in model.get_ops())
