"""Train a finished checkpoint of the example further, on one data-centre GPU, with more emoji sets; ends by the clock.

    python -m examples.emoji.train_further --start build/emoji/mtu --work build/emoji

Writes the pipeline to WORK/further, and prints what it makes of held-out rows before and after. ``--pack DIR`` also
writes it as one archive in parts of less than 16 MB (``cat DIR/checkpoint.tar.* | tar x``), at marks on the way, too.
"""

from __future__ import annotations

import time

BEGAN = time.monotonic()  # imports count, too

import argparse  # noqa: E402
import copy  # noqa: E402
import json  # noqa: E402
import shutil  # noqa: E402
import zlib  # noqa: E402
from collections.abc import Sequence  # noqa: E402
from dataclasses import replace  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import torch  # noqa: E402
from diffusers import AutoencoderKL  # noqa: E402
from torch import Tensor  # noqa: E402
from transformers import CLIPTextModel, CLIPTokenizer  # noqa: E402

from examples.emoji import data, further  # noqa: E402
from examples.emoji.gpu import further as more  # noqa: E402
from examples.emoji.gpu import held_out, phases  # noqa: E402
from examples.emoji.gpu.setting import Setting  # noqa: E402
from examples.emoji.train_gpu import write_pack  # noqa: E402
from mtu_compile.model.unet import MTUUNet2DConditionModel  # noqa: E402

RESERVE = 25.0  # seconds, for the held-out rows and for writing at the end
OUTPUT = "further"  # in the work folder
MARKS = (0.85, 0.5)  # shares of the run at which its state is kept, in case it does not end


def say(text: str) -> None:
    print(f"[{time.monotonic() - BEGAN:6.1f} s] {text}", flush=True)


def some(emoji: Sequence[data.Emoji], every: int) -> list[data.Emoji]:
    """Those of every so manieth base, with all their tones."""
    return [e for e in emoji if zlib.crc32(e.base.encode()) % every == 0]


class Further:
    """A checkpoint, and what becomes of it."""

    def __init__(self, start: Path, work: Path, pack: Path | None, setting: Setting) -> None:
        self.start, self.work, self.pack, self.setting = start, work, pack, setting
        float32 = {"torch_dtype": torch.float32}
        device = setting.device
        self.unet = MTUUNet2DConditionModel.from_pretrained(start / "unet", **float32).to(device)
        self.vae = AutoencoderKL.from_pretrained(start / "vae", **float32).to(device).eval().requires_grad_(False)
        self.text_encoder = CLIPTextModel.from_pretrained(start / "text_encoder", **float32).to(device)
        self.tokenizer = CLIPTokenizer.from_pretrained(start / "tokenizer")
        self.record: dict[str, Any] = json.loads((start / "training.json").read_text())

    def run(self, cache: Path, until: float, every: int, rows: int) -> None:
        today = data.load(cache)
        sets = [some(one, every) for one in further.load(cache, today)]
        unseen = [e for e in today if e.held_out and e.in_domain]
        today = some([e for e in today if not e.held_out], every)
        say(f"{len(today)} pictures, further sets {[len(one) for one in sets]}, {len(unseen)} held out")
        before = self.measure(unseen, rows)
        marks = list(MARKS)

        def keep(progress: float) -> None:
            if marks and progress > marks[-1]:
                marks.pop()
                self.save()
                say("  kept")

        history = more.train(
            self.unet, self.text_encoder, self.tokenizer, self.vae, today, sets, self.setting, until, on_tick=keep
        )
        gpu = torch.cuda.get_device_name() if self.setting.device.type == "cuda" else None
        stretch = max(1, len(history.rows) // 60)
        self.record["further"] = {
            "steps": history.steps,
            "batch": self.setting.batch["tasks"],
            "seconds": round(history.seconds, 1),
            "gpu": gpu,
            "pictures": [len(today), *map(len, sets)],
            "losses": [{k: round(v, 5) for k, v in row.items()} for row in history.rows[stretch - 1 :: stretch]],
        }
        say(f"{history.steps} steps in {history.seconds:.1f} s")
        self.save()
        after = self.measure(unseen, rows)
        self.record["further"]["held_out"] = {"before": before, "after": after}
        self.save()

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def measure(self, unseen: Sequence[data.Emoji], most: int) -> dict[str, float]:
        """Mean PSNR on held-out rows, inside the hole for inpainting, there also without guidance."""
        self.unet.eval()
        self.text_encoder.eval()
        found = {}
        for index, task in enumerate(self.unet.tasks):
            if not task.condition:
                continue
            rows = held_out.rows_of(
                task,
                unseen,
                self.tokenizer,
                phases.encoder_of(self.vae),
                lambda ids: self.text_encoder(ids).last_hidden_state,
                self.setting.device,
                most=most,
            )

            def predict(sample: Tensor, t: Tensor, states: Tensor, cells: Sequence[int]) -> Tensor:
                ids = torch.full((len(sample),), cells[0], device=sample.device)
                with self.setting.autocast():
                    answer: Tensor = self.unet(sample, t, states, task_ids=ids, return_dict=False)[0]
                return answer.float()

            ways = {task.name: task}
            if rows.hole is not None:
                ways[f"{task.name}, not guided"] = replace(task, guidance="none")
            for name, way in ways.items():
                latents = held_out.sample(predict, way, rows, [index])[0]
                psnr = held_out.psnr(rows.truth, held_out.pictures(self.vae, latents), rows.hole)
                found[name] = round(float(psnr.mean()), 3)
        say(f"held out, dB: {found}")
        return found

    def save(self) -> None:
        """In fp16, as it is published; what was not trained is copied."""
        folder = self.work / OUTPUT
        for name in ("unet", "text_encoder"):
            module = copy.deepcopy(getattr(self, name)).to("cpu").eval().half()
            module.save_pretrained(folder / name)
        for name in ("vae", "tokenizer", "scheduler"):
            shutil.copytree(self.start / name, folder / name, dirs_exist_ok=True)
        (folder / "training.json").write_text(json.dumps(self.record, indent=1) + "\n")
        shutil.copy(self.start / "model_index.json", folder)
        if self.pack is not None:
            write_pack(self.work, (OUTPUT,), self.pack)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--start", type=Path, default=Path("build/emoji/mtu"), help="the pipeline to go on from")
    parser.add_argument("--work", type=Path, default=Path("build/emoji"))
    parser.add_argument("--cache", type=Path, default=Path("build/emoji"))
    parser.add_argument("--minutes", type=float, default=9.2, help="of all of it, imports included")
    parser.add_argument("--batch", type=int, default=384, help="examples a step, all tasks together")
    parser.add_argument("--compile", action="store_true", help="compile the UNet with torch.compile")
    parser.add_argument("--pack", type=Path, help="also write an archive in parts of less than 16 MB here")
    parser.add_argument("--steps", type=int, help="end after so many steps (to try it out)")
    parser.add_argument("--variants", type=int, default=1000, help="at most so many variants a pool (to try it out)")
    parser.add_argument("--every", type=int, default=1, help="use every so manieth emoji only (to try it out)")
    parser.add_argument("--rows", type=int, default=280, help="held-out rows a task, at most")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    torch.manual_seed(1)
    setting = Setting(
        device=device,
        batch={"tasks": args.batch},
        compile=frozenset({"tasks"} if args.compile else ()),
        most_steps=args.steps,
        variants=args.variants,
        say=say,
    )
    say(torch.cuda.get_device_name() if device.type == "cuda" else "no GPU")
    one = Further(args.start, args.work, args.pack, setting)
    one.run(args.cache, BEGAN + args.minutes * 60 - RESERVE, args.every, args.rows)
    say("done")


if __name__ == "__main__":
    main()
