"""Write the table and the picture of docs/benchmarks.md from what was measured: ``python -m bench.peers.page``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench import timing
from bench.peers.contenders import CONTENDERS
from bench.peers.race import TASKS
from mtu_compile.core.atomic import atomic_file

PAGE, PICTURE = Path("docs/benchmarks.md"), Path("docs/peers.svg")
BEGIN, END = "<!-- peers: written by bench.peers.page -->", "<!-- /peers -->"
WHICH = {"sd15": "Stable Diffusion 1.5's size, 256×256, 10 steps", "example": "The example, 64×64, 10 steps"}

_COLUMNS = (
    ("step", "step_seconds", 1000, "{:.0f} ms"),
    ("our step to it", "step_ratio", 1, "{:.2f}"),
    ("image", "image_seconds", 1, "{:.2f} s"),
    ("our image to it", "image_ratio", 1, "{:.2f}"),
    ("load", "load_seconds", 1, "{:.1f} s"),
    ("open a task's UNet", "open_unet_seconds", 1, "{:.1f} s"),
    ("resident, whole", "resident_bytes", 1e-9, "{:.2f} GB"),
    ("one UNet", "unets_one_bytes", 1e-9, "{:.2f} GB"),
    (f"{TASKS} tasks' UNets", "unets_four_bytes", 1e-9, "{:.2f} GB"),
    ("files", "disk_bytes", 1e-9, "{:.2f} GB"),
    ("CPU time to make", "prepare_cpu_seconds", 1, "{:.0f} s"),
    ("peak", "prepare_peak_bytes", 1e-9, "{:.1f} GB"),
    ("PSNR", "psnr_db", 1, "{:.1f} dB"),
    ("SSIM", "ssim", 1, "{:.4f}"),
)


def table(rows: dict[str, dict[str, Any]]) -> str:
    """The table, a row a contender; columns of which nothing is known are left out."""
    columns = [one for one in _COLUMNS if any(one[1] in row for row in rows.values())]
    lines = ["| | " + " | ".join(name for name, *_ in columns) + " |", "| --- " * (len(columns) + 1) + "|"]
    failed = []
    for one in CONTENDERS:
        row = rows.get(one.name)
        if row is None:
            continue
        if "error" in row:
            failed.append(f"- {one.name} could not be run: `{row['error'].splitlines()[0][:200]}`")
            continue
        cells = [form.format(row[key] * scale) if key in row else "" for _, key, scale, form in columns]
        name = f"**{one.name}**" if one.ours else one.name
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, *([""] if failed else []), *failed])


def draw(figures: dict[str, dict[str, Any]], out: Path) -> None:
    """Time of an image, and memory of four tasks' UNets, as bars."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    rows = {name: row for name, row in figures["contenders"].items() if "image_seconds" in row}
    order = sorted(rows, key=lambda name: rows[name]["image_seconds"], reverse=True)
    colours = ["#2a78d6" if name.startswith("ours") else "#a9b4c0" for name in order]
    plt.rcParams.update({"font.size": 9, "svg.hashsalt": "peers", "font.family": "sans-serif"})
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 0.33 * len(order) + 1.1), sharey=True)
    parts = (
        (left, "image_seconds", 1, "seconds an image (less is better)", "{:.1f} s"),
        (right, "unets_four_bytes", 1e-9, "GB resident, UNets of four tasks (less is better)", "{:.1f} GB"),
    )
    for axes, key, scale, label, form in parts:
        values = [rows[name].get(key, 0) * scale for name in order]
        bars = axes.barh(order, values, color=colours)
        axes.bar_label(bars, [form.format(value) if value else "–" for value in values], padding=3)
        axes.set_xlabel(label)
        axes.set_xlim(0, max(values) * 1.2)
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(out, metadata={"Date": None}, bbox_inches="tight")


def main() -> None:
    parts, sd15 = [], None
    for which, title in WHICH.items():
        if figures := timing.read(timing.RESULTS / f"peers-{which}.json"):
            machine = figures["machine"]["cpu"]
            parts += [f"**{title}** ({machine}, medians of {figures['rounds']} rounds)", table(figures["contenders"])]
            sd15 = figures if which == "sd15" else sd15
    if sd15 is not None:
        draw(sd15, PICTURE)
        parts.append("![Seconds an image, and memory of four tasks](peers.svg)")
    text = PAGE.read_text(encoding="utf-8")
    head, _, rest = text.partition(BEGIN)
    if not rest:
        raise SystemExit(f"{PAGE} has no {BEGIN}")
    page = head + BEGIN + "\n\n" + "\n\n".join(parts) + "\n\n" + END + rest.partition(END)[2]
    with atomic_file(PAGE) as file:
        file.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
