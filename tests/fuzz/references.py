"""References, which are safetensors."""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from mtu_compile.runtime.reference import Reference, Trajectory
from tests.fuzz import json_mutation
from tests.fuzz.harness import Harness, Wrong, new_folder


def _reference() -> Reference:
    rng = np.random.default_rng(0)

    def draw(*shape: int) -> np.ndarray:  # type: ignore[type-arg]
        return rng.standard_normal(shape, dtype=np.float32)

    inputs = [
        {"sample": draw(1, 4, 2, 2), "timestep": np.full(1, step, np.float32), "encoder_hidden_states": draw(1, 2, 3)}
        for step in (900, 400)
    ]
    picture = Image.new("RGB", (4, 4), "red")
    one = Trajectory(
        "a cat",
        3,
        picture,
        picture.convert("L"),
        inputs,
        draw(2, 1, 4, 2, 2),
        draw(1, 4, 2, 2),
        draw(1, 4, 2, 2),
        picture,
    )
    return Reference("edit", 2, "a test", (one, one))


class References(Harness):
    """``Reference.load``: what is taken is whole and of numbers, and is the same when it is saved and loaded."""

    name = "reference"

    def __init__(self) -> None:
        self.file, self.again = (new_folder() / name for name in ("a.safetensors", "b.safetensors"))

    def seeds(self) -> Sequence[bytes]:
        with tempfile.TemporaryDirectory() as scratch:
            _reference().save(Path(scratch) / "a")
            return ((Path(scratch) / "a").read_bytes(),)

    def mutate(self, data: bytes, rng: random.Random) -> bytes | None:
        """The header changed, its length set right."""
        size = int.from_bytes(data[:8], "little")
        if rng.random() < 0.2 or size + 8 > len(data):
            return None
        try:
            head = json.loads(data[8 : 8 + size])
            meta = head.get("__metadata__") if isinstance(head, dict) else None
            if isinstance(meta, dict) and rng.random() < 0.5:  # what is JSON within it
                key = rng.choice(list(meta)) if meta else ""
                changed = json_mutation.mutate(str(meta.get(key)).encode(), rng)
                if changed is not None:
                    meta[key] = changed.decode(errors="replace")
                text = json.dumps(head).encode()
            else:
                text = json_mutation.mutate(data[8 : 8 + size], rng) or b"{}"
        except (ValueError, RecursionError):
            return None
        body = data[8 + size :]
        if rng.random() < 0.2:
            body = rng.choice((body[:-1], body + b"\0", b"", body[: len(body) // 2]))
        return len(text).to_bytes(8, "little") + text + body

    def read(self, data: bytes) -> None:
        self.file.write_bytes(data)
        loaded = Reference.load(self.file)
        for one in loaded.trajectories:
            arrays = [one.outputs, one.noise, one.latents, *(array for step in one.inputs for array in step.values())]
            if not all(np.isfinite(array).all() for array in arrays):
                raise Wrong("it has values that are no numbers")
            if len(one.inputs) != len(one.outputs) or len(one.timesteps) != len(one.outputs):
                raise Wrong("its steps are not as many everywhere")
            if sum(array.nbytes for array in arrays) > len(data):
                raise Wrong("it has more than its file")
        if loaded.trajectories:
            loaded.calls(4)
            loaded.save(self.again)
            again = Reference.load(self.again)
            if (again.task, again.steps, len(again.trajectories)) != (
                loaded.task,
                loaded.steps,
                len(loaded.trajectories),
            ):
                raise Wrong("it is another once it is saved")
