"""The paper's claim at small scale: one multi-task network against a network for each task, and the paper's ablations.

    python -m examples.emoji.claim --work build/emoji --minutes 6      # one data-centre GPU; writes claim.json

All networks start from the same base model, whose layers stay frozen as in the paper, and take the same steps on the
same data (``gpu.fleet``). A single-task network is what ``mtu-compile upcycle --experts 1 --task NAME`` makes: the
whole feed-forward, with a norm and an input convolution of its own. ``claim_page`` puts the result into docs/paper.md.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure
from transformers import CLIPTextModel, CLIPTokenizer

from examples.emoji import claim_cost, data, score_clip
from examples.emoji.gpu import held_out, phases
from examples.emoji.gpu.diffusion import Velocity
from examples.emoji.gpu.fleet import Fleet, FleetExperts, Network
from examples.emoji.gpu.setting import Setting, fast
from examples.emoji.gpu.task_data import TaskData
from mtu_compile.core.tasks import Task
from mtu_compile.model.recipe import trained_parameters

TASKS = Path(__file__).with_name("tasks.json")
RESULT = Path(__file__).with_name("claim.json")
RATE = 1e-3
ROUTING = {"d_task": 64, "router_width": 64}
MULTI, SINGLE, START = "MTU, 4 experts", "single-task networks", "before training"


def networks(tasks: int, seeds: int) -> list[Network]:
    """What is compared, for every seed."""
    every = tuple(range(tasks))
    found = []
    for seed in range(seeds):
        found += [Network(MULTI, seed, every, 4)]
        found += [Network(SINGLE, seed, (task,), 1) for task in every]
        found += [Network(f"{n} expert{'s' * (n > 1)}", seed, every, n) for n in (1, 2, 8)]
        found += [Network("4 experts, one norm for all tasks", seed, every, 4, shared_norms=True)]
        found += [Network("4 experts, router frozen uniform", seed, every, 4, uniform=True)]
    return found


class Claim:
    """The parts that every step of the comparison needs."""

    def __init__(
        self, work: Path, cache: Path, setting: Setting, seeds: int, result: Path, every: int, most: int | None
    ) -> None:
        self.setting, self.seeds, self.result, self.most = setting, seeds, result, most
        device = setting.device
        emoji = data.load(cache)
        bases = set(list(dict.fromkeys(e.base for e in emoji))[::every])
        emoji = [e for e in emoji if e.base in bases]
        self.train_emoji = [e for e in emoji if not e.held_out]
        self.known = [e for e in self.train_emoji if e.in_domain]
        self.unknown = [e for e in emoji if e.held_out and e.in_domain]
        self.tasks = [Task.from_json(row) for row in json.loads(TASKS.read_text())]
        self.vae = _frozen(AutoencoderKL.from_pretrained(work / "vae", torch_dtype=torch.float32), device)
        self.text = _frozen(CLIPTextModel.from_pretrained(work / "base/text_encoder", dtype=torch.float32), device)
        self.base = _frozen(UNet2DConditionModel.from_pretrained(work / "base/unet", torch_dtype=torch.float32), device)
        self.tokenizer = CLIPTokenizer.from_pretrained(work / "base/tokenizer")
        self.clip = _frozen(score_clip.load(work, self.tokenizer), device)
        self.encode = phases.encoder_of(self.vae)
        self.fleet = Fleet(self.base, self.tasks, networks(len(self.tasks), seeds), **ROUTING)
        self.record: dict[str, Any] = {"setting": {}, "networks": [], "baselines": {}}
        for one in self.fleet.networks:
            names = [self.tasks[i].name for i in one.tasks]
            self.record["networks"].append({"variant": one.variant, "seed": one.seed, "tasks": {n: {} for n in names}})

    def write(self) -> None:
        self.result.parent.mkdir(parents=True, exist_ok=True)
        record = _rounded(self.record)
        lines = ",\n  ".join(json.dumps(one) for one in record["networks"])
        rest = json.dumps({key: value for key, value in record.items() if key != "networks"}, indent=1)
        self.result.write_text(f'{rest[:-2]},\n "networks": [\n  {lines}\n ]\n}}\n')

    # --- training ---

    def train(self, until: float) -> None:
        """Every network in lock-step; the clock ends all of them at the same step."""
        setting, cells, batch = self.setting, self.fleet.cells, self.setting.batch["tasks"]
        device = setting.device
        draw = TaskData(
            self.tasks, [batch * self.seeds] * len(self.tasks), self.train_emoji, self.tokenizer, self.encode, setting
        )
        velocity = Velocity(device)
        blocks = [batch] * (len(self.tasks) * self.seeds)
        # Row numbers of every cell's samples: those of its task and seed.
        first = (cells.task * self.seeds + cells.seed) * batch
        picked = (first[:, None] + torch.arange(batch, device=device)).flatten()
        everything = torch.arange(len(cells), device=device)
        variants = list(dict.fromkeys(one.variant for one in self.fleet.networks))
        variant = torch.tensor([variants.index(self.fleet.owner(c).variant) for c in range(len(cells))], device=device)

        def predict(sample: Tensor, t: Tensor, states: Tensor) -> Tensor:
            out: Tensor = self.fleet.unet(sample, t, states, task_ids=everything, return_dict=False)[0]
            return out

        def drawn() -> tuple[Tensor, Tensor, Tensor, Tensor]:
            clean, condition, ids = draw()
            noisy, t, target = velocity(clean, blocks)
            with torch.no_grad():
                states = self.text(ids).last_hidden_state
            sample = torch.cat((noisy, condition), dim=1)
            return sample[picked], t[picked], states[picked], target[picked]

        with setting.autocast():
            step = fast(setting, "tasks", predict, *drawn()[:3])

        def losses() -> Tensor:
            with setting.autocast():
                *given, target = drawn()
                predicted = step(*given)
            errors = (predicted.float() - target).pow(2).mean(dim=(1, 2, 3)).unflatten(0, (len(cells), -1)).mean(dim=1)
            return torch.zeros(len(variants), device=device).index_add(0, variant, errors)

        self.fleet.unet.train()
        history = setting.fit(self.fleet.groups(RATE), losses, variants, until, clip=self.fleet.clip)
        self.fleet.unet.eval()
        setting.say(f"{history.steps} steps in {history.seconds:.1f} s")
        if device.type == "cuda":
            torch.cuda.empty_cache()
            setting.say(f"  at most {torch.cuda.max_memory_allocated() / 1e9:.1f} GB")
        self.record["setting"] = {
            "device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
            "seeds": self.seeds,
            "steps": history.steps,
            "batch_per_task": batch,
            "examples_per_task": history.steps * batch,
            "learning_rate": RATE,
            "seconds": round(history.seconds, 1),
            "training_pictures": len(self.train_emoji),
            **ROUTING,
        }
        self.write()

    # --- measuring ---

    def predict(self, sample: Tensor, t: Tensor, states: Tensor, cells: Sequence[int]) -> Tensor:
        chosen = torch.tensor(cells, device=sample.device)
        with self.setting.autocast():
            out: Tensor = self.fleet.unet(sample, t, states, task_ids=chosen, return_dict=False)[0]
            return out

    def rows(self, task: Task, emoji: Sequence[data.Emoji]) -> held_out.Rows:
        def read(ids: Tensor) -> Tensor:
            with torch.no_grad():
                return self.text(ids).last_hidden_state

        return held_out.rows_of(task, emoji, self.tokenizer, self.encode, read, self.setting.device, most=self.most)

    def start(self) -> None:
        """What the base model makes of prompts, and what there is without a model."""
        of = {task.name: self.rows(task, self.unknown) for task in self.tasks}
        prompted = self.rows(self.tasks[0], self.known)
        latents = held_out.sample(self.predict, self.tasks[0], prompted, self.fleet.cells_of(0)[:1])
        made = held_out.pictures(self.vae, latents[0])
        self.record["baselines"] = {
            START: {"t2i": self._drawn(prompted, made)},
            "autoencoder alone": {n: self._near(r, held_out.pictures(self.vae, r.clean)) for n, r in of.items()},
        }
        del self.record["baselines"]["autoencoder alone"]["t2i"]
        for task in self.tasks:
            if task.condition and "mask" not in task.condition:
                plain = held_out.pictures(self.vae, of[task.name].condition[:, : of[task.name].clean.shape[1]])
                self.record["baselines"].setdefault("input as it is", {})[task.name] = self._near(of[task.name], plain)
        self.write()

    def measure(self, number: int) -> None:
        """One task, all networks that know it."""
        task, cells = self.tasks[number], self.fleet.cells_of(number)
        unknown = self.rows(task, self.unknown)
        shown = self.rows(task, self.known) if not task.condition else unknown
        errors = held_out.prediction_error(self.predict, unknown, cells)
        ways = {"": task}
        if task.guided == "text+image":
            ways[" unguided"] = task.at(1.0, 1.0)
        for cell, error in zip(cells, errors, strict=True):
            self._figures(cell, task)["error"] = error
        for label, way in ways.items():
            for cell, own in zip(cells, held_out.sample(self.predict, way, shown, cells), strict=True):
                made = held_out.pictures(self.vae, own)
                figures = self._near(shown, made) if task.condition else self._drawn(shown, made)
                self._figures(cell, task).update({f"{name}{label}": value for name, value in figures.items()})
        self.record["setting"].setdefault("rows", {})[task.name] = len(shown)
        self.write()

    def _figures(self, cell: int, task: Task) -> dict[str, float]:
        found: dict[str, float] = self.record["networks"][int(self.fleet.cells.network[cell])]["tasks"][task.name]
        return found

    def _near(self, rows: held_out.Rows, made: Tensor) -> dict[str, float]:
        """How near pictures are to the truth; inside the hole, where there is one."""
        found = {"psnr_db": float(held_out.psnr(rows.truth, made, rows.hole).mean())}
        if rows.hole is None:
            pair = (made.float() / 255, rows.truth.float() / 255)
            found["ssim"] = float(structural_similarity_index_measure(*pair, data_range=1.0))
        return found

    def _drawn(self, rows: held_out.Rows, made: Tensor) -> dict[str, float]:
        """How well pictures show their prompts: rank of the prompt, and distance from the true pictures' features."""
        with torch.no_grad():
            features, true = (
                torch.cat([self.clip.pictures(x.float() / 127.5 - 1) for x in pixels.split(1024)])
                for pixels in (made, rows.truth)
            )
            scores = (features @ self.clip.prompts(rows.ids).T).cpu()
        distance = held_out.frechet(features.cpu(), true.cpu())
        return {"frechet": 1000 * distance, "first": score_clip.ranked_first(scores, rows.prompts)}

    def mixing(self) -> None:
        """Every task's mixing weights in every block, for the networks that have several experts."""
        for number, one in enumerate(self.fleet.networks):
            if one.experts == 1 or one.uniform:
                continue
            cells = (self.fleet.cells.network == number).nonzero()[:, 0]
            with torch.no_grad():
                embedding = self.fleet.parts["task_embedding"](cells)
                self.record["networks"][number]["mixing"] = {
                    name: part.mix(embedding, cells)[:, : one.experts].tolist()
                    for name, part in self.fleet.parts.items()
                    if isinstance(part, FleetExperts)
                }
        self.write()

    def keep(self, folder: Path) -> None:
        """What was trained of the first seed's multi- and single-task networks, in fp16."""
        folder.mkdir(parents=True, exist_ok=True)
        for number, one in enumerate(self.fleet.networks):
            if one.seed == 0 and one.variant in (MULTI, SINGLE):
                label = "mtu" if len(one.tasks) > 1 else self.tasks[one.tasks[0]].name
                trained = trained_parameters(self.fleet.network(number))
                whole = {name: p.detach().half().cpu().contiguous() for name, p in trained.items()}
                save_file(whole, folder / f"{label}.safetensors")


def _frozen(module: Any, device: torch.device) -> Any:
    return module.to(device).eval().requires_grad_(False)


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: _rounded(one) for key, one in value.items()}
    return [_rounded(one) for one in value] if isinstance(value, list) else value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/emoji"), help="holds vae, base and clip.safetensors")
    parser.add_argument("--cache", type=Path, default=Path("build/emoji"))
    parser.add_argument("--result", type=Path, default=RESULT)
    parser.add_argument("--keep", type=Path, help="also write the first seed's trained weights here")
    parser.add_argument("--minutes", type=float, default=6.0, help="of training, preparation not counted")
    parser.add_argument("--steps", type=int, help="end after so many steps")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=32, help="examples a step of each task, network and seed")
    parser.add_argument("--compile", action="store_true", help="compile the networks with torch.compile")
    parser.add_argument("--variants", type=int, default=1000, help="at most so many variants a pool (to try it out)")
    parser.add_argument("--every", type=int, default=1, help="use every so manieth base name only (to try it out)")
    parser.add_argument("--most", type=int, help="at most so many rows a task (to try it out)")
    args = parser.parse_args()
    began = time.monotonic()

    def say(text: str) -> None:
        print(f"[{time.monotonic() - began:6.1f} s] {text}", flush=True)

    def timed(label: str, call: Callable[[], object]) -> None:
        call()
        say(label)

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    torch.manual_seed(0)
    setting = Setting(
        device=device,
        batch={"tasks": args.batch},
        compile=frozenset({"tasks"} if args.compile else ()),
        most_steps=args.steps,
        variants=args.variants,
        say=say,
    )
    claim = Claim(args.work, args.cache, setting, args.seeds, args.result, args.every, args.most)
    say(f"{len(claim.fleet.networks)} networks, {len(claim.fleet.cells)} cells")
    timed("start", claim.start)
    claim.train(time.monotonic() + 60 * args.minutes)
    claim.mixing()
    if args.keep:
        claim.keep(args.keep)
    for number, task in reversed(list(enumerate(claim.tasks))):  # what takes longest comes last
        timed(f"measured {task.name}", lambda n=number: claim.measure(n))
    claim.record["cost"] = claim_cost.measure(claim.base, claim.tasks, ROUTING)
    claim.write()
    say("done")


if __name__ == "__main__":
    main()
