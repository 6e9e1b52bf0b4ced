"""The whole recipe on one data-centre GPU: autoencoder, base model and the four tasks in minutes.

    python -m examples.emoji.train_gpu --work build/emoji --minutes 8

Every part has a share of the minutes and ends by the clock. A part that is in the work folder already is not trained
again, so a run that was cut off goes on with the next part. ``--pack DIR`` also writes all of it, in fp16, as one
archive in parts of less than 16 MB (``cat DIR/checkpoint.tar.* | tar x`` puts it together).
"""

from __future__ import annotations

import time

BEGAN = time.monotonic()  # imports count, too

import argparse  # noqa: E402
import copy  # noqa: E402
import io  # noqa: E402
import json  # noqa: E402
import tarfile  # noqa: E402
from collections.abc import Sequence  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import torch  # noqa: E402
from diffusers import AutoencoderKL, UNet2DConditionModel  # noqa: E402
from torch import nn  # noqa: E402
from transformers import CLIPTextModel, CLIPTokenizer  # noqa: E402

from examples.emoji import data, train_vae  # noqa: E402
from examples.emoji.captions import edits  # noqa: E402
from examples.emoji.gpu import phases  # noqa: E402
from examples.emoji.gpu.loop import History  # noqa: E402
from examples.emoji.gpu.prompts import captions_of  # noqa: E402
from examples.emoji.gpu.setting import Setting  # noqa: E402
from examples.emoji.train_base import (  # noqa: E402
    MODEL_INDEX,
    SCHEDULER,
    build_text_encoder,
    build_tokenizer,
    build_unet,
)
from mtu_compile.core.tasks import Task  # noqa: E402
from mtu_compile.model.pipeline import MTUPipeline  # noqa: E402
from mtu_compile.model.upcycle import upcycle_unet  # noqa: E402

#: Shares of the time that is left when a part begins.
SHARES = {"vae": 0.26, "base": 0.42, "tasks": 1.0}
RESERVE = 12.0  # seconds, for writing at the end
PART = 15_500_000  # bytes of an archive's part
TASKS = Path(__file__).with_name("tasks.json")
UPCYCLING = {"num_experts": 4, "d_task": 64, "router_width": 64}


def say(text: str) -> None:
    print(f"[{time.monotonic() - BEGAN:6.1f} s] {text}", flush=True)


class Recipe:
    """The parts in order, and what they leave in the work folder."""

    def __init__(
        self, work: Path, cache: Path, setting: Setting, seconds: float, pack: Path | None, every: int = 1
    ) -> None:
        self.work, self.setting, self.pack = work, setting, pack
        self.end = BEGAN + seconds - RESERVE
        self.all = data.load(cache)[::every]
        self.train = [e for e in self.all if not e.held_out]
        self.held_out = [e for e in self.all if e.held_out]
        self.record: dict[str, Any] = {}
        work.mkdir(parents=True, exist_ok=True)

    def until(self, part: str) -> float:
        now = time.monotonic()
        return now + max(1.0, SHARES[part] * (self.end - now))

    def run(self) -> None:
        device = self.setting.device
        torch.manual_seed(0)
        vae = self._vae().to(device).eval()
        encode = phases.encoder_of(vae)
        unet, text, tokenizer = self._base(encode)
        self._tasks(unet, text, tokenizer, vae, encode)

    def _vae(self) -> AutoencoderKL:
        folder = self.work / "vae"
        if (folder / "config.json").exists():
            return AutoencoderKL.from_pretrained(folder)
        device = self.setting.device
        vae = train_vae.build().to(device)
        say(f"autoencoder: {len(self.train)} pictures, {count(vae):.2f}M parameters")
        history = phases.train_vae(vae, self.train, self.setting, self.until("vae"))
        with torch.no_grad():
            pixels = train_vae.to_tensor(self.train).to(device)
            latents = torch.cat([vae.encode(x).latent_dist.mode() for x in pixels.split(256)])
            vae.register_to_config(scaling_factor=1.0 / float(latents.std()))
            psnr = train_vae.evaluate(vae, train_vae.to_tensor(self.held_out).to(device))
            known = train_vae.evaluate(vae, pixels[::8])
        self._note("vae", history, held_out_psnr_db=psnr, training_psnr_db=known)
        save(vae, folder)
        self.write_pack()
        return vae

    def _base(self, encode: Any) -> tuple[UNet2DConditionModel, CLIPTextModel, CLIPTokenizer]:
        folder, device = self.work / "base", self.setting.device
        if (folder / "model_index.json").exists():
            return (
                UNet2DConditionModel.from_pretrained(folder / "unet").to(device),
                CLIPTextModel.from_pretrained(folder / "text_encoder").to(device),
                CLIPTokenizer.from_pretrained(folder / "tokenizer"),
            )
        # The tokenizer may know the held-out names too; no model weight ever sees them.
        names = [c for captions in captions_of(self.all) for c in captions]
        names += [p for e in edits(self.train) for p in e.prompts]
        tokenizer = build_tokenizer(names, folder / "tokenizer")
        unet, text = build_unet().to(device), build_text_encoder(tokenizer).to(device)
        say(f"base: UNet {count(unet):.2f}M, text encoder {count(text):.2f}M parameters")
        history = phases.train_base(unet, text, tokenizer, self.train, encode, self.setting, self.until("base"))
        self._note("base", history)
        save(unet, folder / "unet")
        save(text, folder / "text_encoder")
        SCHEDULER.save_pretrained(folder / "scheduler")
        (folder / "model_index.json").write_text(json.dumps(MODEL_INDEX, indent=2) + "\n")
        self.write_pack()
        return unet, text, tokenizer

    def _tasks(
        self,
        base: UNet2DConditionModel,
        text: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        vae: AutoencoderKL,
        encode: Any,
    ) -> None:
        tasks = [Task.from_json(row) for row in json.loads(TASKS.read_text())]
        unet = upcycle_unet(base, tasks, **UPCYCLING)
        say(f"tasks: UNet {count(unet):.2f}M parameters")
        marks = [0.9, 0.6]  # shares of the run at which its state is kept, in case it does not end

        def keep(progress: float) -> None:
            if marks and progress > marks[-1]:
                marks.pop()
                self._save_pipeline(unet, text, tokenizer, vae)
                self.write_pack()
                say("  kept")

        history = phases.train_tasks(
            unet, text, tokenizer, self.train, encode, self.setting, self.until("tasks"), on_tick=keep
        )
        self._note("tasks", history)
        self._save_pipeline(unet, text, tokenizer, vae)
        self.write_pack()

    def _save_pipeline(self, unet: nn.Module, text: nn.Module, tokenizer: CLIPTokenizer, vae: nn.Module) -> None:
        half = [copy.deepcopy(m).to("cpu").eval().half() for m in (unet, vae, text)]
        pipeline = MTUPipeline(half[0], half[1], half[2], tokenizer, SCHEDULER)
        pipeline.save_pretrained(self.work / "mtu")
        (self.work / "mtu" / "training.json").write_text(json.dumps(self.record, indent=1) + "\n")

    def _note(self, part: str, history: History, **measured: float) -> None:
        gpu = torch.cuda.get_device_name() if self.setting.device.type == "cuda" else None
        stretch = max(1, len(history.rows) // 60)
        self.record[part] = {
            "steps": history.steps,
            "batch": self.setting.batch[part],
            "seconds": round(history.seconds, 1),
            "gpu": gpu,
            **{name: round(value, 3) for name, value in measured.items()},
            "losses": [{k: round(v, 5) for k, v in row.items()} for row in history.rows[stretch - 1 :: stretch]],
        }
        (self.work / "training.json").write_text(json.dumps(self.record, indent=1) + "\n")
        say(f"{part}: {history.steps} steps in {history.seconds:.1f} s {measured or ''}")

    def write_pack(self) -> None:
        """The work folder's parts as one archive, cut into pieces."""
        if self.pack is not None:
            write_pack(self.work, ("vae", "base", "mtu", "training.json"), self.pack)


def write_pack(work: Path, names: Sequence[str], pack: Path) -> None:
    """What there is of ``names`` in ``work`` as one archive, cut into pieces of ``PART`` bytes."""
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        for name in names:
            if (work / name).exists():
                tar.add(work / name, arcname=name)
    whole = archive.getvalue()
    pack.mkdir(parents=True, exist_ok=True)
    for number, start in enumerate(range(0, len(whole), PART)):
        (pack / f"checkpoint.tar.{number}").write_bytes(whole[start : start + PART])


def count(module: nn.Module) -> float:
    return sum(p.numel() for p in module.parameters()) / 1e6


def save(module: Any, folder: Path) -> None:
    """In fp16, as it is published."""
    copy.deepcopy(module).to("cpu").eval().half().save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("build/emoji"))
    parser.add_argument("--cache", type=Path, default=Path("build/emoji"))
    parser.add_argument("--minutes", type=float, default=8.0, help="of the whole recipe, imports included")
    parser.add_argument("--batch", default="256,512,512", help="examples a step: autoencoder, base, tasks together")
    parser.add_argument("--compile", default="", help="parts to compile with torch.compile: vae,base,tasks")
    parser.add_argument("--no-graph", action="store_true", help="no CUDA graphs")
    parser.add_argument("--pack", type=Path, help="also write an archive in parts of less than 16 MB here")
    parser.add_argument("--steps", type=int, help="end each part after so many steps (to try it out)")
    parser.add_argument("--variants", type=int, default=1000, help="at most so many variants a pool (to try it out)")
    parser.add_argument("--every", type=int, default=1, help="use every so manieth picture only (to try it out)")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    batches = dict(zip(("vae", "base", "tasks"), map(int, args.batch.split(",")), strict=True))
    setting = Setting(
        device=device,
        batch=batches,
        compile=frozenset(filter(None, args.compile.split(","))),
        graph=not args.no_graph,
        most_steps=args.steps,
        variants=args.variants,
        say=say,
    )
    say(f"{torch.cuda.get_device_name() if device.type == 'cuda' else 'no GPU'}, {batches}, compile {args.compile!r}")
    Recipe(args.work, args.cache, setting, args.minutes * 60, args.pack, args.every).run()
    say("done")


if __name__ == "__main__":
    main()
