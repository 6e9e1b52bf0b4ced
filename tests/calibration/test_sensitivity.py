"""A float graph and its INT8 twin in one, switched layer by layer; errors measured with it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

import passes
from calibration.joined_graph import join
from calibration.quant_settings import QuantSettings
from calibration.quantize import quantize_onnx
from calibration.sensitivity import answers, compare_calls, estimate, evenly_spread, measure
from calibration.switched_graph import SwitchedGraph
from mtu_compile.accuracy.formulas import sqnr_db
from mtu_compile.core.errors import CalibrationError, PassError
from mtu_compile.graph import io as graph_io

C, H = 16, 4
QUIET = QuantSettings(smooth_quant_alpha=None)


def write_graph(path: Path, *, wild: bool = False) -> Path:
    """conv → q, k, v of one tensor → attention → feed-forward → conv on ``sample`` [2, 4, 4, 4].

    ``wild``: one channel of the feed-forward's hidden values is a hundred times larger than the others.
    """
    rng = np.random.default_rng(0)

    def weights(*shape: int) -> np.ndarray:
        fan = np.prod(shape[1:]) if len(shape) == 4 else shape[0]
        return (rng.standard_normal(shape) / np.sqrt(fan)).astype("f4")

    up = weights(C, 2 * C)
    up[:, 3] *= 100.0 if wild else 1.0
    values = {
        "w_in": weights(C, 4, 3, 3),
        "b_in": weights(C),
        "tokens": np.array([2, C, H * H], np.int64),
        "w_q": weights(C, C),
        "w_k": weights(C, C),
        "w_v": weights(C, C),
        "w_up": up,
        "b_up": weights(2 * C),
        "w_down": weights(2 * C, C),
        "b_down": weights(C),
        "picture": np.array([2, C, H, H], np.int64),
        "w_out": weights(4, C, 1, 1),
    }
    nodes = [
        helper.make_node("Conv", ["sample", "w_in", "b_in"], ["c"], name="conv_in", pads=[1, 1, 1, 1]),
        helper.make_node("Reshape", ["c", "tokens"], ["r"], name="to_tokens"),
        helper.make_node("Transpose", ["r"], ["t"], name="to_tokens_t", perm=[0, 2, 1]),
        helper.make_node("MatMul", ["t", "w_q"], ["q"], name="attn.q"),
        helper.make_node("MatMul", ["t", "w_k"], ["k"], name="attn.k"),
        helper.make_node("MatMul", ["t", "w_v"], ["v"], name="attn.v"),
        helper.make_node("Transpose", ["k"], ["kt"], name="kt", perm=[0, 2, 1]),
        helper.make_node("MatMul", ["q", "kt"], ["qk"], name="attn.qk"),
        helper.make_node("Softmax", ["qk"], ["s"], name="softmax"),
        helper.make_node("MatMul", ["s", "v"], ["a"], name="attn.av"),
        helper.make_node("Add", ["a", "t"], ["res"], name="residual"),
        helper.make_node("MatMul", ["res", "w_up"], ["u0"], name="ff.up"),
        helper.make_node("Add", ["u0", "b_up"], ["u"], name="ff.bias"),
        helper.make_node("Tanh" if not wild else "Identity", ["u"], ["act"], name="ff.act"),
        helper.make_node("MatMul", ["act", "w_down"], ["d0"], name="ff.down"),
        helper.make_node("Add", ["d0", "b_down"], ["d"], name="ff.down.bias"),
        helper.make_node("Transpose", ["d"], ["dt"], name="to_picture_t", perm=[0, 2, 1]),
        helper.make_node("Reshape", ["dt", "picture"], ["p"], name="to_picture"),
        helper.make_node("Conv", ["p", "w_out"], ["out_sample"], name="conv_out"),
    ]
    info = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [2, 4, H, H]) for n in ("sample", "out_sample")]
    initializers = [numpy_helper.from_array(value, name) for name, value in values.items()]
    graph = helper.make_graph(nodes, "block", info[:1], info[1:], initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, str(path))
    return path


def feeds(count: int) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(1)
    return [{"sample": rng.standard_normal((2, 4, H, H), dtype=np.float32)} for _ in range(count)]


def run(path: Path, feed: dict[str, np.ndarray]) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(str(path), options, ["CPUExecutionProvider"]).run(None, feed)[0]


@pytest.fixture(scope="module", params=["plain", "smooth"])
def graphs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A float graph and its INT8 twin, legalised as for the CPU; once with SmoothQuant, which adds nodes."""
    folder = tmp_path_factory.mktemp(request.param)
    source = write_graph(folder / "float.onnx")
    settings = QuantSettings(smooth_quant_alpha=0.5 if request.param == "smooth" else None)
    quantize_onnx(source, feeds(8), folder / "int8.onnx", settings=settings)
    passes.run_pipeline(folder / "int8.onnx", folder / "legal.onnx", ("mtu::legalise-qdq",), passes.PassContext())
    return source, folder / "legal.onnx"


@pytest.fixture(scope="module")
def switched(graphs: tuple[Path, Path]) -> Iterator[SwitchedGraph]:
    with SwitchedGraph(*graphs) as graph:
        yield graph


def test_all_off_is_the_float_graph_and_all_on_is_the_int8_graph(
    graphs: tuple[Path, Path], switched: SwitchedGraph
) -> None:
    feed = feeds(1)[0]
    np.testing.assert_array_equal(switched.run(feed), run(graphs[0], feed))
    everything = switched.run(feed, [group.name for group in switched.groups])
    np.testing.assert_allclose(everything, run(graphs[1], feed), atol=1e-5)
    assert sqnr_db(switched.run(feed), everything) < 60  # INT8 does change something


def test_layers_that_read_one_quantiser_share_a_switch(switched: SwitchedGraph) -> None:
    members = {group.name: group.members for group in switched.groups}
    assert members["attn.q"] == ("attn.q", "attn.k", "attn.v")
    assert {"conv_in", "attn.q", "ff.up", "ff.down", "conv_out"} <= set(members)
    assert {group.op_type for group in switched.groups} == {"Conv", "MatMul"}


def test_each_switch_changes_the_output_by_itself(switched: SwitchedGraph) -> None:
    feed = feeds(1)[0]
    outputs = [switched.run(feed, (group.name,)) for group in switched.groups]
    for i, one in enumerate(outputs):
        assert np.isfinite(one).all()
        assert all(not np.array_equal(one, other) for other in [switched.run(feed), *outputs[:i]])


def test_the_estimate_points_at_the_layer_that_lost_its_steps(tmp_path: Path) -> None:
    """One huge channel in a tensor leaves the others next to no steps: the layer that reads it is worse by far."""
    decibels = {}
    for wild in (False, True):
        folder = tmp_path / str(wild)
        source = write_graph(folder / "float.onnx", wild=wild)
        quantize_onnx(source, feeds(8), folder / "int8.onnx", settings=QUIET)
        told: list[int] = []
        with SwitchedGraph(source, folder / "int8.onnx") as graph:
            calls = answers(graph, feeds(3))
            found = estimate(graph, calls, guidance="text", probes=16, progress=told.append)
            everything = compare_calls(graph, calls, [group.name for group in graph.groups], guidance="text")
        place = [group.name for group in found.groups].index("ff.down")
        decibels[wild] = found.sqnr_db(place)
        assert found.worst_sqnr_db(place) <= found.sqnr_db(place) and sum(told) == 3
        # Single errors add up to about the error of all together.
        joint = np.mean([10 ** (-step.sqnr_db / 10) for step in everything])
        assert found.noise.sum(axis=0).mean() == pytest.approx(joint, rel=0.5)
        assert found.guidance_noise.shape == (len(found.groups), 3, 1)
        assert found.guidance_db(place) is not None and not found.measured.any()
    assert decibels[True] < decibels[False] - 10


def test_estimates_are_what_is_measured(switched: SwitchedGraph) -> None:
    """Attention's products, its softmax, layers that share a quantiser: within a decibel; two where they do the most.

    400 probes of two samples leave 7 % to chance; the rest is of higher order, and grows with the error.
    """
    calls = answers(switched, feeds(2))
    found = estimate(switched, calls, guidance="text", probes=400)
    everyone = range(len(switched.groups))
    for place, call in enumerate(calls):
        for number, (noise, deltas) in zip(everyone, measure(switched, call, everyone, guidance="text"), strict=True):
            allowed = 0.25 if noise < 1e-3 else 0.6
            assert found.noise[number, place] == pytest.approx(noise, rel=allowed)
            assert found.guidance_noise[number, place] == pytest.approx(deltas, rel=allowed)


def test_what_is_not_held_is_run_again(graphs: tuple[Path, Path], switched: SwitchedGraph) -> None:
    (whole,) = switched.errors(feeds(1), 4)
    with SwitchedGraph(*graphs, held_bytes=3000) as graph:
        (parts,) = graph.errors(feeds(1), 4)
    assert whole.shape == (4, len(switched.groups), 2) and np.abs(whole).min() > 0
    np.testing.assert_allclose(parts, whole, rtol=1e-4, atol=1e-6)


def test_a_probe_is_the_same_for_all_samples(switched: SwitchedGraph) -> None:
    """Two samples that are equal have equal errors, and a guidance delta without any."""
    feed = {"sample": np.concatenate([feeds(1)[0]["sample"][:1]] * 2)}
    (found,) = switched.errors([feed], 3)
    np.testing.assert_allclose(found[..., 0], found[..., 1], rtol=1e-3, atol=1e-6)


def test_a_graph_with_an_unknown_operation_has_no_estimates(tmp_path: Path) -> None:
    source = write_graph(tmp_path / "float.onnx")
    model = onnx.load(source)
    node = next(node for node in model.graph.node if node.name == "ff.act")
    node.op_type = "Softsign"
    onnx.save(model, source)
    quantize_onnx(source, feeds(4), tmp_path / "int8.onnx", settings=QUIET)
    with SwitchedGraph(source, tmp_path / "int8.onnx") as graph:
        assert not graph.derivable
        found = estimate(graph, answers(graph, feeds(1)), guidance="none", probes=2)
    assert np.isnan(found.noise).all() and found.noise.shape == (len(found.groups), 1)


@pytest.mark.parametrize("parallel", [False, True])
def test_runs_beside_each_other_give_the_same(
    graphs: tuple[Path, Path], switched: SwitchedGraph, monkeypatch: pytest.MonkeyPatch, parallel: bool
) -> None:
    monkeypatch.setattr("calibration.switched_graph._cores", lambda: 3)
    names = [group.name for group in switched.groups]
    with SwitchedGraph(*graphs, parallel=parallel) as other:
        for feed in feeds(2):
            each = list(other.run_each(feed, range(len(names))))
            assert len(each) == len(names) > 1
            for name, found in zip(names, each, strict=True):
                np.testing.assert_array_equal(found, switched.run(feed, (name,)))
        for feed, found in zip(feeds(5), other.run_all(feeds(5), names[:2]), strict=True):
            np.testing.assert_array_equal(found, switched.run(feed, names[:2]))
        for ours, found in zip(switched.errors(feeds(5), 2), other.errors(feeds(5), 2), strict=True):
            np.testing.assert_allclose(found, ours, rtol=1e-3, atol=1e-6)


def test_without_guidance_there_are_no_deltas(switched: SwitchedGraph) -> None:
    found = estimate(switched, answers(switched, feeds(1)), guidance="none", probes=1)
    assert found.guidance_db(0) is None and found.guidance_noise.shape[2] == 0
    with pytest.raises(CalibrationError, match="no inputs"):
        estimate(switched, [], guidance="none", probes=1)


def test_what_lies_beside_the_graph_goes_away(graphs: tuple[Path, Path]) -> None:
    before = set(graphs[0].parent.iterdir())
    with SwitchedGraph(*graphs):
        assert set(graphs[0].parent.iterdir()) > before
    assert set(graphs[0].parent.iterdir()) == before


def test_weights_in_files_are_not_written_again(graphs: tuple[Path, Path], tmp_path: Path) -> None:
    apart = graph_io.save(graph_io.load(graphs[0]), tmp_path / "float.onnx", external_bytes=0)
    data = apart.with_name(f"{apart.name}.data")
    with SwitchedGraph(apart, graphs[1]) as graph:
        (joined,) = (path for path in tmp_path.glob(".joined-*.onnx"))
        assert data.name in graph_io.weight_files(graph_io.load_proto(joined))
        assert graph_io.disk_bytes(joined) - data.stat().st_size < joined.stat().st_size + graphs[1].stat().st_size
        feed = feeds(1)[0]
        with SwitchedGraph(*graphs) as inline:
            np.testing.assert_array_equal(graph.run(feed), inline.run(feed))
            # Derivatives are another runtime's, which has the weights in memory while the first has not.
            np.testing.assert_array_equal(next(graph.errors([feed], 2)), next(inline.errors([feed], 2)))
            np.testing.assert_array_equal(graph.run(feed), inline.run(feed))


def test_graphs_that_do_not_belong_together_are_refused(graphs: tuple[Path, Path], tmp_path: Path) -> None:
    model = graph_io.load(graphs[0])
    next(node for node in model.graph if node.name == "ff.up").name = "another"
    renamed = graph_io.save(model, tmp_path / "renamed.onnx")
    with pytest.raises(PassError, match=r"has no layer called 'ff\.up'"):
        join(renamed, graphs[1])
    with pytest.raises(PassError, match="no quantised layer"):
        join(graphs[0], graphs[0])


def test_calls_are_spread_over_the_timesteps() -> None:
    timesteps = [float(t) for _ in range(3) for t in range(900, -1, -100)]
    picked = [timesteps[i] for i in evenly_spread(timesteps, 4)]
    assert sorted(picked)[0] == 0.0 and sorted(picked)[-1] == 900.0 and len(set(picked)) == 4
    assert evenly_spread(timesteps, 99) == list(range(30))
