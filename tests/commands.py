"""``mtu-compile`` as a user runs it, in a process of its own, without seconds of imports for each.

A process that has imported torch and the other large libraries, and has done nothing with them, waits for commands and
forks a child for each. The child is a process like any other: its own working folder, environment, files and memory.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import select
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mtu_compile.runtime import cpu_isa
from targets.npu.provider import cache_folder as npu_cache

ROOT = Path(__file__).resolve().parents[1]

#: What commands import, libraries and our own modules that have them at their top; nothing of it starts a thread.
LOADED = (
    *("torch", "diffusers", "transformers", "onnx", "onnx_ir", "onnxscript", "onnxruntime", "openvino", "nncf"),
    *("nncf.onnx.graph.onnx_helper", "torch.onnx", "skimage.metrics", "torchmetrics", "polygraphy.backend.onnxrt"),
    *("mtu_compile.compile", "mtu_compile.model.pipeline", "mtu_compile.model.export"),
)

#: Python for ``before`` of a command that is to try every instruction set, which takes a process for each.
EVERY_LEVEL = "from tests.commands import every_level; every_level()"

#: Longest a command may take, in seconds: against one that hangs, not a measure of any.
LIMIT = 900


#: What a command's environment may have of its own; libraries read whatever else is there when they are imported.
CACHE_HOME, HOME = "XDG_CACHE_HOME", "HOME"

_up_to = cpu_isa.up_to


def some_levels(most: str) -> tuple[str, ...]:
    """The lowest instruction set that this CPU can stand in for, and ``most``: what differs most, of up to six."""
    return tuple(dict.fromkeys((_up_to(most)[0], most)))


def every_level() -> None:
    """Undo what ``serve`` does for the sake of time."""
    cpu_isa.up_to = _up_to


#: ``mtu-compile`` that takes what this test run has exported from the folder named after the root folder.
_SHARING = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv.pop(1))
from mtu_compile.cli import main
from mtu_compile.model import export
from tests.shared_exports import shared_export
export._export = shared_export(Path(sys.argv.pop(1)))
main()
"""


def own_process(exports: Path) -> list[str]:
    """The beginning of the command line of an ``mtu-compile`` that is to be killed; what it exports is shared."""
    return [sys.executable, "-c", _SHARING, str(ROOT), str(exports)]


@dataclass(frozen=True)
class Outcome:
    """What a command left behind."""

    code: int
    out: str
    err: str


class Commands:
    """Runs commands in ``folder``'s scratch files; ``exports`` is where they share what they export.

    ``loaded`` is imported before any of them.
    """

    def __init__(self, folder: Path, exports: Path, loaded: Sequence[str] = LOADED) -> None:
        self.folder = folder
        self.loaded = tuple(loaded)
        self.exports = exports
        self.waiting: dict[str, subprocess.Popen[str]] = {}

    def run(self, arguments: Sequence[object], cwd: Path | None, before: str, fresh: bool) -> Outcome:
        """One command after the Python of ``before``; ``fresh``: in an interpreter that has imported nothing yet."""
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "NO_COLOR": "1"}
        environment.pop("PYTEST_CURRENT_TEST", None)
        home = {CACHE_HOME: str(self._cache_home(before)), HOME: environment.pop(HOME, "/")}
        environment.pop(CACHE_HOME, None)
        words = list(map(str, arguments))
        if fresh or not hasattr(os, "fork"):
            environment |= home
            program = f"{before}\nfrom mtu_compile.cli import main\nmain()"
            command = [sys.executable, "-c", program, *words]
            done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, timeout=LIMIT)
            return Outcome(done.returncode, done.stdout, done.stderr)
        out, err = self.folder / "out", self.folder / "err"
        request = {
            "arguments": words,
            "cwd": str(cwd or Path.cwd()),
            "before": before,
            "environment": home,
            "out": str(out),
            "err": str(err),
        }
        server = self._server(environment)
        assert server.stdin is not None and server.stdout is not None
        server.stdin.write(json.dumps(request) + "\n")
        server.stdin.flush()
        if not select.select([server.stdout], [], [], LIMIT)[0]:
            self.close()
            raise subprocess.TimeoutExpired(words, LIMIT)
        answer = server.stdout.readline()
        assert answer, "the process that runs commands has died"
        return Outcome(json.loads(answer), out.read_text(encoding="utf-8"), err.read_text(encoding="utf-8"))

    def _cache_home(self, before: str) -> Path:
        """A user's cache folder: everybody's in this test run, but of its own for a program that has been changed.

        The waiting process has no part in it: a new one for each changed program would be seconds of imports again.
        """
        home = Path(tempfile.mkdtemp(dir=self.folder)) if before else self.exports.with_name("cache-home")
        npu = home / "mtu-compile" / "npu"
        npu.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            npu.symlink_to(npu_cache())  # a set-up compiler is the machine's
        return home

    def _server(self, environment: dict[str, str]) -> subprocess.Popen[str]:
        """The waiting process with this environment: libraries read theirs when they are imported."""
        key = json.dumps(sorted(environment.items()))
        if key not in self.waiting or self.waiting[key].poll() is not None:
            program = f"from tests.commands import serve; serve({str(self.exports)!r}, {self.loaded!r})"
            self.waiting[key] = subprocess.Popen(
                [sys.executable, "-c", program],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                cwd=ROOT,
                env={**environment, HOME: os.environ.get(HOME, "/")},
                start_new_session=True,
            )
        return self.waiting[key]

    def close(self) -> None:
        """End the waiting processes; a command that hangs is theirs, and ends with them."""
        for server in self.waiting.values():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(server.pid, 9)
            server.communicate()
        self.waiting.clear()


def serve(exports: str, loaded: Sequence[str]) -> None:
    """Fork a child for each request on stdin and answer with its exit code, until stdin ends.

    What the children export is shared, and they check bundles at two instruction sets; all of them are tried by
    tests/cli/test_instruction_sets.py.
    """
    from tests.shared_exports import shared_export

    # Told that this is a robot, libraries start no thread to report that they were imported, and a fork has none.
    robot, before = {"CI": "true", "NNCF_CI": "1"}, dict(os.environ)
    os.environ.update(robot)
    for module in (*loaded, "mtu_compile.model.export"):
        importlib.import_module(module)
    for name in robot.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)
    assert threading.active_count() == 1, threading.enumerate()
    sys.modules["mtu_compile.model.export"]._export = shared_export(Path(exports))  # type: ignore[attr-defined]
    cpu_isa.up_to = some_levels
    if loaded:
        importlib.import_module("targets.openvino.tokenizer_ir").lower_case_map()  # the same for all, a second's work
    replies = os.fdopen(os.dup(1), "w")
    gc.freeze()  # what is there is shared with the children for as long as nobody writes to it
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if child == 0:
            replies.close()
            _become(request)
        _, status = os.waitpid(child, 0)
        replies.write(json.dumps(os.waitstatus_to_exitcode(status)) + "\n")
        replies.flush()


def _become(request: dict[str, Any]) -> None:
    """Be the command's process: the same as ``python -c``, which ends here."""
    new = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    for number, path, mode in ((0, os.devnull, os.O_RDONLY), (1, request["out"], new), (2, request["err"], new)):
        descriptor = os.open(path, mode, 0o600)
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.chdir(request["cwd"])
    os.environ.update(request["environment"])
    sys.argv = ["-c", *request["arguments"]]
    scope = {"__name__": "__main__"}
    code: Any = 0
    try:
        exec(f"{request['before']}\nfrom mtu_compile.cli import main\nmain()", scope)
    except SystemExit as stop:
        code = stop.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    if not isinstance(code, int):
        print(code, file=sys.stderr)
        code = 1
    # As at an interpreter's end, but for taking every module apart, which after torch costs half a second.
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code & 0xFF)
