from __future__ import annotations

import pytest

import passes
from mtu_compile.core.errors import ConfigError, PassError
from passes.cleanup import Cleanup


def test_the_pipelines_hold_together() -> None:
    for ids in (passes.TASK_PIPELINE, passes.STATIC_PIPELINE):
        assert tuple(item.id for item in passes.builtin().pipeline(ids)) == ids


def test_a_second_pass_of_the_same_name_is_refused() -> None:
    with pytest.raises(ConfigError, match="two passes are called 'mtu::cleanup'"):
        passes.Registry([Cleanup(), Cleanup()])


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (("mtu::no-such",), "unknown pass 'mtu::no-such'"),
        (("mtu::cleanup", "mtu::cleanup"), "twice"),
        (("mtu::cleanup", "mtu::freeze-shapes"), "'mtu::cleanup' has to come after 'mtu::freeze-shapes'"),
        (("mtu::merge-experts", "mtu::bind-task"), "'mtu::merge-experts' has to come after 'mtu::bind-task'"),
    ],
)
def test_a_pipeline_that_does_not_hold_together_is_refused(ids: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        passes.builtin().pipeline(ids)


def test_a_pass_that_leaves_an_invalid_graph_is_an_error_with_its_name(parse: object) -> None:
    graph = parse("agraph (float[2] x) => (float[2] y) { y = Relu(x) }")  # type: ignore[operator]

    class Breaks(Cleanup):
        id = "test::breaks"

        def run(self, graph: object, context: passes.PassContext) -> passes.PassResult:
            next(iter(graph.graph)).op_type = "NoSuchOperator"  # type: ignore[attr-defined]
            return passes.PassResult(self.id, graph, 1)  # type: ignore[arg-type]

    with pytest.raises(PassError, match=r"test::breaks left an invalid graph: .*NoSuchOperator"):
        passes.run_passes(graph, [Breaks()], passes.PassContext())
