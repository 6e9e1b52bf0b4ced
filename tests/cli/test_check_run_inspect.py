from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mtu_compile import bundle
from mtu_compile.runtime import cpu_isa

Run = Callable[..., Any]
#: Makes the import of everything a board does not have fail.
BARE = (
    "import sys\n"
    "for name in ('torch', 'onnx', 'nncf', 'polygraphy', 'diffusers', 'transformers', 'onnxruntime', 'skimage'):\n"
    "    sys.modules[name] = None"
)


@pytest.fixture
def copy(float_bundle: Path, tmp_path: Path) -> Path:
    shutil.copytree(float_bundle, tmp_path / "copy")
    return tmp_path / "copy"


def test_check_passes_and_reports_every_timestep(float_bundle: Path, mtu: Run) -> None:
    done = mtu("check", float_bundle, "--json")
    assert done.code == 0, done.err
    result = json.loads(done.out)
    assert result["passed"] is True
    for task in result["tasks"].values():
        assert len(task["steps"]) == 4 * task["pictures"]
        assert task["guidance_ratio"][0] > 0.99
        assert task["worst_sqnr_db"] == min(step["sqnr_db"] for step in task["steps"])
        assert len(task["picture_metrics"]) == task["pictures"]
        assert task["guidance"]["text"]["ratio"] == pytest.approx(1, abs=1e-3)
    t2i, inpaint = (result["tasks"][name] for name in ("t2i", "inpaint"))
    assert inpaint["region"]["kind"] == "mask" and inpaint["outside_psnr_db"] > 50
    assert t2i["outside_psnr_db"] is None and t2i["thresholds"]["outside_psnr_db"] is None
    # The samples have wanted pictures; pictures of 32 pixels are too small for VIF.
    assert abs(inpaint["truth_drop_db"]) < 0.05 and inpaint["thresholds"]["truth_drop_db"]
    assert t2i["thresholds"]["truth_drop_db"] is None and "too small" in t2i["reasons"]["vif"]


def test_the_table_of_a_check_fits_a_terminal(float_bundle: Path, tmp_path: Path, mtu: Run) -> None:
    done = mtu("check", float_bundle)
    assert done.code == 0 and max(map(len, done.out.splitlines())) <= 110
    refused = mtu("check", float_bundle, "--clip", tmp_path / "gone")
    assert refused.code == 2 and "not a folder" in refused.err
    # Two tasks, and each instruction set that was tried.
    assert done.out.count("pass") == 2 + len(cpu_isa.up_to(cpu_isa.level()))


def test_check_fails_on_an_engine_that_is_wrong(copy: Path, mtu: Run) -> None:
    """A seeded defect: the inpainting engine's weights shrunk by a fifth, hashes and all made to agree."""
    import openvino

    manifest = bundle.read(copy)
    xml = copy / manifest.tasks["inpaint"].engine.path
    model = openvino.Core().read_model(str(xml))
    for result in model.get_results():
        source = result.input(0).get_source_output()
        shrunk = openvino.opset13.multiply(source, openvino.opset13.constant(np.float32(0.8)))
        shrunk.output(0).set_names(source.get_names())
        source.set_names(set())
        result.input(0).replace_source_output(shrunk.output(0))
    openvino.save_model(model, str(xml.with_name("new.xml")), compress_to_fp16=False)
    del model
    for suffix in (".xml", ".bin"):
        xml.with_name("new.xml").with_suffix(suffix).replace(xml.with_suffix(suffix))
    bundle.write(copy, manifest)
    done = mtu("check", copy)
    assert done.code == 3, done.err
    error = next(line for line in done.err.splitlines() if line.startswith("error: "))
    assert error.startswith("error: inpaint: sqnr_db below 60 at 8 of 8 calls, worst ") and "t2i" not in error
    assert "FAIL" in done.out
    assert same_verdict(copy, mtu) == 3


def same_verdict(folder: Path, mtu: Run) -> int:
    """Host and board measure and say the same of one bundle, but for what a board has no library for."""
    host, board = (mtu(*command, folder, "--json") for command in (("check",), ("board", "check")))
    assert host.code == board.code, host.err + board.err
    first, second = (json.loads(done.out)["tasks"] for done in (host, board))
    assert first.keys() == second.keys()
    for name, task in first.items():
        assert task["failures"] == second[name]["failures"]
        assert_same({k: v for k, v in task.items() if k != "reasons"}, second[name], name)
    return int(host.code)


def assert_same(first: Any, second: Any, where: str) -> None:
    if isinstance(first, dict):
        assert first.keys() <= second.keys(), where
        for key, value in first.items():
            assert_same(value, second[key], f"{where}.{key}")
    elif isinstance(first, list):
        assert len(first) == len(second), where
        for i, value in enumerate(first):
            assert_same(value, second[i], f"{where}[{i}]")
    else:
        assert second == pytest.approx(first, rel=1e-6) if isinstance(first, float) else second == first, where


def test_host_and_board_say_the_same_of_a_bundle(tiny_bundle: Path, mtu: Run) -> None:
    assert same_verdict(tiny_bundle, mtu) in (0, 3)  # INT8 of random weights


@pytest.mark.parametrize("command", ["check", "inspect", "run"])
def test_a_changed_byte_is_refused_by_name(command: str, copy: Path, tmp_path: Path, mtu: Run) -> None:
    weights = copy / "unet" / "openvino_model.bin"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    more = ("--task", "t2i", "--prompt", "a", "-o", tmp_path / "a.png") if command == "run" else ()
    done = mtu(command, copy, *more)
    assert done.code == 5 and "unet/openvino_model.bin" in done.err and "hint:" in done.err
    assert not (tmp_path / "a.png").exists()


def test_run_makes_pictures_without_torch(tiny_bundle: Path, tiny_model: Path, tmp_path: Path, mtu: Run) -> None:
    def make(name: str, *arguments: object) -> bytes:
        out = tmp_path / name
        done = mtu("run", tiny_bundle, "-o", out, *arguments, before=BARE)
        assert done.code == 0, done.err
        assert Image.open(out).size == (32, 32)
        return out.read_bytes()

    t2i = ("--task", "t2i", "--prompt", "disc")
    assert make("a.png", *t2i, "--seed", 1) == make("b.png", *t2i, "--seed", 1)
    assert make("c.png", *t2i, "--seed", 2) != make("a.png", *t2i, "--seed", 1)
    assert make("d.png", *t2i, "--seed", 1, "--guidance", 5) != make("a.png", *t2i, "--seed", 1)
    source = tiny_model / "samples" / "inpaint" / "0.png"
    mask = Image.new("L", (32, 32))
    mask.paste(255, (0, 0, 16, 32))
    mask.save(tmp_path / "mask.png")
    inpaint = ("--task", "inpaint", "--prompt", "disc", "--image", source, "--mask", tmp_path / "mask.png")
    for sampler in ("ddim", "euler", "dpm++"):
        make(f"{sampler}.png", *inpaint, "--scheduler", sampler, "--steps", 3)
        made, original = (np.asarray(Image.open(p).convert("RGB")) for p in (tmp_path / f"{sampler}.png", source))
        assert (made[:, 16:] == original[:, 16:]).all() and (made[:, :16] != original[:, :16]).any()


def test_run_fits_pictures_and_says_what_may_not_be_meant(tiny_bundle: Path, tmp_path: Path, mtu: Run) -> None:
    wide, hole = Image.new("RGB", (64, 32), "red"), Image.new("RGBA", (64, 32), (0, 0, 0, 255))
    hole.paste((0, 0, 0, 0), (0, 0, 8, 32))  # at the left: transparent
    wide.save(tmp_path / "wide.png")
    hole.save(tmp_path / "hole.png")
    given = ("--task", "inpaint", "--image", tmp_path / "wide.png", "--mask", tmp_path / "hole.png", "--steps", 1)
    given += ("-o", tmp_path / "a.png", "--prompt")
    done = mtu("run", tiny_bundle, *given, "disc", "--fit", "pad", "--json", before=BARE)
    said = json.loads(done.out)
    assert (said["frame"]["place"], said["frame"]["used"], said["notices"]) == ([0, 8, 32, 24], [0, 0, 64, 32], [])
    made = np.asarray(Image.open(tmp_path / "a.png").convert("RGB"))
    assert made.shape == (32, 32, 3) and (made[8:24, 4:] == (255, 0, 0)).all()  # repainted is the left alone
    # the middle, as the bundle was built, has nothing of the hole
    done = mtu("run", tiny_bundle, *given, "disc that is too long for it", "--json", before=BARE)
    cut, empty = json.loads(done.out)["notices"]
    assert (cut["kind"], cut["tokens"], cut["limit"]) == ("prompt-cut", 22, 14)
    assert cut["dropped"].endswith("for it") and empty["kind"] == "mask-empty"
    done = mtu("run", tiny_bundle, *given, "disc", "--mask-mode", "white", before=BARE)
    assert done.code == 0 and "warning: the mask selects nothing" in done.err and "hint: white selects" in done.err


def test_a_build_says_which_rows_are_cut_and_keeps_it(tiny_bundle: Path, mtu: Run) -> None:
    manifest = bundle.read(tiny_bundle)
    for task in ("t2i", "inpaint"):
        (notice,) = manifest.tasks[task].provenance.notices
        assert (notice.use, notice.row) == ("check", f"{task}/metadata.jsonl line 6")
        assert (notice.kind, notice.dropped) == ("prompt-cut", "long")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--task", "paint"), 2, "t2i, inpaint"),
        (("--task", "t2i"), 2, "--prompt"),
        (("--task", "inpaint", "--prompt", "a"), 2, "--image"),
        (("--task", "inpaint", "--prompt", "a", "--image", "{text}", "--mask", "{text}"), 5, "not a picture"),
        (("--task", "inpaint", "--prompt", "a", "--image", "gone.png", "--mask", "{text}"), 5, "gone.png"),
        (("--task", "t2i", "--prompt", "a", "--steps", "0"), 2, "--steps"),
    ],
)
def test_run_refuses_what_it_cannot_do(
    arguments: tuple[str, ...], code: int, message: str, tiny_bundle: Path, tmp_path: Path, mtu: Run
) -> None:
    text = tmp_path / "text.png"
    text.write_text("no picture")
    done = mtu("run", tiny_bundle, "-o", tmp_path / "a.png", *(a.format(text=text) for a in arguments))
    assert done.code == code, done.err
    assert message in done.err and "Traceback" not in done.err
    assert not (tmp_path / "a.png").exists()


def test_run_says_at_once_that_the_output_has_no_format(tiny_bundle: Path, tmp_path: Path, mtu: Run) -> None:
    done = mtu("run", tiny_bundle, "--task", "t2i", "--prompt", "a", "-o", tmp_path / "picture")
    assert done.code == 2 and ".png" in done.err


def test_inspect_tells_tasks_and_accuracy(tiny_bundle: Path, mtu: Run) -> None:
    done = mtu("inspect", tiny_bundle, before=BARE)
    assert done.code == 0, done.err
    assert "inpaint" in done.out and "SSIM" in done.out and "every hash verified" in done.out
    assert json.loads(mtu("inspect", tiny_bundle, "--json").out)["schema_version"] == bundle.SCHEMA_VERSION


def test_targets_lists_cpu(mtu: Run) -> None:
    rows = json.loads(mtu("targets", "--json").out)
    cpu = next(row for row in rows if row["name"] == "cpu")
    assert cpu["available"] is True and "int8" in cpu["precisions"]


@pytest.mark.parametrize(
    "command", [(), ("build",), ("check",), ("run",), ("inspect",), ("targets",), ("upcycle",), ("train",)]
)
def test_help_loads_nothing_heavy(command: tuple[str, ...], mtu: Run) -> None:
    report = "import atexit, sys\natexit.register(lambda: print(*sys.modules, file=sys.stderr))"
    done = mtu(*command, "--help", before=report)
    assert done.code == 0 and "Usage" in done.out
    loaded = set(done.err.split())
    assert loaded.isdisjoint({"torch", "onnx", "openvino", "nncf", "diffusers", "transformers", "numpy", "PIL"})
