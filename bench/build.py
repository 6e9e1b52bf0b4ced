"""Time and peak memory of ``mtu-compile build`` as a user runs it, stage by stage.

    python -m bench.build example     the emoji example, all tasks, INT8
    python -m bench.build sd15        Stable Diffusion 1.5's size, all tasks in one engine, INT8, 256×256 pictures
    python -m bench.build sdxl        the same of SDXL
    python -m bench.build sd15 --no-mixed-precision --task t2i -- --target rtx-ada
    python -m bench.build sd15 -- --target cpu --target rtx-ada --target intel-npu

Options that are not this command's own go to ``mtu-compile build``. The large models have random weights
(``bench.make_pipeline``), and are calibrated and recorded with one picture of four steps a task: their accuracy means
nothing, and is not judged. With ``--cache DIR`` results of steps are kept there, else nothing is.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

from bench import timing
from bench.watch import Watched, watch

WORK = Path("build/bench")

#: What a family of random weights is built with, before the options that are given.
LARGE = (
    *("--routing", "shared", "--size", "256x256", "--steps", "4"),
    *("--check-pictures", "1", "--calibration-pictures", "1", "--accuracy-gate", "off"),
)
FORMS = {"sd15": [], "sd21": [], "sdxl": ["--variant", "fp16", "--sharded"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("which", choices=["example", *FORMS])
    parser.add_argument("--model", type=Path, help="a folder instead of the one that is made")
    parser.add_argument("--name", help="of the file of results")
    parser.add_argument("--work", type=Path, default=WORK)
    args, options = parser.parse_known_args()
    options = [one for one in options if one != "--"]
    model = args.model or (Path("examples/emoji/model") if args.which == "example" else args.work / args.which)
    if args.which in FORMS:
        options = [*LARGE, *options]
        if not model.exists():
            # A process of its own: what it needs is not the build's.
            make = [sys.executable, "-m", "bench.make_pipeline", args.which, str(model), *FORMS[args.which]]
            subprocess.run(make, check=True)
    out = args.work / f"bundle-{args.which}"
    load = os.getloadavg()[0]
    seen = watch(
        [
            *(sys.executable, "-m", "mtu_compile", "build", str(model)),
            *("--int8", "--force", *([] if "--cache" in options else ["--no-cache"]), "-o", str(out), *options),
        ],
        echo=True,
        check=False,
    )
    size = sum(p.stat().st_size for p in out.rglob("*") if p.is_file())
    print(as_table(seen))
    timing.write(
        args.name or f"build-{args.which}",
        {
            "options": options,
            "exit code": seen.code,
            "load before, after": [round(load, 2), round(os.getloadavg()[0], 2)],
            **seen.whole.figures(),
            "bundle bytes": size,
            "stages": {title: taken.figures() for title, taken in seen.stages.items()},
        },
    )
    sys.exit(seen.code)


def as_table(seen: Watched) -> str:
    """Stages in the order they ended: seconds as they say and by the clock, of the CPU, and gigabytes (``Memory``)."""
    lines = [f"{'stage':40} {'said':>7} {'s':>7} {'CPU s':>7} {'own':>6} {'mapped':>6} {'all':>6} {'sum':>6}   GB"]
    for title, taken in [*seen.stages.items(), ("everything", seen.whole)]:
        numbers = " ".join(f"{value:6.2f}" for value in taken.memory.gigabytes().values())
        lines.append(f"{title:40} {taken.said:7.1f} {taken.seconds:7.1f} {taken.cpu:7.1f} {numbers}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
