"""The runtime has to start on a board where no compiler, and not even the vendor's runtime, is installed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

FORBIDDEN = ["torch", "onnx", "onnxruntime", "nncf", "polygraphy", "diffusers", "transformers", "click", "rich"]

HOOK = """
import json, sys

FORBIDDEN = {forbidden!r}

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in FORBIDDEN:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Refuse())
"""


def run(code: str, forbidden: list[str], *arguments: str) -> Any:
    script = HOOK.format(forbidden=forbidden) + code
    command = [sys.executable, "-c", script, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


IMPORT = """
import mtu_compile.bundle, mtu_compile.runtime
from mtu_compile.runtime import engine, guidance, images, pipeline, request, schedulers, text
print(json.dumps(sorted({name.split(".")[0] for name in sys.modules})))
"""


def test_importing_needs_no_compiler_and_no_engine() -> None:
    loaded = run(IMPORT, [*FORBIDDEN, "openvino"])
    assert not set(loaded) & {*FORBIDDEN, "openvino"}
    assert "openvino" not in run(IMPORT, FORBIDDEN)  # nor is it imported early where it is installed


def test_the_hook_does_refuse() -> None:
    code = """
try:
    import torch
    print("1")
except ModuleNotFoundError:
    print("0")
"""
    assert run(code, FORBIDDEN) == 0
    assert run(code, ["nothing"]) == 1


VENDORS = """
from mtu_compile.core import vendors
for place in (*vendors.engines().values(), *vendors.builders().values()):
    vendors.load(place)
import mtu_compile.board
print(json.dumps([len(vendors.engines()), sorted({name.split(".")[0] for name in sys.modules})]))
"""


def test_every_vendors_engines_and_builders_import_without_a_compiler_and_without_their_runtimes() -> None:
    runtimes = ["openvino", "tensorrt", "tensorrt_rtx", "cuda"]
    count, loaded = run(VENDORS, [*FORBIDDEN, *runtimes])
    assert count >= 5
    assert not set(loaded) & {*FORBIDDEN, *runtimes}


RUN = """
import mtu_compile.runtime
from PIL import Image
loaded = mtu_compile.runtime.load(sys.argv[1])
loaded.run("t2i", "a", steps=1)
loaded.run("inpaint", "a", image=Image.new("RGB", (9, 9)), mask=Image.new("L", (9, 9), 255), steps=1)
print(json.dumps(sorted({name.split(".")[0] for name in sys.modules})))
"""


def test_running_needs_no_compiler(tiny_bundle: tuple[Path, Any]) -> None:
    loaded = run(RUN, FORBIDDEN, str(tiny_bundle[0]))
    assert "openvino" in loaded
    assert not set(loaded) & set(FORBIDDEN)


MISSING = """
import mtu_compile.runtime
from mtu_compile.core.errors import ToolchainMissing
loaded = mtu_compile.runtime.load(sys.argv[1])
try:
    loaded.run("t2i", "a", steps=1)
except ToolchainMissing as error:
    print(json.dumps(error.hint))
"""


def test_without_the_vendors_runtime_the_command_is_named(tiny_bundle: tuple[Path, Any]) -> None:
    assert run(MISSING, [*FORBIDDEN, "openvino"], str(tiny_bundle[0])) == "pip install 'mtu-compile[openvino]'"
