"""The library itself, ``tensorrt`` or ``tensorrt_rtx``: importing it, hearing what it says, and stopping it.

It is imported when it is asked for. Its loggers and progress monitors are classes to derive from, so ours are made
where its module is at hand.
"""

from __future__ import annotations

import contextlib
import gc
import re
import threading
import traceback
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any, Literal, TypeVar

from mtu_compile.core.errors import ConfigError, ToolchainMissing
from mtu_compile.core.progress import Advance

Kind = Literal["tensorrt", "tensorrt-rtx"]
_T = TypeVar("_T")

_MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
_INSTALL = {
    "tensorrt": "pip install 'mtu-compile[tensorrt]' (on a Jetson, JetPack's own: sudo apt install nvidia-jetpack)",
    "tensorrt-rtx": "pip install 'mtu-compile[rtx]'",
}

#: Errors that only say that the library looked for a GPU: they accompany every error on a machine without one.
_NO_GPU = "CUDA driver version is insufficient"


def install_hint(kind: str) -> str:
    """The command that installs the library of ``kind``."""
    return _INSTALL[kind]


def load_tensorrt(kind: str) -> Any:
    """The library's Python module.

    Raises:
        ToolchainMissing: it is not installed, or a shared library it needs is not there.
        ConfigError: an unknown kind.
    """
    if kind not in _MODULES:
        raise ConfigError(f"{kind!r} is not a kind of TensorRT engine", hint=f"known: {', '.join(_MODULES)}")
    try:
        return import_module(_MODULES[kind])
    except (ImportError, OSError) as error:
        raise ToolchainMissing(f"{_MODULES[kind]} cannot be imported ({error})", hint=_INSTALL[kind]) from error


def version(kind: str) -> str:
    """Version of the library, as "10.3.0" or "1.7.1.116"; raises as ``load_tensorrt``."""
    return str(load_tensorrt(kind).__version__)


@contextlib.contextmanager
def no_collection() -> Iterator[None]:
    """No garbage collection inside, for the constructors of the library's ``Builder`` and ``Runtime``.

    They call the logger while they hold a lock that the destructors take too. If Python collects one of the library's
    objects in that call, the thread waits for itself for ever (seen with TensorRT-RTX 1.7.1).
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def in_thread(work: Callable[[], _T], stop: threading.Event) -> _T:
    """Do ``work`` in a thread and wait for it, so that Ctrl-C is noticed while the library computes.

    The library calls back from its own frames, where an exception cannot be raised; the only way to stop it is to
    answer the progress monitor with ``False``, which it does once ``stop`` is set.
    """
    results: list[_T] = []
    errors: list[BaseException] = []
    done = threading.Event()  # not Thread.join: interrupted in it, Python before 3.13 takes the thread for ended

    def target() -> None:
        try:
            if not stop.is_set():
                results.append(work())
        except BaseException as error:
            # The library's objects end here, in their own thread, and not whenever the last one lets go of the error.
            traceback.clear_frames(error.__traceback__)
            errors.append(error)
        finally:
            done.set()

    thread = threading.Thread(target=target, name="tensorrt", daemon=True)
    try:
        thread.start()
        while not done.wait(0.2):  # with a timeout, as Windows takes Ctrl-C only between waits
            pass
    except BaseException:
        stop.set()
        if thread.ident is not None:  # else it has not begun, and will find that it need not
            done.wait()
        raise
    try:
        if errors:
            raise errors[0]
        return results[0]
    finally:
        errors.clear()  # else the error, its traceback and this frame keep each other alive


def collector(trt: Any) -> Any:
    """A logger that keeps ``(severity, message)`` of errors and warnings, and prints nothing.

    A warning of the parser is told with the node it was parsing, which it only says among its verbose messages.
    """

    class Collector(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.messages: list[tuple[str, str]] = []
            self.node = ""

        def log(self, severity: Any, message: str) -> None:
            if message.startswith("Parsing node: "):  # "Parsing node: <name> [<operation>]"
                self.node = message.removeprefix("Parsing node: ")
            elif severity == trt.ILogger.WARNING:
                self.messages.append(("WARNING", f"node {self.node}: {message}" if self.node else message))
            elif severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.messages.append(("ERROR", message))

    return Collector()


def monitor(trt: Any, advance: Advance, stop: threading.Event) -> Any:
    """A progress monitor that passes steps on to ``advance`` and ends the build once ``stop`` is set."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.error: BaseException | None = None

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            pass

        def phase_finish(self, phase_name: str) -> None:
            pass

        def step_complete(self, phase_name: str, step: int) -> bool:
            try:
                advance(1)
            except BaseException as error:  # would be lost, or end the process, in the library's frames
                self.error = self.error or error
                stop.set()
            return not stop.is_set()

    return Monitor()


def first_error(messages: list[tuple[str, str]]) -> str:
    """What the first error among a ``collector``'s messages says; the ones after it are its consequences."""
    errors = [text for severity, text in messages if severity == "ERROR"]
    telling = [text for text in errors if _NO_GPU not in text] or errors
    return first_reason(telling[0]) if telling else "it does not say why"


def first_reason(text: str) -> str:
    """A message of the library without the places in its C++ code.

    Of ``"Invalid Node - n\\nITensor::getDimensions: Error Code 4: API Usage Error (n: … In f at /_src/x.cpp:4)"`` it is
    ``"n: …"``.
    """
    lines = [line.strip() for line in text.splitlines() if line.strip() and _NO_GPU not in line]
    coded = [line for line in lines if "Error Code" in line]
    line = (coded or lines or [""])[0]
    if match := re.search(r"Error Code \d+: [^(]*\((.*)\)$", line):
        line = match[1]
    line = re.sub(r"\s*In \w+ at \S+:\d+", "", line)  # "… In validate at /_src/optimizer/network.cpp:40"
    line = re.sub(r"\[?\w+\.cpp:\d+(: \w+\])?:? ?", "", line)  # "[tactic.cpp:264: run] …", "importer.cpp:1980: …"
    return line.removeprefix("Assertion failed: ").strip().rstrip(".")
