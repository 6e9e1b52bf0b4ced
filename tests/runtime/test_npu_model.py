"""What an NPU is given computes what the file says."""

from __future__ import annotations

from typing import Any

import numpy as np
import openvino
import pytest
from openvino import opset13 as ops

from mtu_compile.runtime.npu_model import fold_batch, for_npu

RNG = np.random.default_rng(0)
B, S, C = 2, 6, 8


def weights(*shape: int) -> Any:
    """Constant weights, stored as fp16."""
    return ops.convert(ops.constant(RNG.standard_normal(shape).astype(np.float16)), "f32")


def parameter(*shape: int, name: str = "x") -> Any:
    node = ops.parameter(openvino.PartialShape(list(shape)), np.float32, name=name)
    node.output(0).set_names({name})
    return node


def norm(x: Any) -> Any:
    mvn = ops.mvn(x, ops.constant(np.array([-1], np.int64)), True, 1e-5, "inside_sqrt")
    return ops.add(ops.multiply(mvn, weights(1, 1, C)), weights(1, 1, C))


def block(x: Any, *, quantised: bool = False) -> Any:
    """A transformer block with one attention head and a GEGLU feed-forward."""

    def fq(value: Any) -> Any:
        low, high = ops.constant(np.float32(-4)), ops.constant(np.float32(4))
        return ops.fake_quantize(value, low, high, low, high, 256) if quantised else value

    h = fq(norm(x))
    q, k, v = (ops.matmul(h, weights(C, C), False, True) for _ in range(3))
    attended = ops.scaled_dot_product_attention(q, k, v)
    x = ops.add(x, ops.add(ops.matmul(attended, weights(C, C), False, True), weights(1, 1, C)))
    halves = ops.split(ops.matmul(fq(norm(x)), weights(4 * C, C), False, True), ops.constant(np.int64(2)), 2)
    inner = fq(ops.multiply(halves.output(0), ops.gelu(halves.output(1), "erf")))
    return ops.add(x, ops.matmul(inner, weights(C, 2 * C), False, True))


def run(model: openvino.Model, feed: dict[str, np.ndarray]) -> list[np.ndarray]:
    compiled = openvino.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return list(compiled(feed).values())


def linear_shapes(model: openvino.Model) -> list[list[int]]:
    return [list(node.input(0).get_shape()) for node in model.get_ordered_ops() if node.get_type_name() == "MatMul"]


@pytest.mark.parametrize("quantised", [False, True])
def test_a_transformer_block_is_folded_around_its_attention(quantised: bool) -> None:
    x = parameter(B, S, C)
    model = openvino.Model([block(x, quantised=quantised)], [x], "block")
    feed = {"x": RNG.standard_normal((B, S, C)).astype(np.float32)}
    before = run(model, feed)
    assert fold_batch(model) == 6
    assert linear_shapes(model) == [[1, B * S, C]] * 5 + [[1, B * S, 2 * C]]
    (attention,) = (node for node in model.get_ops() if node.get_type_name() == "ScaledDotProductAttention")
    assert list(attention.output(0).shape) == [B, S, C]
    reshapes = [node for node in model.get_ops() if node.get_type_name() == "Reshape"]
    assert len(reshapes) == 6  # into the first region; q, k and v out of it; in again; and out at the end
    assert list(model.output(0).shape) == [B, S, C]
    np.testing.assert_allclose(run(model, feed)[0], before[0], rtol=1e-4, atol=1e-4)
    assert fold_batch(model) == 0


def test_convolutions_and_images_stay_as_they_are() -> None:
    x = parameter(B, 4, 3, 2)
    tokens = ops.reshape(ops.transpose(x, ops.constant([0, 2, 3, 1])), ops.constant([B, 6, 4]), False)
    projected = ops.matmul(tokens, weights(8, 4), False, True)
    picture = ops.transpose(ops.reshape(projected, ops.constant([B, 3, 2, 8]), False), ops.constant([0, 3, 1, 2]))
    model = openvino.Model([picture], [x], "image")
    feed = {"x": RNG.standard_normal((B, 4, 3, 2)).astype(np.float32)}
    before = run(model, feed)
    assert fold_batch(model) == 1
    assert linear_shapes(model) == [[1, 12, 4]] and list(model.output(0).shape) == [B, 8, 3, 2]
    np.testing.assert_allclose(run(model, feed)[0], before[0], rtol=1e-5, atol=1e-5)


def by_sample(x: Any) -> Any:
    """A bias for each sample: [B, 1, C]."""
    return ops.matmul(
        ops.add(x, ops.constant(RNG.standard_normal((B, 1, C)).astype(np.float32))), weights(C, C), False, False
    )


def by_position(x: Any) -> Any:
    """A bias for each token: [1, S, C]."""
    return ops.matmul(
        ops.add(x, ops.constant(RNG.standard_normal((1, S, C)).astype(np.float32))), weights(C, C), False, False
    )


def by_mean(x: Any) -> Any:
    """Each sample's mean is added: an activation that broadcasts over tokens."""
    mean = ops.reduce_mean(x, ops.constant(np.array([1], np.int64)), True)
    return ops.matmul(ops.add(x, mean), weights(C, C), False, False)


def over_tokens(x: Any) -> Any:
    """A norm over the tokens of a sample."""
    mvn = ops.mvn(x, ops.constant(np.array([1, 2], np.int64)), True, 1e-5, "inside_sqrt")
    return ops.matmul(mvn, weights(C, C), False, False)


@pytest.mark.parametrize("network", [by_sample, by_position, by_mean, over_tokens])
def test_what_does_not_treat_tokens_alike_is_left_outside(network: Any) -> None:
    x = parameter(B, S, C)
    model = openvino.Model([network(x)], [x], "net")
    feed = {"x": RNG.standard_normal((B, S, C)).astype(np.float32)}
    before = run(model, feed)
    assert fold_batch(model) == 1  # the layer itself, not what is in front of it
    for node in model.get_ops():
        if node.get_type_name() in ("Add", "MVN"):
            assert list(node.output(0).shape) == [B, S, C]
    np.testing.assert_allclose(run(model, feed)[0], before[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(1, S, C), (S, C), (-1, S, C)])
def test_one_sample_no_batch_or_an_open_one_is_nothing_to_fold(shape: tuple[int, ...]) -> None:
    x = parameter(*shape)
    model = openvino.Model([ops.matmul(x, weights(C, C), False, False)], [x], "net")
    assert fold_batch(model) == 0


def test_a_product_of_activations_is_not_a_linear_layer() -> None:
    x, y = parameter(B, S, C), parameter(C, C, name="y")
    assert fold_batch(openvino.Model([ops.matmul(x, y, False, False)], [x, y], "net")) == 0
    x, y = parameter(B, S, C), parameter(B, C, S, name="y")
    assert fold_batch(openvino.Model([ops.matmul(x, y, False, False)], [x, y], "net")) == 0


def test_an_open_batch_is_closed_first() -> None:
    ids = parameter(-1, S, C)
    model = openvino.Model([ops.matmul(ids, weights(C, C), False, False)], [ids], "text")
    for_npu(model)
    assert list(model.input(0).shape) == [1, S, C] and list(model.output(0).shape) == [1, S, C]
