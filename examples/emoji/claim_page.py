"""The tables of docs/paper.md, from ``claim.json``.

python -m examples.emoji.claim_page
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from bench.held_out import into_docs, markdown
from examples.emoji.claim import MULTI, RESULT, SINGLE

PAGE = Path("docs/paper.md")


@dataclass(frozen=True)
class Measure:
    """A figure of ``claim.json`` and how it is shown."""

    task: str
    key: str
    title: str
    digits: int
    higher: bool  # is better


#: What each task is judged by: the first of its rows.
MAIN = (
    Measure("t2i", "frechet", "text-to-image: Fréchet distance ↓", 2, False),
    Measure("edit", "psnr_db", "editing: PSNR ↑", 2, True),
    Measure("sr", "psnr_db", "super-resolution: PSNR ↑", 2, True),
    Measure("inpaint", "psnr_db", "inpainting: PSNR in the hole ↑", 2, True),
)
ERRORS = tuple(Measure(one.task, "error", one.title.partition(":")[0], 4, False) for one in MAIN)
MORE = (
    Measure("edit", "ssim", "editing: SSIM ↑", 4, True),
    Measure("sr", "ssim", "super-resolution: SSIM ↑", 4, True),
    Measure("inpaint", "psnr_db unguided", "inpainting without guidance: PSNR ↑", 2, True),
)


def by_seed(record: Mapping[str, Any], variant: str, one: Measure) -> list[float]:
    """One value a seed, in the order of the seeds."""
    found = {
        n["seed"]: n["tasks"][one.task]
        for n in record["networks"]
        if n["variant"] == variant and one.task in n["tasks"]
    }
    return [found[seed][one.key] for seed in sorted(found)]


def shown(values: Sequence[float], digits: int) -> str:
    """Mean ± standard deviation of the seeds."""
    return f"{fmean(values):.{digits}f} ± {stdev(values):.{digits}f}"


def quality(record: Mapping[str, Any], measures: Sequence[Measure]) -> str:
    """A row for every variant, and what there is without training."""
    rows = []
    for name, tasks in record["baselines"].items():
        cells = [tasks.get(one.task, {}).get(one.key) for one in measures]
        if any(cell is not None for cell in cells):
            rows.append(
                [name, *("" if c is None else f"{c:.{m.digits}f}" for c, m in zip(cells, measures, strict=True))]
            )
    order = [SINGLE, MULTI]
    order += [v for v in dict.fromkeys(n["variant"] for n in record["networks"]) if v not in order]
    for variant in order:
        name = f"**{variant}**" if variant in (SINGLE, MULTI) else variant
        rows.append([name, *(shown(by_seed(record, variant, one), one.digits) for one in measures)])
    return markdown(["", *(one.title for one in measures)], rows)


def verdict(record: Mapping[str, Any]) -> str:
    """Multi-task against single-task, seed by seed; a difference counts when it exceeds the seeds' own spread."""
    rows, kept = [], 0
    for one in MAIN:
        multi, single = (by_seed(record, variant, one) for variant in (MULTI, SINGLE))
        gains = [(m - s) * (1 if one.higher else -1) for m, s in zip(multi, single, strict=True)]
        at_least = fmean(gains) >= -stdev(gains)
        kept += at_least
        word = "at least equal" if at_least else "behind"
        rows.append([one.title, shown(single, one.digits), shown(multi, one.digits), shown(gains, one.digits), word])
    table = markdown(["", "single-task", "multi-task", "gain, positive is better", "multi-task is"], rows)
    return f"{table}\nThe multi-task network is at least equal on **{kept} of {len(MAIN)}** tasks.\n"


def cost(record: Mapping[str, Any]) -> str:
    """What four tasks take as four networks and as one."""
    networks = record["cost"]["networks"]
    single, plain = networks["single task"], networks["pretrained"]

    def row(name: str, total: float, one: Mapping[str, float]) -> list[str]:
        trained = f"{one['trained'] / 1e6:.2f}M" if one["trained"] else "–"
        return [name, f"{total / 1e6:.2f}M", trained, f"{one['flops'] / 1e9:.3f}", f"{one['milliseconds']:.2f}"]

    shared = single["parameters"] + 3 * single["trained"]
    rows = [
        row("pretrained UNet, one task", plain["parameters"], plain),
        row("**four single-task networks**", 4 * single["parameters"], single),
        row("… that share the frozen layers", shared, single),
    ]
    for count in (1, 2, 4, 8):
        name = f"multi-task, {count} expert{'s' * (count > 1)}"
        one = networks[f"{count} experts"]
        rows.append(row(f"**{name}**" if count == 4 else name, one["parameters"], one))
    batch = record["cost"]["batch"]
    return markdown(
        ["", "parameters for four tasks", "trained, each", "GFLOPs a sample", f"ms a call of {batch}, routed"], rows
    )


def setting(record: Mapping[str, Any]) -> str:
    one = record["setting"]
    return (
        f"One {one['device']}, {len(record['networks'])} networks in lock-step, {one['seconds']:.0f} s of training: "
        f"{one['steps']} steps of {one['batch_per_task']} examples of each task, AdamW at {one['learning_rate']:g}, "
        f"cosine, moving average, bf16 autocast; {one['training_pictures']} training pictures. Rows: "
        + ", ".join(f"{task} {count}" for task, count in one["rows"].items())
        + f". Mean ± standard deviation over {one['seeds']} seeds.\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--result", type=Path, default=RESULT)
    parser.add_argument("--page", type=Path, default=PAGE)
    args = parser.parse_args()
    record = json.loads(args.result.read_text())
    parts = {
        "setting": setting(record),
        "verdict": verdict(record),
        "quality": quality(record, MAIN),
        "more": quality(record, MORE),
        "errors": quality(record, ERRORS),
        "cost": cost(record),
    }
    for marker, text in parts.items():
        into_docs(args.page, f"claim-{marker}", text)


if __name__ == "__main__":
    main()
