"""What is fuzzed, and what has to hold whatever it is given."""

from __future__ import annotations

import atexit
import random
import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

from mtu_compile.core.errors import MtuError

CORPUS = Path(__file__).parent / "corpus"

#: Bytes of an input.
MOST_BYTES = 1 << 16


class Wrong(AssertionError):
    """A reader took what it must not take, or took it for something else than it is."""


class Harness(ABC):
    """One reader.

    Its errors have to be ``MtuError``s: whatever else comes out of ``run`` is a fault, as are a crash, a hang and
    memory beyond the fuzzer's limit.
    """

    #: As its folder in the corpus.
    name: str

    @abstractmethod
    def seeds(self) -> Sequence[bytes]:
        """Inputs that are valid, and few more; mutation begins with them."""

    @abstractmethod
    def read(self, data: bytes) -> None:
        """Read ``data``; ``Wrong`` if it is taken and must not be."""

    def mutate(self, data: bytes, rng: random.Random) -> bytes | None:
        """``data`` changed as somebody would who knows the format; ``None`` for the fuzzer's own way."""
        return None

    def run(self, data: bytes) -> bool:
        """Whether ``data`` was taken."""
        try:
            self.read(data)
        except MtuError:
            return False
        return True

    def corpus(self) -> list[Path]:
        """Inputs that were faults once, or reach far."""
        return sorted((CORPUS / self.name).glob("*"))


def new_folder() -> Path:
    """A folder for readers that want a path, until the process ends; libFuzzer's leave it to who started them."""
    folder = Path(tempfile.mkdtemp(prefix="mtu-fuzz-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder
