"""Intel's NPU compiler, wherever it can be had: an IR goes in, a blob for a platform comes out. No NPU is needed.

What is needed is ``openvino_intel_npu_compiler``. Looked for are, in this order:

* the library beside OpenVINO's NPU plugin: OpenVINO's Windows wheel and Intel's archives have it there;
* the one of the Windows wheel, run by Wine (``targets.npu.wine``), as the Linux wheel comes without it
  (openvinotoolkit/openvino#36374, 2026.2 to 2026.4). ``python -m targets.npu`` sets that up.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mtu_compile.core.atomic import atomic_file
from mtu_compile.core.errors import BuildError, ModelError, MtuError, ToolchainMissing
from mtu_compile.core.hashing import file_sha256
from mtu_compile.core.progress import Progress
from targets.npu import wine
from targets.npu.provider import Provider, cache_folder, native, openvino_release
from targets.npu.report import TRACE_FILE, Report, log_errors, read_report
from targets.npu.worker import SAID
from targets.openvino.engine import reason

#: What sets the compiler up; every hint names it.
SETUP = "make npu-compiler   (or: python -m targets.npu)"

#: Seconds after which a compilation is given up: an SD 1.5 UNet takes two minutes on two cores.
TIMEOUT = 3600.0

#: Exit codes of ``npu_compile.c``, which ``targets.npu.worker`` shares.
_STAGES = {3: "openvino cannot be started", 4: "the model cannot be read", 6: "the blob cannot be written"}


class CompilerFailed(BuildError):
    """The compiler refused a model, or died.

    Attributes:
        command: what was run.
        exit_code: how it ended; negative for a signal.
        log: what it wrote on stdout, the compiler's log included.
        stderr: what it wrote there.
    """

    def __init__(
        self, message: str, *, command: Sequence[str], exit_code: int, log: str, stderr: str, hint: str
    ) -> None:
        super().__init__(message, hint=hint)
        self.command = tuple(command)
        self.exit_code = exit_code
        self.log = log
        self.stderr = stderr


@dataclass(frozen=True)
class Blob:
    """A blob, and what the compiler said about it.

    Attributes:
        path: the blob.
        seconds: what compiling took on this machine.
        sha256: of the blob's bytes.
        estimate_ms: the compiler's own latency estimate in milliseconds; a cost model's, never measured.
        report: everything else it said.
        source: whose estimate that is, in words.
    """

    path: Path
    seconds: float
    sha256: str
    estimate_ms: float | None
    report: Report
    source: str


def find_compiler(cache: Path | None = None) -> Provider:
    """The first compiler found: beside OpenVINO's NPU plugin, else the Windows wheel's that was set up under Wine.

    Args:
        cache: where ``set_up`` put it, or ``None`` for ``cache_folder()``.

    Raises:
        ToolchainMissing: there is none; the hint is the command that sets one up.
    """
    release = openvino_release()
    provider = native(release) or wine.provider(release, cache or cache_folder())
    if provider is None:
        raise ToolchainMissing(
            f"there is no Intel NPU compiler for openvino {release} on this machine: "
            + ("OpenVINO's Linux wheel comes without it" if sys.platform == "linux" else "it is not beside the plugin"),
            hint=SETUP,
        )
    return provider


def compile_blob(
    xml: Path,
    out: Path,
    *,
    platform: str,
    config: Mapping[str, str] | None = None,
    mode: Mapping[str, str] | None = None,
    progress: Progress | None = None,
    provider: Provider | None = None,
    timeout: float = TIMEOUT,
) -> Blob:
    """Compile an IR of static shapes into a blob.

    Args:
        xml: the IR, with its ``.bin`` beside it.
        out: the blob to write; it appears whole or not at all.
        platform: ``"3720"``, ``"4000"``, ``"5010"``, …
        config: further properties of OpenVINO's NPU plugin (``{"NPU_TURBO": "YES"}``).
        mode: options of the compiler (``NPU_COMPILATION_MODE_PARAMS``), by name.
        progress: told that it runs; the compiler does not say how far it is.
        provider: what ``find_compiler`` found, if it was asked already.
        timeout: seconds after which the compiler is stopped.

    Raises:
        ToolchainMissing: there is no compiler here.
        ModelError: the IR is incomplete.
        CompilerFailed: the compiler refused the model, died, or took too long; it holds command, exit code and log.
        MtuError: the blob cannot be written.
    """
    weights = xml.with_suffix(".bin")
    for file in (xml, weights):
        if not file.is_file():
            raise ModelError(f"{file} does not exist", hint="an IR is an .xml file with its .bin beside it")
    provider = provider or find_compiler()
    options = {**(mode or {}), **({"enable-schedule-trace": "true"} if provider.traces else {})}
    properties = {
        "NPU_COMPILER_TYPE": "PLUGIN",
        "NPU_PLATFORM": platform,
        "LOG_LEVEL": "LOG_INFO",
        **(config or {}),
        **({"NPU_COMPILATION_MODE_PARAMS": " ".join(f"{k}={v}" for k, v in options.items())} if options else {}),
    }
    with (progress or Progress()).stage(f"compile {xml.parent.name} for Intel NPU {platform}"), _work(out) as work:
        # The compiler's C interface takes names in the system's code page: the work folder has names any of them has,
        # and is where the schedule is written to.
        for file in (xml, weights):
            _link(file.resolve(), work / f"model{file.suffix}")
        command = (*provider.command, "model.xml", "out.blob", *(f"{key}={value}" for key, value in properties.items()))
        began = time.monotonic()
        code, log, stderr = _run(command, provider.environment, work, timeout)
        seconds = time.monotonic() - began
        if code != 0 or not (work / "out.blob").is_file():
            raise _failure(xml.parent.name, command, code, log, stderr, timeout)
        report = read_report(log, work / TRACE_FILE)
        with atomic_file(out) as temporary:
            (work / "out.blob").replace(temporary)
    return Blob(
        path=out,
        seconds=seconds,
        sha256=file_sha256(out),
        estimate_ms=report.latency_ms,
        report=report,
        source=f"Intel NPU compiler of OpenVINO {provider.version}, platform {platform}, cost model; not measured",
    )


@contextlib.contextmanager
def _work(out: Path) -> Iterator[Path]:
    """A folder beside ``out``, so that what is made in it can be renamed into place."""
    try:
        work = Path(tempfile.mkdtemp(prefix=".npu-", dir=out.parent))
    except OSError as error:
        raise MtuError(f"cannot write in {str(out.parent)!r}: {error.strerror}") from error
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _link(source: Path, link: Path) -> None:
    try:
        link.symlink_to(source)
    except OSError:  # Windows without the right to, and file systems without links
        shutil.copyfile(source, link)


def _run(command: Sequence[str], extra: Mapping[str, str], folder: Path, timeout: float) -> tuple[int | None, str, str]:
    """Exit code (``None``: stopped after ``timeout`` seconds), stdout and stderr of ``command``.

    It runs in a process group of its own, of which nothing is left when this ends, Ctrl-C included.
    """
    with (folder / "stdout").open("w+b") as stdout, (folder / "stderr").open("w+b") as stderr:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env={**os.environ, **extra},
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            start_new_session=True,
        )
        code: int | None = None
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = process.wait(timeout)
        finally:
            _end_group(process)
        texts = []
        for file in (stdout, stderr):
            file.seek(0)
            texts.append(file.read().decode("utf-8", "replace").replace("\r\n", "\n"))
    return code, texts[0], texts[1]


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """Kill what is left of a process and of its children."""
    if hasattr(os, "killpg"):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
    elif process.poll() is None:
        process.kill()
    process.wait()


def _failure(
    name: str, command: Sequence[str], code: int | None, log: str, stderr: str, timeout: float
) -> CompilerFailed:
    hint = "the compiler's whole log is in the error's .log (--debug)"
    if code is None:
        message = f"the Intel NPU compiler was stopped after {timeout:.0f} s on {name}"
        hint = "give it a machine with more memory or time"
    elif code == 5:
        message = f"the Intel NPU compiler refused {name}: {_why(log)}"
    elif code in _STAGES:
        message = f"the Intel NPU compiler failed on {name}: {_STAGES[code]}: {_why(log)}"
    else:
        last = ([line.strip() for line in (stderr or log).splitlines() if line.strip()] or ["it said nothing"])[-1]
        how = f"died of signal {-code}" if code < 0 else f"ended with exit code {code}"
        message = f"the Intel NPU compiler {how} on {name}: {last}"
        hint = "an SD 1.5 UNet takes 6 GB of memory; " + hint
    exit_code = -signal.SIGTERM if code is None else code
    return CompilerFailed(message, command=command, exit_code=exit_code, log=log, stderr=stderr, hint=hint)


def _why(log: str) -> str:
    """The reason the program gives, or the compiler's log where that only says that there is one."""
    _, _, rest = log.partition(f"{SAID}reason begins\n")
    why = reason(RuntimeError(rest.partition(f"\n{SAID}reason ends")[0]))
    errors = log_errors(log)
    telling = next((error for error in errors if "Pass failed" in error), errors[0] if errors else why)
    return telling[:300] if why in ("Compilation failed", "RuntimeError") else why
