"""The process that is fuzzed; ``python -m tests.fuzz`` starts it, and removes what it leaves."""

from __future__ import annotations

import os
import random
import struct
import sys
import tempfile
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

from tests.fuzz.harness import MOST_BYTES, Harness

#: By name, where each is; imported under atheris, which follows what their code does.
HARNESSES = {
    "manifest": ("tests.fuzz.manifests", "Manifests"),
    "signature": ("tests.fuzz.manifests", "Signatures"),
    "signed-manifest": ("tests.fuzz.manifests", "SignedManifests"),
    "archive": ("tests.fuzz.archives", "Archives"),
    "reference": ("tests.fuzz.references", "References"),
    "onnx": ("tests.fuzz.graphs", "Graphs"),
}

#: File in ``TMPDIR``: inputs so far, and how many were taken. libFuzzer ends its process without a word from Python.
COUNTS = "counts"

#: What coverage is taken of; all of it, libraries too, would be too slow.
_FOLLOWED = ["mtu_compile.bundle", "mtu_compile.core.schema", "mtu_compile.runtime.reference", "mtu_compile.graph.io"]

_LIMITS = [f"-max_len={MOST_BYTES}", "-timeout=20", "-rss_limit_mb=4096", "-detect_leaks=0"]


def load(name: str) -> Harness:
    """The harness of that name."""
    module, kind = HARNESSES[name]
    made: Harness = getattr(import_module(module), kind)()
    return made


def main(name: str, options: list[str]) -> None:
    """Fuzz until libFuzzer ends the process."""
    import atheris

    with atheris.instrument_imports(include=_FOLLOWED):
        harness = load(name)
    seeds = Path(tempfile.mkdtemp(prefix="seeds-"))
    for number, seed in enumerate(harness.seeds()):
        (seeds / f"seed-{number}").write_bytes(seed)
    if all(option.startswith("-") for option in options):
        options = [*options, tempfile.mkdtemp(prefix="found-")]  # libFuzzer writes into the first of its folders
    kept = [str(one.parent) for one in harness.corpus()[:1]]
    atheris.Setup([sys.argv[0], *_LIMITS, *options, str(seeds), *kept], _counted(harness), custom_mutator=_by(harness))
    atheris.Fuzz()


def _counted(harness: Harness) -> Callable[[bytes], None]:
    counts = os.open(Path(tempfile.gettempdir()) / COUNTS, os.O_RDWR | os.O_CREAT, 0o600)
    inputs = taken = 0

    def one(data: bytes) -> None:
        nonlocal inputs, taken
        taken += harness.run(data)
        inputs += 1
        os.pwrite(counts, struct.pack("=QQ", inputs, taken), 0)

    return one


def _by(harness: Harness) -> Callable[[bytes, int, int], bytes]:
    import atheris

    def mutate(data: bytes, most: int, seed: int) -> bytes:
        changed = harness.mutate(bytes(data), random.Random(seed))
        return atheris.Mutate(data, most) if changed is None or len(changed) > most else changed  # type: ignore[no-any-return]

    return mutate


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
