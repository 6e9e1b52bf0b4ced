"""JSON of strangers: what is refused, and in which words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest

from mtu_compile.core.errors import ConfigError, ModelError
from mtu_compile.core.schema import Length, Mismatch, Range, Rule, conform, parse_json, read_json
from mtu_compile.core.tasks import PAPER_TASKS, Task, Tasks


@dataclass(frozen=True)
class Inner:
    size: Annotated[int, Range(1, 8)]
    names: Annotated[tuple[str, ...], Length(1, 2)] = ("a",)


@dataclass(frozen=True)
class Outer:
    inner: tuple[Inner, ...]
    scale: float | None = None
    table: Mapping[str, bool] | None = None


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, "inner is missing, expected a list, each entry an object"),
        ([], r"is \[\], expected an object"),
        ({"inner": {}}, r"inner is {}, expected a list"),
        ({"inner": [{"size": 0}]}, r"inner\[0\].size is 0, expected a whole number from 1 to 8"),
        ({"inner": [{"size": True}]}, r"inner\[0\].size is true"),
        ({"inner": [{"size": 1.0}]}, r"inner\[0\].size is 1.0"),
        ({"inner": [{"size": 1}, {"size": "4"}]}, r'inner\[1\].size is "4", expected a whole number from 1 to 8'),
        ({"inner": [{"size": 1, "colour": 3}]}, r"inner\[0\].colour is 3, expected no such key; known are size, names"),
        ({"inner": [{"size": 1, "names": []}]}, r"names is \[\], expected 1 to 2 entries: a list, each entry text"),
        ({"inner": [{"size": 1, "names": ["\ud800"]}]}, r"names\[0\] is .*, expected text"),
        ({"inner": [], "scale": "7.5"}, 'scale is "7.5", expected a number or null'),
        ({"inner": [], "scale": float("inf")}, "scale is Infinity, expected a number"),
        ({"inner": [], "scale": 10**400}, "scale is 1000.*, expected a number"),
        ({"inner": [], "table": {"x": 1}}, "table.x is 1, expected true or false"),
    ],
)
def test_what_does_not_conform_is_named(data: Any, message: str) -> None:
    with pytest.raises(Mismatch, match=message) as error:
        conform(Outer, data)
    assert error.value.exit_code == 5 and len(error.value.message) < 200


def test_what_conforms_comes_back_typed() -> None:
    data = {"inner": [{"size": 8, "names": ["x", "y"]}], "scale": 7, "table": {"a": True}}
    assert conform(Outer, data) == Outer((Inner(8, ("x", "y")),), 7.0, {"a": True})
    assert conform(Outer, {"inner": []}) == Outer(())
    assert conform(Literal["a", "b"], "b") == "b"
    assert conform(int | tuple[int, ...], [1, 2]) == (1, 2)
    even = Annotated[int, Rule(lambda value: value % 2 == 0, "an even number")]
    with pytest.raises(Mismatch, match=r"sizes\.x is 3, expected an even number"):
        conform(Mapping[str, even], {"x": 3}, "sizes")


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("{", "is not JSON"),
        ('{"a": NaN}', "NaN is no number"),
        ("[-Infinity]", "-Infinity is no number"),
        ("[" * 100_000, "more than 64 levels"),
        ("[" * 65 + "]" * 65, "more than 64 levels"),
        ('{"a": ' * 200 + "1" + "}" * 200, "more than 64 levels"),
        ("9" * 5000, "is not JSON"),
        (b"\xff\xfe", "cannot be read"),
        (None, "is missing"),
    ],
)
def test_files_that_are_not_json(tmp_path: Path, text: str | bytes | None, named: str) -> None:
    path = tmp_path / "config.json"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    for kind in (ModelError, ConfigError):
        with pytest.raises(kind, match=named) as error:
            read_json(path, error=kind)
        assert str(path) in error.value.message and error.value.hint


def test_nesting_that_real_files_have_is_read() -> None:
    assert parse_json("[" * 64 + "]" * 64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "a" * 250}, "name is .*, expected letters, digits, '-' and '_', 64 bytes"),
        ({"name": "ж" * 33}, "name is"),
        ({"name": "../t2i"}, "name is"),
        ({"name": ""}, "name is"),
        ({"name": None}, "name is null"),
        ({"condition": "image"}, 'condition is "image", expected 0 to 8 entries: a list'),
        ({"condition": ["depth"]}, r'condition\[0\] is "depth", expected one of "image", "masked_image", "mask"'),
        ({"guidance": ["text"]}, r'guidance is \["text"\], expected one of "none", "text", "text\+image"'),
        ({"guidance": "text+image"}, 'guidance is "text\\+image", expected a condition'),
        ({"guidance_scale": "7.5"}, 'guidance_scale is "7.5", expected a number from 0 to 1000'),
        ({"guidance": "none", "guidance_scale": "7.5"}, 'guidance_scale is "7.5"'),
        ({"image_guidance_scale": -1}, "image_guidance_scale is -1, expected a number from 0"),
        ({"downscale": 0}, "downscale is 0, expected a whole number from 1 to 64 or null"),
        ({"downscale": "4"}, 'downscale is "4"'),
        ({"downscale": True}, "downscale is true"),
        ({"colour": 1}, "colour is 1, expected no such key"),
    ],
)
def test_a_task_that_is_none_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        Task.from_json({"name": "x", **change})
    if "colour" not in change and not isinstance(change.get("condition"), list):
        with pytest.raises(ModelError, match=message):
            Task(**{"name": "x", **change})


def test_tasks_come_back_the_same_and_have_names_of_their_own() -> None:
    data = [task.to_json() for task in PAPER_TASKS]
    assert conform(Tasks, data) == PAPER_TASKS
    with pytest.raises(Mismatch, match="a list of tasks with a name each of their own"):
        conform(Tasks, data[:1] * 2)
    with pytest.raises(Mismatch, match=r"tasks\[3\].downscale is 0"):
        conform(Tasks, [*data[:3], {"name": "x", "downscale": 0}], "tasks")
    assert Task("редактор-2").name == "редактор-2"
