"""The side-by-side table: what is measured is shown, and what failed says why."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from bench.peers import race
from bench.peers.contenders import CONTENDERS, Contender
from bench.peers.page import table

FAKE = """
from pathlib import Path
from PIL import Image

def prepare(model, folder, size, options):
    folder.mkdir(parents=True)
    (folder / "weights").write_bytes(bytes(1000))

class Pipeline:
    def __init__(self, folder, size, options):
        if options.get("broken"):
            raise RuntimeError("no such kernel")
        self.size = size
    def __call__(self, prompt, steps, seed):
        return Image.new("RGB", (self.size, self.size))

def unets(folder, size, options, count):
    return bytearray(count * 50_000_000)
"""


@pytest.fixture
def contender(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Contender:
    """One whose library is a file of this test, in this interpreter's environment."""
    (tmp_path / "library").mkdir()
    (tmp_path / "library" / "some_library.py").write_text(FAKE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "library"))
    return Contender("some library", "some_library", str(Path(sys.executable).parent.parent))


def test_a_contender_is_measured(contender: Contender, tmp_path: Path) -> None:
    log = tmp_path / "log"
    made = race.prepare(contender, (tmp_path, tmp_path), tmp_path / "root", 64, log)
    assert made["disk_bytes"] == 1000 and made["prepare_peak_bytes"] >= 0
    memory = race.memory_of_tasks(contender, tmp_path / "root", 64, log)
    assert 40e6 < memory["unets_one_bytes"] < 80e6 and 180e6 < memory["unets_four_bytes"] < 250e6
    other = Contender("another", contender.module, contender.environment, shares=contender.name)
    rows = race.race([contender, other], tmp_path / "root", 64, 2, log, lambda text: None)
    assert rows["another"]["image_ratio"] > 0 and rows[contender.name]["image_seconds"] > 0


def test_one_that_fails_is_listed_with_its_error(contender: Contender, tmp_path: Path) -> None:
    broken = Contender("broken", contender.module, contender.environment, {"broken": "yes"}, shares=contender.name)
    rows = race.race([contender, broken], tmp_path / "root", 64, 1, tmp_path / "log", lambda text: None)
    assert rows["broken"] == {"error": "RuntimeError: no such kernel"}


def test_the_table_has_a_row_for_each_and_says_what_failed() -> None:
    first, second, third = (one.name for one in CONTENDERS[:3])
    text = table(
        {first: {"step_seconds": 0.2}, second: {"step_seconds": 0.25, "step_ratio": 0.8}, third: {"error": "x"}}
    )
    assert f"| **{first}** | 200 ms |  |" in text and f"| **{second}** | 250 ms | 0.80 |" in text
    assert f"- {third} could not be run: `x`" in text


def test_names_of_folders_and_of_float_twins_exist() -> None:
    names = [one.name for one in CONTENDERS]
    assert len({*names}) == len(names)
    assert {one.shares for one in CONTENDERS} | {one.float_name for one in CONTENDERS} <= {None, *names}
    for one in CONTENDERS:
        assert json.loads(json.dumps(dict(one.options))) == dict(one.options)
