"""INT8 pictures against float pictures on the held-out emoji, for each task.

    python -m bench.accuracy --bundle build/demo/bundle --data build/emoji/held-out

Both start from the same noise and take the same steps; the float side is the dynamically routed original in float32.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path
from statistics import fmean

import numpy as np

from bench import timing
from calibration.observe import observe
from calibration.samples import load_samples
from mtu_compile import runtime
from mtu_compile.metrics import image_metrics, psnr_db
from mtu_compile.model.pipeline import MTUPipeline


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, default=Path("build/demo/bundle"))
    parser.add_argument("--model", type=Path, default=Path("examples/emoji/model"))
    parser.add_argument("--data", type=Path, default=Path("build/emoji/held-out"))
    parser.add_argument("--limit", type=int, default=93, help="rows a task")
    parser.add_argument("--name", default="accuracy")
    args = parser.parse_args()

    float_pipeline = MTUPipeline.from_pretrained(args.model)
    compiled = runtime.load(args.bundle)
    results = {}
    for task in compiled.tasks:
        rows = load_samples(args.data, task)
        rows = tuple(random.Random(0).sample(rows, min(args.limit, len(rows))))
        latents, psnrs, ssims = [], [], []
        for seed, row in enumerate(rows):
            steps = compiled.steps(task.name)
            ours = compiled.run(task.name, row.prompt, image=row.image, mask=row.mask, seed=seed, paste_unmasked=False)
            seen = observe(float_pipeline, task, row, size=None, steps=steps, seed=seed, paste_unmasked=False)
            theirs = seen.made
            latents.append(psnr_db(theirs.latents.numpy(), ours.latents))
            psnr, ssim = image_metrics(np.asarray(theirs.images[0]), np.asarray(ours.image))
            psnrs.append(psnr)
            ssims.append(ssim)
        results[task.name] = {
            "pictures": len(rows),
            "latent PSNR dB": round(fmean(latents), 2),
            "image PSNR dB": round(fmean(psnrs), 2),
            "SSIM": round(fmean(ssims), 4),
            "SSIM least": round(min(ssims), 4),
        }
    timing.write(args.name, {"precision": compiled.manifest.precision, "tasks": results})


if __name__ == "__main__":
    main()
