"""mtu-compile side by side with its peers.

    python -m bench.peers sd15       Stable Diffusion 1.5's size, random weights, 256×256 (24 GB of memory, 25 of disk)
    python -m bench.peers example    the emoji example, 64×64, and how near INT8 is to float

Files are made once and kept under --work; figures go to build/bench/peers-WHICH.json, of which `python -m
bench.peers.page` makes docs/benchmarks.md's table and picture. A contender that fails is listed with its error.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from bench import timing
from bench.peers import models, quality, race
from bench.peers.contenders import contenders


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("which", choices=["example", "sd15"])
    parser.add_argument("--work", type=Path, default=Path("build/bench/peers"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--only", action="append", help="part of a contender's name; the first one takes part in a race"
    )
    parser.add_argument("--stage", choices=["prepare", "memory", "race", "quality"], action="append")
    args = parser.parse_args()
    stages = args.stage or ["prepare", "memory", "race", "quality"]
    root, size = args.work / args.which, models.SIZES[args.which]
    log = root / "contenders.log"
    chosen = [
        one
        for index, one in enumerate(contenders(args.which))
        if not args.only or any(part in one.name for part in args.only) or (index == 0 and "race" in stages)
    ]
    made = models.make(args.which, args.work)
    kept = timing.RESULTS / f"peers-{args.which}.json"
    rows = timing.read(kept).get("contenders", {})

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def keep(name: str, found: dict[str, object]) -> None:
        rows.setdefault(name, {}).update(found)
        timing.write(
            kept.stem, {"size": size, "steps": race.STEPS, "rounds": args.rounds, "contenders": rows}, quiet=True
        )

    if "prepare" in stages:
        for one in chosen:
            say(f"prepare {one.name}")
            keep(one.name, race.prepare(one, made, root, size, log))
    able = [one for one in chosen if not rows.get(one.name, {}).get("error")]
    if "memory" in stages:
        for one in able:
            say(f"memory {one.name}")
            keep(one.name, race.memory_of_tasks(one, root, size, log))
    if "race" in stages:
        for name, found in race.race(able, root, size, args.rounds, log, say).items():
            keep(name, found)
    if "quality" in stages and args.which == "example":
        for name, found in quality.against_float(able, root, size, log).items():
            keep(name, found)


if __name__ == "__main__":
    main()
