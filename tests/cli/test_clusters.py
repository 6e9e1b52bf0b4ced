"""A whole build on a real cluster of two workers, one of which is killed on the way, makes what is made here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.bundles import assert_same
from tests.steps.clusters import dask_cluster, until

Run = Callable[..., Any]
BUILD = (
    *("--int8", "--no-mixed-precision", "--steps", "2", "--calibration-pictures", "1", "--check-pictures", "1"),
    *("--accuracy-gate", "off", "--target", "cpu", "--target", "onnxruntime", "--json"),
)


@pytest.mark.heavy
def test_a_build_on_a_cluster_that_loses_a_worker_makes_the_same_bundles(
    tiny_model: Path, tmp_path: Path, mtu: Run
) -> None:
    def build(place: str, *options: object) -> subprocess.Popen[str]:
        where = ("-o", tmp_path / place, "--cache", tmp_path / f"cache-{place}")
        command = [sys.executable, "-m", "mtu_compile", "build", tiny_model, *BUILD, *where, *options]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "NO_COLOR": "1"}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen(list(map(str, command)), text=True, env=environment, **pipes)  # type: ignore[call-overload]

    entries, said = tmp_path / "cache-there" / "entries", list[str]()
    planned = mtu("plan", tiny_model, "--cache", tmp_path / "cache-there")  # exports; all that follows is the cluster's
    assert planned.code == 0, planned.err
    with dask_cluster(tmp_path / "dask") as cluster:
        there = build("there", "--executor", cluster.name)
        assert there.stderr is not None
        reading = threading.Thread(target=said.extend, args=(there.stderr,))
        reading.start()
        # in mid-build: graphs are there, and a calibration set or a reference is being made by each worker
        until(lambda: len(list(entries.glob(".captured-*")) + list(entries.glob(".recorded-*"))) == 2, 600)
        cluster.processes[1].kill()
        assert there.stdout is not None
        out = there.stdout.read()
        reading.join()
        assert there.wait() == 0, "".join(said)
    told = json.loads(out)
    assert told["failed"] == {} and list(told["bundles"]) == ["cpu", "onnxruntime"]
    (lost,) = [line for line in said if "was lost" in line]
    assert lost.startswith("warning: the worker of process") and "is run again by the worker" in lost
    kept = [path.name.split("-")[0] for path in entries.glob("[!.]*")]
    assert kept.count("captured") == kept.count("recorded") == 2  # a task each: what targets share was made once

    done = mtu("build", tiny_model, *BUILD, "-o", tmp_path / "here", "--no-cache", "--executor", "here")
    assert done.code == 0, done.err
    for name in ("cpu", "onnxruntime"):
        assert_same(tmp_path / "there" / name, tmp_path / "here" / name)
