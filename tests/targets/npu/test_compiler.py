"""The NPU compiler: found, run, refused, stopped. Real where ``make npu-compiler`` was run, else with stand-ins."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import numpy as np
import openvino
import pytest
from openvino import opset13 as ops

import targets.npu.compiler as compiler
import targets.npu.provider as provider_module
import targets.npu.set_up as set_up
import targets.npu.wine as wine
from mtu_compile.core.errors import EXIT_TOOLCHAIN, BuildError, ConfigError, ModelError, MtuError, ToolchainMissing
from targets.npu.__main__ import main
from targets.npu.compiler import CompilerFailed, compile_blob, find_compiler
from targets.npu.provider import Provider, cache_folder, openvino_release
from targets.npu.worker import worker
from tests.waiting import alive, until


@pytest.fixture(scope="module")
def provider() -> Provider:
    try:
        return find_compiler()
    except ToolchainMissing as error:
        pytest.skip(f"{error.message}; run: {error.hint}")


def save_ir(folder: Path, *, batch: int = 1) -> Path:
    """relu(conv(x)), x f32 [batch, 16, 8, 8]."""
    x = ops.parameter(openvino.PartialShape([batch, 16, 8, 8]), np.float32, name="x")
    weights = ops.constant(np.full((16, 16, 1, 1), 0.1, np.float32))
    y = ops.relu(ops.convolution(x, weights, [1, 1], [0, 0], [0, 0], [1, 1]))
    folder.mkdir(parents=True)
    openvino.save_model(openvino.Model([y], [x], "net"), folder / "model.xml")
    return folder / "model.xml"


def pretend(script: str, **about: object) -> Provider:
    """A provider that runs a few lines of Python with ``work`` as the folder it is in."""
    command = (sys.executable, "-c", "import os, sys, time, pathlib\nwork = pathlib.Path('.')\n" + script)
    return Provider("pretend", "2026.4.1", "a stand-in", command, {}, traces=bool(about.get("traces", False)))


WRITES = """print('Estimated inference latency: 1500.0 us in dpu frequency 1850.00 MHz')
(work / 'out.blob').write_text('blob')
"""


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


class TestReal:
    """With the compiler itself, under Wine on Linux."""

    def test_a_blob_is_compiled(self, provider: Provider, tmp_path: Path) -> None:
        folder = tmp_path / "Bücher und 絵"
        xml = save_ir(folder / "net")
        done = compile_blob(xml, folder / "net.blob", platform="4000", provider=provider)
        assert names(folder) == ["net", "net.blob"] and names(folder / "net") == ["model.bin", "model.xml"]
        assert done.path.read_bytes()[1:4] == b"ELF"
        assert done.sha256 == hashlib.sha256(done.path.read_bytes()).hexdigest()
        assert done.estimate_ms is not None and 0 < done.estimate_ms < 1
        assert "platform 4000" in done.source and "not measured" in done.source
        assert done.report.compatibility is not None and "npu=4000" in done.report.compatibility
        assert {"Convolution"} <= {layer.type for layer in done.report.layers}
        assert done.report.busy is not None and done.report.busy.dpu_ms > 0

    def test_a_refusal_names_the_reason_and_leaves_nothing(self, provider: Provider, tmp_path: Path) -> None:
        xml = save_ir(tmp_path / "net", batch=-1)
        with pytest.raises(CompilerFailed, match=r"refused net: .*bound") as caught:
            compile_blob(xml, tmp_path / "net.blob", platform="4000", provider=provider)
        assert caught.value.exit_code == 5 and "NPU_PLATFORM=4000" in caught.value.command
        assert "importNetwork" in caught.value.log
        assert names(tmp_path) == ["net"]

    def test_a_platform_that_does_not_exist_is_refused(self, provider: Provider, tmp_path: Path) -> None:
        with pytest.raises(CompilerFailed, match="refused net"):
            compile_blob(save_ir(tmp_path / "net"), tmp_path / "net.blob", platform="1234", provider=provider)

    def test_an_ir_that_is_damaged_is_said(self, provider: Provider, tmp_path: Path) -> None:
        xml = save_ir(tmp_path / "net")
        xml.write_text("<net")
        with pytest.raises(CompilerFailed, match="the model cannot be read") as caught:
            compile_blob(xml, tmp_path / "net.blob", platform="4000", provider=provider)
        assert caught.value.exit_code == 4


class TestRunning:
    def test_properties_and_options_reach_the_compiler(self, tmp_path: Path) -> None:
        script = WRITES + "(work / 'out.blob').write_text('\\n'.join(sys.argv[1:]))"
        done = compile_blob(
            save_ir(tmp_path / "net"),
            tmp_path / "net.blob",
            platform="3720",
            config={"NPU_TURBO": "YES"},
            mode={"optimization-level": "2"},
            provider=pretend(script, traces=True),
        )
        assert done.estimate_ms == 1.5
        assert done.path.read_text().splitlines() == [
            "model.xml",
            "out.blob",
            "NPU_COMPILER_TYPE=PLUGIN",
            "NPU_PLATFORM=3720",
            "LOG_LEVEL=LOG_INFO",
            "NPU_TURBO=YES",
            "NPU_COMPILATION_MODE_PARAMS=optimization-level=2 enable-schedule-trace=true",
        ]

    def test_an_existing_blob_stays_until_the_new_one_is_whole(self, tmp_path: Path) -> None:
        xml, out = save_ir(tmp_path / "net"), tmp_path / "net.blob"
        out.write_text("old")
        with pytest.raises(CompilerFailed):
            compile_blob(xml, out, platform="4000", provider=pretend(WRITES + "sys.exit(5)"))
        assert out.read_text() == "old" and names(tmp_path) == ["net", "net.blob"]
        compile_blob(xml, out, platform="4000", provider=pretend(WRITES))
        assert out.read_text() == "blob"

    @pytest.mark.parametrize(
        ("script", "message", "code"),
        [
            ("os.kill(os.getpid(), 9)", "died of signal 9 on net: it said nothing", -9),
            (
                "print('x'); sys.stderr.write('wine: out of memory\\n'); sys.exit(77)",
                "exit code 77 on net: wine: out of",
                77,
            ),
            ("pass", "ended with exit code 0 on net", 0),
        ],
    )
    def test_a_compiler_that_dies_is_quoted(self, tmp_path: Path, script: str, message: str, code: int) -> None:
        with pytest.raises(CompilerFailed, match=message) as caught:
            compile_blob(save_ir(tmp_path / "net"), tmp_path / "b", platform="4000", provider=pretend(script))
        assert caught.value.exit_code == code
        assert names(tmp_path) == ["net"]

    def test_where_the_compiler_gives_no_reason_its_log_does(self, tmp_path: Path) -> None:
        script = """print('[ERROR] 17:52:30.248 [vpux-compiler] %7332 = VPUIP.NNDMA')
print('[ERROR] 17:52:30.249 [vpux-compiler] FeasibleAllocation Pass failed : Scheduler failure')
print('npu_compile: reason begins\\nException from x.cpp:1:\\nCompilation failed\\nnpu_compile: reason ends')
sys.exit(5)"""
        with pytest.raises(CompilerFailed, match=r"refused net: .*FeasibleAllocation Pass failed : Scheduler failure"):
            compile_blob(save_ir(tmp_path / "net"), tmp_path / "b", platform="4000", provider=pretend(script))

    def test_one_that_hangs_is_stopped_with_its_children(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """As if its time were up once it has started a child, whenever that is on this machine."""
        real = subprocess.Popen.wait

        def expired(self: subprocess.Popen[bytes], timeout: float | None = None) -> int:
            if timeout is None:
                return real(self)
            while not started.exists() or not started.read_text():
                time.sleep(0.01)
            raise subprocess.TimeoutExpired(self.args, timeout)

        monkeypatch.setattr(subprocess.Popen, "wait", expired)
        started = tmp_path / "pid"
        child = f"pathlib.Path({str(started)!r}).write_text(str(subprocess.Popen(['sleep', '600']).pid))"
        script = f"import subprocess\n{child}\ntime.sleep(600)"
        with pytest.raises(CompilerFailed, match="stopped after 3 s"):
            compile_blob(
                save_ir(tmp_path / "net"), tmp_path / "b", platform="4000", provider=pretend(script), timeout=3
            )
        until(lambda: not alive(started.read_text()))
        assert names(tmp_path) == ["net", "pid"]

    def test_ctrl_c_leaves_neither_processes_nor_files(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        started = tmp_path / "pid"
        script = f"pathlib.Path({str(started)!r}).write_text(str(os.getpid()))\ntime.sleep(600)"
        real = subprocess.Popen.wait

        def interrupted(self: subprocess.Popen[bytes], timeout: float | None = None) -> int:
            if timeout is None:
                return real(self)
            while not started.exists() or not started.read_text():
                time.sleep(0.01)
            raise KeyboardInterrupt

        monkeypatch.setattr(subprocess.Popen, "wait", interrupted)
        with pytest.raises(KeyboardInterrupt):
            compile_blob(save_ir(tmp_path / "net"), tmp_path / "b", platform="4000", provider=pretend(script))
        until(lambda: not alive(started.read_text()))
        assert names(tmp_path) == ["net", "pid"]

    def test_an_ir_without_weights_is_refused(self, tmp_path: Path) -> None:
        xml = save_ir(tmp_path / "net")
        xml.with_suffix(".bin").unlink()
        with pytest.raises(ModelError, match=r"model\.bin does not exist"):
            compile_blob(xml, tmp_path / "b", platform="4000", provider=pretend(WRITES))

    def test_a_place_that_is_not_there_is_an_error(self, tmp_path: Path) -> None:
        with pytest.raises(MtuError, match="cannot write"):
            compile_blob(save_ir(tmp_path / "net"), tmp_path / "no" / "b", platform="4000", provider=pretend(WRITES))


class TestFinding:
    @pytest.fixture(autouse=True)
    def bare(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setattr(provider_module, "plugin_folder", lambda: tmp_path / "libs")
        (tmp_path / "libs").mkdir()

    def test_without_any_the_command_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(ToolchainMissing, match="no Intel NPU compiler") as caught:
            find_compiler(tmp_path / "cache")
        assert caught.value.exit_code == EXIT_TOOLCHAIN and "make npu-compiler" in str(caught.value.hint)

    def test_the_plugins_own_comes_first(self, tmp_path: Path) -> None:
        name = "openvino_intel_npu_compiler.dll" if sys.platform == "win32" else "libopenvino_intel_npu_compiler.so"
        (tmp_path / "libs" / name).write_bytes(b"")
        found = find_compiler(tmp_path / "cache")
        assert found.name == "native" and name in found.how

    def test_one_set_up_with_another_program_is_not_used(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(wine, "find_wine", lambda: Path("/usr/bin/wine64"))
        folder = tmp_path / "cache" / openvino_release()
        (folder / "bin").mkdir(parents=True)
        for name in (*wine.LIBRARIES, "npu_compile.exe"):
            (folder / "bin" / name).write_bytes(b"")
        digest = hashlib.sha256(Path(wine.__file__).with_name("npu_compile.c").read_bytes()).hexdigest()
        (folder / "ready.json").write_text(f'{{"program": "{digest}"}}')
        found = find_compiler(tmp_path / "cache")
        assert found.name == "wine" and found.environment["WINEPREFIX"] == str(folder / "prefix")
        (folder / "ready.json").write_text('{"program": "of another version"}')
        with pytest.raises(ToolchainMissing):
            find_compiler(tmp_path / "cache")

    def test_the_cache_is_where_xdg_says(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        assert cache_folder() == tmp_path / "mtu-compile" / "npu"
        monkeypatch.setenv("XDG_CACHE_HOME", "relative/paths/are/to/be/ignored")
        assert cache_folder() == Path.home() / ".cache" / "mtu-compile" / "npu"


class TestWorker:
    """The program's twin in Python, for machines whose own OpenVINO has the compiler."""

    def test_it_writes_what_the_program_writes(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        xml, out = save_ir(tmp_path / "net"), tmp_path / "out.blob"
        assert worker([str(xml), str(out), "NUM_STREAMS=1"], device="CPU") == 0
        assert out.stat().st_size > 0
        assert [line.split()[1] for line in capsys.readouterr().out.splitlines()] == [
            "openvino",
            "compiled",
            "exported",
        ]

    def test_it_ends_as_the_program_ends(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        xml, out = str(save_ir(tmp_path / "net")), str(tmp_path / "out.blob")
        assert worker([str(tmp_path / "none.xml"), out], device="CPU") == 4
        assert worker([xml, out, "NO_SUCH_OPTION=1"], device="CPU") == 5
        assert "NO_SUCH_OPTION" in capsys.readouterr().out
        assert worker([xml, str(tmp_path / "no" / "out.blob")], device="CPU") == 6

    @pytest.mark.skipif(sys.platform != "linux", reason="elsewhere OpenVINO's wheel has the compiler")
    def test_a_plugin_without_its_compiler_is_quoted(self, tmp_path: Path) -> None:
        command = (sys.executable, "-m", "targets.npu.worker")
        here = {"PYTHONPATH": str(Path(compiler.__file__).parents[2])}
        native = Provider("native", "2026.4.1", "", command, here, traces=True)
        if provider_module.native("2026.4.1") is not None:
            pytest.skip("this OpenVINO has its compiler")
        with pytest.raises(CompilerFailed, match=r"refused net: .*(?i:compiler)") as caught:
            compile_blob(save_ir(tmp_path / "net"), tmp_path / "net.blob", platform="4000", provider=native)
        assert caught.value.exit_code == 5


class TestSettingUp:
    @pytest.fixture(autouse=True)
    def elsewhere(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setattr(set_up, "native", lambda release: None)
        monkeypatch.setattr(sys, "platform", "linux")
        monkeypatch.setattr(set_up, "find_wine", lambda: Path("/usr/bin/wine64"))
        monkeypatch.setattr(set_up.shutil, "which", lambda name: f"/usr/bin/{name}")
        monkeypatch.setattr(set_up, "openvino_release", lambda: "2026.4.1")

    def test_a_wheel_that_is_not_intels_is_never_unpacked(self, tmp_path: Path) -> None:
        wheel = tmp_path / "openvino.whl"
        wheel.write_bytes(b"something else")
        with pytest.raises(BuildError, match=r"has SHA-256 .* it is not run"):
            set_up.set_up(cache=tmp_path / "cache", wheel=wheel)
        assert names(tmp_path / "cache" / "2026.4.1") == [".lock"]

    def test_a_version_that_is_not_known_is_refused(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(set_up, "openvino_release", lambda: "2031.1.0")
        with pytest.raises(ConfigError, match=r"2031\.1\.0 is not known") as caught:
            set_up.set_up(cache=tmp_path / "cache")
        assert "--sha256" in str(caught.value.hint) and not (tmp_path / "cache").exists()

    def test_a_download_that_came_out_wrong_is_not_kept_and_not_run(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def run(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
            assert command[1:4] == ["-m", "pip", "download"] and command[-1] == "openvino==2026.4.1"
            place = Path(command[command.index("--dest") + 1])
            place.mkdir(parents=True, exist_ok=True)
            (place / "openvino-2026.4.1-1-cp311-cp311-win_amd64.whl").write_bytes(b"of a mirror")
            return subprocess.CompletedProcess(command, 0, "", "")

        monkeypatch.setattr(set_up.subprocess, "run", run)
        for _ in range(2):  # the second finds what the first left, and asks again
            with pytest.raises(BuildError, match="it is not run"):
                set_up.set_up(cache=tmp_path / "cache")
        assert not (tmp_path / "cache" / "2026.4.1" / "bin").exists()

    def test_pip_is_quoted_when_it_fails(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        failed = subprocess.CompletedProcess([], 1, "", "WARNING: retrying\nERROR: no matching distribution\n")
        monkeypatch.setattr(set_up.subprocess, "run", lambda *args, **options: failed)
        with pytest.raises(BuildError, match="no matching distribution"):
            set_up.set_up(cache=tmp_path / "cache")

    def test_a_wheel_without_the_compiler_is_named(self, tmp_path: Path) -> None:
        wheel = tmp_path / "openvino.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr("openvino/libs/openvino.dll", b"x")
        digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
        with pytest.raises(BuildError, match="not a wheel with an NPU compiler"):
            set_up.set_up(cache=tmp_path / "cache", wheel=wheel, sha256=digest)
        assert not (tmp_path / "cache" / "2026.4.1" / "ready.json").exists()

    def test_missing_packages_are_named_or_installed(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(set_up, "find_wine", lambda: None)
        monkeypatch.setattr(os, "geteuid", lambda: 1000)
        with pytest.raises(ToolchainMissing, match="wine64 is not installed") as caught:
            set_up.set_up(cache=tmp_path / "cache")
        assert caught.value.hint == "sudo apt-get install -y --no-install-recommends wine64 gcc-mingw-w64-x86-64"
        monkeypatch.setattr(os, "geteuid", lambda: 0)
        asked: list[list[str]] = []

        def run(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
            asked.append(command)
            return subprocess.CompletedProcess(command, 100, "", "E: Unable to locate package wine64\n")

        monkeypatch.setattr(set_up.subprocess, "run", run)
        with pytest.raises(ToolchainMissing, match="Unable to locate package"):
            set_up.set_up(cache=tmp_path / "cache")
        assert asked and asked[0][:2] == ["apt-get", "install"]

    def test_two_at_once_do_it_once(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        done: list[str] = []

        def unpack(wheel: Path, folder: Path) -> None:
            time.sleep(0.2)
            (folder / "bin").mkdir()
            for name in (*wine.LIBRARIES, "npu_compile.exe"):
                (folder / "bin" / name).write_bytes(b"")
            done.append("unpacked")

        monkeypatch.setattr(set_up, "_verified", lambda wheel, expected: wheel)
        monkeypatch.setattr(set_up, "_unpack", unpack)
        monkeypatch.setattr(set_up, "_build_program", lambda gcc, wheel, folder: None)
        monkeypatch.setattr(set_up, "try_out", lambda provider: pretend_blob(tmp_path))
        threads = [
            threading.Thread(target=set_up.set_up, kwargs={"cache": tmp_path / "cache", "wheel": tmp_path})
            for _ in range(2)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert done == ["unpacked"]

    def test_the_command_says_what_is_wrong(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(set_up, "find_wine", lambda: None)
        monkeypatch.setattr(os, "geteuid", lambda: 1000)
        assert main([]) == EXIT_TOOLCHAIN
        assert capsys.readouterr().err.splitlines() == [
            "error: wine64 is not installed",
            "hint: sudo apt-get install -y --no-install-recommends wine64 gcc-mingw-w64-x86-64",
        ]


def pretend_blob(folder: Path) -> compiler.Blob:
    return compiler.Blob(folder / "b", 0.0, "", None, compiler.Report(), "")
