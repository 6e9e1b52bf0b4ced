"""ONNX operations on torch tensors, for their gradients, which ONNX Runtime does not give.

Those that UNets are made of, as the ONNX specification has them (opset 20).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import onnx_ir as ir

#: A torch.Tensor; torch is imported where it is used, as it takes a second.
Tensor = Any
Attributes = Mapping[str, Any]
Operation = Callable[[Sequence[Any], Attributes], Any]


@dataclass(frozen=True)
class Bound:
    """The operation of one node, ready to be run.

    Attributes:
        function: of ``OPERATIONS``; ``None`` of an operation that is not there.
        attributes: of the node, by name, and how many outputs it has.
    """

    function: Operation | None
    attributes: Attributes

    @property
    def differentiable(self) -> bool:
        return self.function is not None

    def __call__(self, inputs: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
        """The node's outputs; an input that is left out is ``None``."""
        assert self.function is not None
        found = self.function(inputs, self.attributes)
        return found if isinstance(found, tuple) else (found,)


def bind(node: ir.Node) -> Bound:
    """The operation of ``node``."""
    function = OPERATIONS.get(node.op_type) if node.domain in ("", "ai.onnx") else None
    attributes = {name: one.value for name, one in node.attributes.items()}
    if function is not None and node.op_type == "Resize" and not _resizes(attributes):
        function = None
    return Bound(function, {**attributes, "outputs": len(node.outputs)})


def _torch() -> Any:
    import torch

    return torch


def _ints(tensor: Tensor) -> list[int]:
    return [int(value) for value in tensor.tolist()]


def _conv(x: Sequence[Any], a: Attributes) -> Tensor:
    torch = _torch()
    spatial = x[0].dim() - 2
    pads = list(a.get("pads") or [0] * 2 * spatial)
    data, padding = x[0], pads[:spatial]
    if padding != pads[spatial:]:
        around = [side for i in reversed(range(spatial)) for side in (pads[i], pads[i + spatial])]
        data, padding = torch.nn.functional.pad(data, around), [0] * spatial
    function = (torch.conv1d, torch.conv2d, torch.conv3d)[spatial - 1]
    ones = [1] * spatial
    strides, dilations = list(a.get("strides") or ones), list(a.get("dilations") or ones)
    return function(data, x[1], x[2] if len(x) > 2 else None, strides, padding, dilations, a.get("group", 1))


def _gemm(x: Sequence[Any], a: Attributes) -> Tensor:
    left = x[0].T if a.get("transA") else x[0]
    right = x[1].T if a.get("transB") else x[1]
    product = a.get("alpha", 1.0) * (left @ right)
    return product if len(x) < 3 or x[2] is None else product + a.get("beta", 1.0) * x[2]


def _layer_norm(x: Sequence[Any], a: Attributes) -> Tensor:
    axis = int(a.get("axis", -1)) % x[0].dim()
    bias = x[2] if len(x) > 2 else None
    scale, bias = (None if one is None else one.expand(x[0].shape[axis:]) for one in (x[1], bias))
    return _torch().nn.functional.layer_norm(x[0], x[0].shape[axis:], scale, bias, a.get("epsilon", 1e-5))


def _instance_norm(x: Sequence[Any], a: Attributes) -> Tensor:
    function = _torch().nn.functional.instance_norm
    return function(x[0], weight=x[1], bias=x[2], use_input_stats=True, eps=a.get("epsilon", 1e-5))


def _reshape(x: Sequence[Any], a: Attributes) -> Tensor:
    shape = _ints(x[1])
    if not a.get("allowzero"):
        shape = [x[0].shape[i] if size == 0 else size for i, size in enumerate(shape)]
    return x[0].reshape(shape)


def _split(x: Sequence[Any], a: Attributes) -> Any:
    axis = int(a.get("axis", 0))
    if len(x) > 1 and x[1] is not None:
        return tuple(_torch().split(x[0], _ints(x[1]), axis))
    size = -(-x[0].shape[axis] // int(a["outputs"]))
    return tuple(_torch().split(x[0], size, axis))


def _slice(x: Sequence[Any], a: Attributes) -> Tensor:
    torch = _torch()
    starts, ends = _ints(x[1]), _ints(x[2])
    axes = _ints(x[3]) if len(x) > 3 and x[3] is not None else list(range(len(starts)))
    steps = _ints(x[4]) if len(x) > 4 and x[4] is not None else [1] * len(starts)
    found = x[0]
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        size = found.shape[axis]
        if step > 0:
            index = [slice(None)] * found.dim()
            index[axis] = slice(*slice(max(start, -size), end).indices(size)[:2], step)
            found = found[tuple(index)]
        else:
            places = range(*slice(start, None if end < -size else end, step).indices(size))
            found = found.index_select(axis, torch.tensor(list(places), dtype=torch.int64))
    return found


def _resize(x: Sequence[Any], a: Attributes) -> Tensor:
    torch = _torch()
    sizes: Any = x[3] if len(x) > 3 else None
    scales = x[2] if len(x) > 2 and x[2] is not None and x[2].numel() else None
    found = x[0]
    axes = a.get("axes") or range(found.dim())
    for place, axis in enumerate(axes):
        before = found.shape[axis]
        factor = float(scales[place]) if scales is not None else int(sizes[place]) / before
        if factor != 1:
            after = math.floor(before * factor + 1e-6)
            found = found.index_select(axis, _nearest(torch.arange(after), factor, before, a))
    return found


def _resizes(a: Attributes) -> bool:
    """Whether ``_resize`` knows a node's way of resizing."""
    known = a.get("coordinate_transformation_mode", "half_pixel") in ("half_pixel", "asymmetric")
    return known and a.get("mode", "nearest") == "nearest" and not a.get("antialias")


def _nearest(places: Tensor, factor: float, before: int, a: Attributes) -> Tensor:
    torch = _torch()
    way, rounding = a.get("coordinate_transformation_mode", "half_pixel"), a.get("nearest_mode", "round_prefer_floor")
    old = (places + 0.5) / factor - 0.5 if way == "half_pixel" else places / factor
    ways = {
        "floor": torch.floor,
        "ceil": torch.ceil,
        "round_prefer_floor": lambda at: torch.ceil(at - 0.5),
        "round_prefer_ceil": lambda at: torch.floor(at + 0.5),
    }
    return ways[rounding](old).clamp(0, before - 1).long()


def _gather(x: Sequence[Any], a: Attributes) -> Tensor:
    axis = int(a.get("axis", 0)) % x[0].dim()
    index = x[1].long()
    index = index.where(index >= 0, index + x[0].shape[axis])
    found = x[0].index_select(axis, index.reshape(-1))
    return found.reshape(x[0].shape[:axis] + index.shape + x[0].shape[axis + 1 :])


def _reduce(name: str) -> Operation:
    def reduce(x: Sequence[Any], a: Attributes) -> Tensor:
        given = x[1] if len(x) > 1 else None
        axes = _ints(given) if given is not None and given.numel() else list(a.get("axes") or [])
        if not axes:
            if a.get("noop_with_empty_axes"):
                return x[0]
            axes = list(range(x[0].dim()))
        return getattr(x[0], name)(axes, keepdim=bool(a.get("keepdims", 1)))

    return reduce


def _squeeze(x: Sequence[Any], a: Attributes) -> Tensor:
    given = x[1] if len(x) > 1 else None
    return x[0].squeeze() if given is None else x[0].squeeze(_ints(given))


def _unsqueeze(x: Sequence[Any], a: Attributes) -> Tensor:
    axes = _ints(x[1])
    found, rank = x[0], x[0].dim() + len(axes)
    for axis in sorted(axis % rank for axis in axes):
        found = found.unsqueeze(axis)
    return found


def _concat(x: Sequence[Any], a: Attributes) -> Tensor:
    return _torch().cat(list(x), int(a["axis"]))


def _shape(x: Sequence[Any], a: Attributes) -> Tensor:
    torch = _torch()
    return torch.tensor(list(x[0].shape)[a.get("start", 0) : a.get("end")], dtype=torch.int64)


def _expand(x: Sequence[Any], a: Attributes) -> Tensor:
    torch = _torch()
    return x[0].expand(torch.broadcast_shapes(x[0].shape, tuple(_ints(x[1]))))


def _cast(x: Sequence[Any], a: Attributes) -> Tensor:
    torch = _torch()
    import onnx_ir as ir

    return x[0].to(getattr(torch, _TYPES.get(name := ir.DataType(a["to"]).name, name.lower())))


_TYPES: Mapping[str, str] = {"FLOAT": "float32", "DOUBLE": "float64"}


def _clip(x: Sequence[Any], a: Attributes) -> Tensor:
    return x[0].clamp(*(one for one in (*x[1:3], None, None)[:2]))


def _divide(x: Sequence[Any], a: Attributes) -> Tensor:
    return x[0] / x[1] if x[0].is_floating_point() else x[0].div(x[1], rounding_mode="trunc")


def _along(tensor: Tensor, data: Tensor, a: Attributes) -> Tensor:
    """A scale or zero point, of one number or of one a channel, in the shape that goes with ``data``."""
    if tensor.dim() == 0 or tensor.numel() == 1:
        return tensor.reshape(())
    shape = [1] * data.dim()
    shape[int(a.get("axis", 1))] = -1
    return tensor.reshape(shape)


def _quantize(x: Sequence[Any], a: Attributes) -> Tensor:
    torch = _torch()
    zero = x[2] if len(x) > 2 and x[2] is not None else torch.zeros((), dtype=torch.uint8)
    limits = torch.iinfo(zero.dtype)
    steps = (x[0] / _along(x[1], x[0], a)).round_()
    return steps.add_(_along(zero, x[0], a).float()).clamp_(limits.min, limits.max).to(zero.dtype)


def _dequantize(x: Sequence[Any], a: Attributes) -> Tensor:
    found = x[0].float()
    if len(x) > 2 and x[2] is not None:
        found = found - _along(x[2], found, a).float()
    return found * _along(x[1], found, a)


def _gelu(x: Sequence[Any], a: Attributes) -> Tensor:
    return _torch().nn.functional.gelu(x[0], approximate=a.get("approximate", "none"))


def _plain(function: Callable[..., Any]) -> Operation:
    """An operation without attributes."""
    return lambda x, a: function(*x)


def _named(name: str) -> Operation:
    """The function of torch of this name."""
    return lambda x, a: getattr(_torch(), name)(*x)


OPERATIONS: Mapping[str, Operation] = {
    "Add": _plain(lambda left, right: left + right),
    "And": _named("logical_and"),
    "Cast": _cast,
    "Clip": _clip,
    "Concat": _concat,
    "Conv": _conv,
    "Cos": _named("cos"),
    "DequantizeLinear": _dequantize,
    "Div": _divide,
    "Equal": _plain(lambda left, right: left == right),
    "Erf": _named("erf"),
    "Exp": _named("exp"),
    "Expand": _expand,
    "Flatten": lambda x, a: x[0].reshape(math.prod(x[0].shape[: a.get("axis", 1)]), -1),
    "Gather": _gather,
    "Gelu": _gelu,
    "Gemm": _gemm,
    "Greater": _plain(lambda left, right: left > right),
    "Identity": _plain(lambda value: value),
    "InstanceNormalization": _instance_norm,
    "LayerNormalization": _layer_norm,
    "Less": _plain(lambda left, right: left < right),
    "MatMul": _plain(lambda left, right: left @ right),
    "Mul": _plain(lambda left, right: left * right),
    "Neg": _plain(lambda value: -value),
    "Not": _named("logical_not"),
    "Pow": _named("pow"),
    "QuantizeLinear": _quantize,
    "Reciprocal": _named("reciprocal"),
    "ReduceMean": _reduce("mean"),
    "ReduceSum": _reduce("sum"),
    "Relu": _named("relu"),
    "Reshape": _reshape,
    "Resize": _resize,
    "Shape": _shape,
    "Sigmoid": _named("sigmoid"),
    "Sin": _named("sin"),
    "Slice": _slice,
    "Softmax": lambda x, a: x[0].softmax(int(a.get("axis", -1))),
    "Split": _split,
    "Sqrt": _named("sqrt"),
    "Squeeze": _squeeze,
    "Sub": _plain(lambda left, right: left - right),
    "Tanh": _named("tanh"),
    "Transpose": lambda x, a: x[0].permute(*(a.get("perm") or reversed(range(x[0].dim())))),
    "Unsqueeze": _unsqueeze,
    "Where": _plain(lambda condition, left, right: left.where(condition, right)),
}
