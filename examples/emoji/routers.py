"""A figure of what the routers learnt: each task's expert weights in every block, and what specialisation folds away.

python -m examples.emoji.routers               # docs/routers.png, and the table of docs/paper.md (make routers)
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from bench.held_out import into_docs, markdown
from mtu_compile.model.experts import TaskExperts
from mtu_compile.model.unet import MTUUNet2DConditionModel

MODEL = Path(__file__).with_name("model")
FIGURE, PAGE = Path("docs/routers.png"), Path("docs/paper.md")
KINDS = ("down_blocks", "mid_block", "up_blocks")  # the order data go through


def expert_weights(unet: MTUUNet2DConditionModel) -> dict[str, NDArray[np.float32]]:
    """By block, in the order data go through: mixing weights [tasks, experts]."""
    ids = torch.arange(len(unet.tasks), device=unet.device)
    blocks = {name: one for name, one in unet.named_modules() if isinstance(one, TaskExperts)}
    order = sorted(blocks, key=lambda name: (KINDS.index(name.split(".")[0]), name))
    with torch.no_grad():
        embedding = unet.task_embedding(ids)
        return {name: blocks[name].router(embedding, ids).float().cpu().numpy() for name in order}


def short(name: str) -> str:
    """``up_blocks.2.attentions.1.transformer_blocks.0.ff`` → ``up 2.1``."""
    parts = name.split(".")
    numbers = [part for part in parts[: parts.index("transformer_blocks")] if part.isdigit()]
    return " ".join([parts[0].split("_")[0], ".".join(numbers if parts[0] != "mid_block" else numbers[1:])]).strip()


def draw(weights: Mapping[str, NDArray[np.float32]], tasks: Sequence[str], path: Path) -> None:
    """One panel a block: tasks down, experts across; white is the uniform mixture all networks start from."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    count = next(iter(weights.values())).shape[1]
    uniform = 1 / count
    reach = max(float(abs(one - uniform).max()) for one in weights.values())
    figure, panels = pyplot.subplots(1, len(weights), figsize=(1.75 * len(weights) + 1.2, 2.5), sharey=True)
    image = None
    for panel, (name, one) in zip(np.atleast_1d(panels), weights.items(), strict=True):
        image = panel.imshow(one, cmap="PuOr", vmin=uniform - reach, vmax=uniform + reach, aspect="auto")
        for (row, column), value in np.ndenumerate(one):
            strong = abs(value - uniform) > 0.7 * reach
            panel.text(
                column, row, f"{value:.2f}"[1:], ha="center", va="center", fontsize=8, color="w" if strong else "k"
            )
        panel.set_title(short(name), fontsize=10)
        panel.set_xticks(range(count), [str(i + 1) for i in range(count)], fontsize=8)
        panel.set_yticks(range(len(tasks)), tasks, fontsize=9)
        panel.tick_params(length=0)
    np.atleast_1d(panels)[len(weights) // 2].set_xlabel("expert", fontsize=10)
    figure.tight_layout(rect=(0, 0, 0.93, 1), w_pad=0.4)
    place = figure.add_axes((0.945, 0.2, 0.01, 0.62))
    figure.colorbar(image, cax=place).ax.tick_params(labelsize=8)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def folded(unet: MTUUNet2DConditionModel) -> str:
    """Parameters that a task's own static graph does not have, and why."""
    counts = {"routers": 0, "task norms": 0}
    for one in unet.modules():
        if isinstance(one, TaskExperts):
            counts["routers"] += _count(one.router)
            counts["task norms"] += _count(one.norm)
            spare = (len(one.experts) - 1) * one.experts[0].net[2].bias.numel()
            counts["experts' output biases"] = counts.get("experts' output biases", 0) + spare
    everything = _count(unet)
    convolutions = [_count(conv) for conv in unet.task_conv_in.convs]
    others = sum(convolutions) - sum(convolutions) / len(convolutions)
    rows = [
        ["routers", counts["routers"], "constants: their weights scale the experts' down projections"],
        ["task embedding", _count(unet.task_embedding), "read by routers only"],
        ["task norms", counts["task norms"], "of the task: into the up projection; of other tasks: dropped"],
        ["experts' output biases", counts["experts' output biases"], "one weighted sum a block"],
        ["other tasks' input convolutions (mean)", round(others), "dropped"],
    ]
    total = sum(int(row[1]) for row in rows)
    rows.append(["**together**", total, f"{100 * total / everything:.2f} % of {everything:,}"])
    return markdown(["", "parameters", "in a task's static graph"], [[r[0], f"{r[1]:,}", r[2]] for r in rows])


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL, help="an MTU pipeline folder")
    parser.add_argument("--figure", type=Path, default=FIGURE)
    parser.add_argument("--page", type=Path, default=PAGE, help="where the table goes")
    args = parser.parse_args()
    unet = MTUUNet2DConditionModel.from_pretrained(args.model / "unet", torch_dtype=torch.float32)
    draw(expert_weights(unet), [task.name for task in unet.tasks], args.figure)
    into_docs(args.page, "routers", folded(unet))


if __name__ == "__main__":
    main()
