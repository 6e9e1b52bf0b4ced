"""``npu_compile.c`` in Python, for a machine whose own OpenVINO has the NPU compiler: a process of its own.

``python -m targets.npu.worker MODEL.xml OUT.blob KEY=VALUE…``
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

#: What begins every line this program and its twin in C say.
SAID = "npu_compile: "


def worker(arguments: Sequence[str], *, device: str = "NPU") -> int:
    """Compile, and return the exit code (see ``npu_compile.c``)."""
    import openvino

    xml, out, *rest = arguments
    properties = dict(one.split("=", 1) for one in rest)

    def say(text: str) -> None:
        print(f"{SAID}{text}", flush=True)

    code, stage = 3, "start"
    try:
        say(f"openvino {openvino.__version__}")
        core = openvino.Core()
        code, stage = 4, "read"
        model = core.read_model(xml)
        code, stage = 5, "compile"
        compiled = core.compile_model(model, device, properties)
        say("compiled")
        code, stage = 6, "export"
        Path(out).write_bytes(compiled.export_model().getbuffer())
    except (RuntimeError, OSError) as error:
        say(f"failed {stage}")
        say(f"reason begins\n{error}")
        say("reason ends")
        return code
    say("exported")
    return 0


if __name__ == "__main__":
    sys.exit(worker(sys.argv[1:]))
