"""What every layer's INT8 does to the output, to the first order, from one run of the graph there and back.

A layer's own error δ, what INT8 changes of its output where its input is float's, arrives at the UNet's output as J δ,
with J the derivative of the one by the other. J need not be known for its length: with a random vector r of unit
variance E (r·J δ)² = |J δ|², and r·J δ = (Jᵀ r)·δ comes for all layers at once from one pass backward (Hutchinson's
estimator, 1990). So a few passes take the place of a run for each layer. What is left out are terms of higher order:
where INT8 does so much that they count, it has to be measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calibration.torch_graph import Step, TorchGraph, Values

Array = NDArray[Any]
Feed = Mapping[str, Array]

#: Activations that are held for a pass backward, bytes. What comes before is run once more when its turn has come.
HELD_BYTES = 1 << 30


def first_order_errors(
    graph: TorchGraph,
    groups: Sequence[Sequence[str]],
    feed: Feed,
    probes: int,
    *,
    held_bytes: int = HELD_BYTES,
    seed: int = 0,
) -> Array:
    """r·J δ of every group of layers in INT8 alone: a number for each sample of the output and each r.

    Of one probe, r is the same for all samples, so that the difference of two samples can be had as the difference of
    their numbers.

    Args:
        graph: a joined one (``calibration.joined_graph``), differentiable; every switch is off in ``feed``.
        groups: names of the layers of each.
        feed: an array for each input.
        probes: how many r.
        held_bytes: see ``HELD_BYTES``.
        seed: of r.

    Returns:
        [probes, groups, samples]; nan of a group whose samples cannot be told apart.
    """
    import torch

    place = {f"{name}/choice": i for i, members in enumerate(groups) for name in members}
    with torch.no_grad():
        parts = _forward(graph, graph.feed(feed), held_bytes)
        output = parts[-1].after[graph.output]
        found = _Found(np.zeros((probes, len(groups), output.shape[0])), place)
        r = torch.randn((probes, 1, *output.shape[1:]), generator=torch.Generator().manual_seed(seed))
        wanted: Values = {graph.output: r.expand(probes, *output.shape).contiguous()}
        for part in reversed(parts):
            # The derivatives of several probes at once take that many times the memory of the largest activation.
            together = max(1, min(probes, held_bytes // (4 * max(part.largest, 1))))
            wanted = _backward(graph, part, wanted, found, together)
    return found.errors


@dataclass(frozen=True)
class _Part:
    """Steps ``start`` to ``stop`` - 1 of a graph, the values that are there before and after them, and the bytes of the
    largest that they make.
    """

    start: int
    stop: int
    before: Values
    after: Values
    largest: int


@dataclass(frozen=True)
class _Found:
    """What is looked for.

    Attributes:
        errors: [probes, groups, samples].
        place: by name of a switch, the number of its group.
    """

    errors: Array
    place: Mapping[str, int]


def _forward(graph: TorchGraph, values: Values, held_bytes: int) -> list[_Part]:
    """Run the graph; it is divided into parts that make no more than ``held_bytes`` each."""
    parts: list[_Part] = []
    start, made, largest, before = 0, 0, 0, dict(values)
    for i, step in enumerate(graph.steps):
        outputs = graph.evaluate(step, values)
        made += sum(one.nbytes for one in outputs)
        largest = max(largest, *(one.nbytes for one in outputs))
        graph.keep(i, outputs, values)
        if made > held_bytes or i == len(graph.steps) - 1:
            parts.append(_Part(start, i + 1, before, dict(values), largest))
            start, made, largest, before = i + 1, 0, 0, dict(values)
    return parts


def _backward(graph: TorchGraph, part: _Part, wanted: Values, found: _Found, together: int) -> Values:
    """Run ``part`` once more, and from what is ``wanted`` of its results back through it.

    Args:
        wanted: [probes, …] by value, derivatives of r·output.
        together: of how many probes the derivatives are computed at a time.

    Returns:
        The same of what was there before the part.
    """
    import torch

    values = dict(part.before)
    # A graph's inputs are nobody's error.
    starts = [value for value, one in values.items() if part.start and one.is_floating_point()]
    for value in starts:
        values[value] = values[value].detach().requires_grad_()
    sources = [values[value] for value in starts]
    factors: dict[int, Any] = {}
    with torch.enable_grad():
        for i in range(part.start, part.stop):
            step = graph.steps[i]
            outputs = graph.evaluate(step, values)
            if (group := found.place.get(step.node.name or "")) is not None:
                outputs = (_marked(graph, step, outputs[0], values, group, factors, found),)
            graph.keep(i, outputs, values)
    if not (sources or factors):
        return wanted
    ends = [value for value in wanted if value in values and values[value].requires_grad]
    passed = {value: one for value, one in wanted.items() if value not in ends}
    probes = len(found.errors)
    of_chunks = []
    for first in range(0, probes, together):
        chunk = slice(first, first + together)
        grads = torch.autograd.grad(
            [values[value] for value in ends],
            [*sources, *factors.values()],
            [wanted[value][chunk] for value in ends],
            retain_graph=chunk.stop < probes,
            allow_unused=True,
            is_grads_batched=True,
        )
        for group, grad in zip(factors, grads[len(starts) :], strict=True):
            if grad is not None:
                found.errors[chunk, group] += grad.numpy()
        of_chunks.append(grads[: len(starts)])
    for value, chunks in zip(starts, zip(*of_chunks, strict=True), strict=False):
        if chunks[0] is not None:
            passed[value] = torch.cat(chunks)
    return passed


def _marked(
    graph: TorchGraph, step: Step, output: Any, values: Values, group: int, factors: dict[int, Any], found: _Found
) -> Any:
    """A layer's float output, and its INT8 error times a factor a sample that is zero, but has a derivative."""
    import torch

    samples = found.errors.shape[2]
    with torch.no_grad():
        error = graph.branch(step.on, values) - output
    if error.shape[0] % samples:
        found.errors[:, group] = np.nan
        return output
    if group not in factors:
        factors[group] = torch.zeros(samples, requires_grad=True)
    factor = factors[group].repeat_interleave(error.shape[0] // samples)
    return output + factor.reshape(-1, *[1] * (error.dim() - 1)) * error
