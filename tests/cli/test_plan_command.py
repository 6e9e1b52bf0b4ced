from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

Run = Callable[..., Any]

#: A device of 100 kB under the name of another, made in the process that runs the command.
SMALL = """
import targets
from targets.openvino.cpu import CpuTarget, SPEC
class Small(CpuTarget):
    def memory(self):
        return 100_000
targets.get = lambda name: Small(SPEC)
"""


def test_a_plan_is_a_table_and_leaves_nothing(tiny_model: Path, tmp_path: Path, mtu: Run) -> None:
    done = mtu(
        "plan",
        tiny_model,
        "--target",
        "cpu",
        "--int8",
        cwd=tmp_path,
        before=f"import tempfile; tempfile.tempdir={str(tmp_path)!r}",
        fresh=False,
    )
    assert done.code == 0, done.err
    for word in ("t2i", "inpaint", "text_encoder", "vae_decoder", "all tasks", "static: an engine a task", "fits"):
        assert word in done.out
    assert "--routing static: engines for each of the 2 tasks take" in done.out
    assert "estimated" in done.err and "plan" in done.err
    assert list(tmp_path.iterdir()) == []


def test_what_does_not_fit_ends_with_an_error_after_the_plan(tiny_model: Path, mtu: Run) -> None:
    done = mtu("plan", tiny_model, "--fp32", "--json", "--task", "t2i", before=SMALL, fresh=False)
    plan = json.loads(done.out)
    assert done.code == 1 and plan["fits"] is False
    assert plan["suggestions"] and list(plan["tasks"]) == ["t2i"]
    assert "error: task 't2i' in fp32 needs" in done.err and "hint:" in done.err and "--int8" in done.err


def test_an_unknown_task_is_refused(tiny_model: Path, mtu: Run) -> None:
    done = mtu("plan", tiny_model, "--task", "colour")
    assert done.code == 2 and "unknown task" in done.err and "t2i" in done.err
