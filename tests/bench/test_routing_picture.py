"""The README's picture of both forms of routing says what was measured, and can be read by those who do not see it."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest

from bench.routing_picture import FIGURE, draw, measured_rows, planned_rows
from mtu_compile.core.errors import ConfigError

TASKS = ("t2i", "edit & more", "sr")


def test_figures_of_a_benchmark_become_bars() -> None:
    static = {"resident_bytes": 40_000_000, "switch_seconds": 0.5, "load_seconds": 1.0}
    shared = {"resident_bytes": 10_000_000, "switch_seconds": 0.0002}
    picture = draw(measured_rows({"forms": {"static": static, "shared": shared}}), TASKS)
    root = ElementTree.fromstring(picture)
    texts = ["".join(one.itertext()) for one in root.findall(".//{*}text")]
    assert {"40.0 MB", "10.0 MB", "500 ms", "0.2 ms", "edit & more: gates, norms"} <= set(texts)
    assert "loading all tasks" not in texts  # measured for one of the two only
    bars = {
        one.get("class"): float(one.get("width") or 0)
        for one in root.findall(".//{*}rect")
        if one.get("height") == "15"
    }
    assert bars["static"] == pytest.approx(250) and bars["shared"] < 3
    assert "40.0 MB against 10.0 MB" in root.attrib["aria-label"] and "estimate" not in picture
    assert "prefers-color-scheme:dark" in picture


def test_without_a_benchmark_it_is_an_estimate_and_says_so() -> None:
    disk = {"static": 18_000_000, "shared": 9_500_000}
    plan = {"static_bytes": 3e7, "shared_bytes": 2e7, "disk_bytes": disk}
    rows = planned_rows(plan)
    assert [row.said["static"] for row in rows] == ["30.0 MB", "18.0 MB"]
    assert all("estimate" in row.what for row in rows)
    with pytest.raises(ConfigError, match="no figure of both forms"):
        measured_rows({"forms": {"static": {"disk_bytes": 1}, "shared": {}}})


def test_the_picture_in_the_readme_is_whole() -> None:
    root = ElementTree.parse(FIGURE).getroot()
    assert root.attrib["aria-label"].startswith("an engine for each task against one engine for all; memory")
