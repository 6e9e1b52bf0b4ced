"""Steps on a real cluster of two workers give what they give here; a worker that is lost costs only its step."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mtu_compile.core.errors import ConfigError, MtuError, NotFiniteError
from mtu_compile.core.progress import Progress
from mtu_compile.steps import Steps, Store
from mtu_compile.steps.executors import cluster as of_clusters
from mtu_compile.steps.executors.there import Expected
from tests.steps.clusters import ROOT, DaskCluster, DidNotStart, RayCluster, dask_cluster, free_port, ray_cluster
from tests.steps.heard import Heard
from tests.steps.some_steps import Marks, awaited, drawn, failed, killed, killed_once, repeated, written
from tests.waiting import alive, until


@pytest.fixture(scope="module", params=["dask", pytest.param("ray", marks=pytest.mark.slow)])
def cluster(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[DaskCluster | RayCluster]:
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "dask":
        with dask_cluster(folder) as started:
            yield started
        return
    try:
        with ray_cluster(folder) as nodes:
            yield nodes
    except DidNotStart as error:
        pytest.skip(f"no Ray cluster starts on this machine: {error}")


@pytest.fixture
def marks(tmp_path: Path) -> Marks:
    (tmp_path / "marks").mkdir()
    return Marks(tmp_path / "marks")


@pytest.fixture
def begin(cluster: DaskCluster | RayCluster, tmp_path: Path) -> Iterator[Callable[..., Steps]]:
    """A build of a model of so many bytes; all end with the test."""
    with Store(tmp_path / "cache") as store:
        steps = Steps(store, Heard())

        def use(inputs: Any = None) -> Steps:
            steps.use(cluster.name, 1, inputs)
            return steps

        try:
            yield use
        finally:
            steps.close()


def heard(steps: Steps) -> Heard:
    assert isinstance(steps.progress, Heard)
    return steps.progress


def test_results_progress_and_errors_are_those_of_this_process(
    begin: Callable[..., Steps], marks: Marks, tmp_path: Path
) -> None:
    steps = begin()
    assert not steps.in_turn and "://127.0.0.1" in heard(steps).told[0] and heard(steps).told[0].count("worker") == 2
    text = steps.run(written.of("write", "ab", marks))
    found = steps.run_all([repeated.of(f"repeat {times}", text, times, marks) for times in (1, 2, 3)])
    assert [one["repeated"].file.read_text() for one in found] == ["ab", "abab", "ababab"]
    assert str(os.getpid()) not in {path.name.split("-")[1] for path in marks.folder.iterdir()}
    assert steps.run(drawn.of("draw", 2)) != os.getpid()
    assert heard(steps).said == [("draw", 2), 1, 1, "end", "drawn"]
    with pytest.raises(NotFiniteError, match="too large") as caught:
        steps.run(failed.of("fail", "too large"))
    error = caught.value
    assert (error.hint, error.network, error.task, error.step, error.exit_code) == ("try another", "unet", "t2i", 3, 3)
    with Store(tmp_path / "cache") as store:  # what was made there is what is made here
        here = Steps(store, Progress())
        assert here.run(repeated.of("repeat", here.run(written.of("write", "ab", marks)), 2, marks)) == found[1]
        assert marks.count("repeated") == 3


def test_a_worker_that_is_killed_costs_only_its_step(
    cluster: DaskCluster | RayCluster, begin: Callable[..., Steps], marks: Marks
) -> None:
    steps = begin()

    def work(steps: Steps, words: str) -> str:
        if words != "kill":
            return steps.run(awaited.of(f"wait {words}", words, marks)).read_text()
        until(lambda: marks.count("awaited") == 2)  # at once
        cluster.kill(parent(int(next(marks.folder.iterdir()).name.split("-")[1])))
        until(lambda: marks.count("awaited") == 3)  # the lost one, again; the other's goes on
        (marks.folder / "go").touch()
        return words

    assert steps.each(work, ["one", "kill", "two"]) == ["one", "kill", "two"]
    (said,) = heard(steps).warnings
    assert "was lost; wait " in said and "is run again by the worker of process" in said
    assert marks.count("awaited") == 3
    assert [(one.title, one.cached) for one in steps.ran] == [("wait one", False), ("wait two", False)]
    assert not list(steps.store.folder("").glob(".*"))


def parent(process: int) -> int:
    status = Path(f"/proc/{process}/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("PPid")).split()[1])


def test_a_step_whose_process_is_killed_is_tried_again_but_not_for_ever(
    begin: Callable[..., Steps], marks: Marks
) -> None:
    steps = begin()
    assert steps.run(killed_once.of("work", marks)) == 2
    assert "was lost; work is run again" in heard(steps).warnings[0]
    with pytest.raises(MtuError, match="work hard was killed wherever it was tried") as caught:
        steps.run(killed.of("work hard"))
    assert "plan" in str(caught.value.hint)
    assert steps.run(drawn.of("draw", 1)) > 0


@pytest.mark.parametrize("lacks", ["store", "lock", "versions", "input"])
def test_a_worker_that_is_not_fit_is_refused_by_name(
    begin: Callable[..., Steps], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lacks: str
) -> None:
    of_this = Expected.of_this
    elsewhere, others = tmp_path / "elsewhere", {"code": "other", "python": "2.7.18"}

    def other(store: Store, inputs: Any) -> Expected:
        real = of_this(store, inputs)
        (tmp_path / "unlocked").touch()
        if lacks == "versions":
            return replace(real, tools={**real.tools, "torch": "1.0"}, cpu={**real.cpu, "cores": 1000}, **others)
        if lacks == "store":
            return replace(real, store=elsewhere, lease=elsewhere / "lease")
        return replace(real, lease=tmp_path / "unlocked") if lacks == "lock" else real

    monkeypatch.setattr(Expected, "of_this", staticmethod(other))
    (tmp_path / "model").write_text("weights")
    with pytest.raises(ConfigError) as caught:
        begin({tmp_path / "model": "another hash"} if lacks == "input" else None)
    said = {
        "store": ["does not see the cache"],
        "lock": ["does not see locks"],
        "versions": ["another version of mtu-compile's source", "not 2.7.18", "has torch", "not 1.0", "CPU's cores is"],
        "input": ["does not have", "model"],
    }[lacks]
    assert "the worker of process" in caught.value.message and all(one in caught.value.message for one in said)


def test_a_worker_of_several_threads_or_none_at_all_is_refused(tmp_path: Path) -> None:
    with dask_cluster(tmp_path / "dask", workers=0) as empty, Store(tmp_path / "cache") as store:
        steps = Steps(store, Progress())
        with pytest.raises(ConfigError, match="has no workers"):
            steps.use(empty.name, 1)
        empty.worker(threads=2)
        empty.wait_for(1)
        with pytest.raises(ConfigError, match="2 steps at a time") as caught:
            steps.use(empty.name, 2)
        assert "--nthreads 1" in str(caught.value.hint)
        steps.close()


def test_where_nobody_answers_that_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mtu_compile.steps.executors.on_dask.ANSWER", 1.0)
    with Store(tmp_path / "cache") as store, pytest.raises(ConfigError, match="no Dask scheduler answers"):
        Steps(store, Progress()).use(f"dask://127.0.0.1:{free_port()}", 1)


def test_a_cluster_that_loses_all_workers_is_given_up_after_a_while(
    tmp_path: Path, marks: Marks, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(of_clusters, "ALONE", 1.0)
    monkeypatch.setattr(of_clusters, "COUNT", 0.1)
    with dask_cluster(tmp_path / "dask", workers=1) as started, Store(tmp_path / "cache") as store:
        steps = Steps(store, Heard())
        steps.use(started.name, 1)

        def work(steps: Steps, which: int) -> None:
            if which:
                until(lambda: marks.count("awaited") == 1)
                started.processes[1].kill()
            else:
                steps.run(awaited.of("wait", "words", marks))

        monkeypatch.setattr(steps.executor, "at_once", 2)
        with pytest.raises(MtuError, match="no workers for 1 seconds") as caught:
            steps.each(work, [0, 1])
        assert "goes on where it was" in str(caught.value.hint)
        assert "has no workers any more" in heard(steps).warnings[0]
        steps.close()


PROGRAM = """
import sys
from pathlib import Path
from mtu_compile.core.progress import Progress
from mtu_compile.steps import Steps, Store
from tests.steps.some_steps import Marks, awaited
with Store(Path(sys.argv[1])) as store:
    steps = Steps(store, Progress())
    steps.use(sys.argv[3], 1)
    steps.run(awaited.of("wait", "words", Marks(Path(sys.argv[2]))))
"""


def test_when_a_build_is_killed_its_steps_on_the_cluster_end(
    cluster: DaskCluster | RayCluster, marks: Marks, tmp_path: Path, begin: Callable[..., Steps]
) -> None:
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "cache"), str(marks.folder), cluster.name]
    build = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
    until(lambda: marks.count("awaited") == 1)
    (mark,) = marks.folder.iterdir()
    worker = int(mark.name.split("-")[1])
    build.send_signal(signal.SIGKILL)
    build.wait(timeout=60)
    until(lambda: not alive(worker))
    (marks.folder / "go").touch()
    steps = begin()  # the cluster is free for the next, which goes on
    assert steps.run(awaited.of("wait", "words", marks)).read_text() == "words"
