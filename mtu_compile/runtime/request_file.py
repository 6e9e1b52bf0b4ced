"""A file of requests: what ``mtu-compile run --batch`` reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from mtu_compile.core.errors import InputError
from mtu_compile.core.fit import Fit
from mtu_compile.core.schema import Length, Mismatch, Range, Rule, conform, read_json
from mtu_compile.core.seeds import MAX_SEED
from mtu_compile.core.sizes import Offset, Size
from mtu_compile.core.tasks import Scale, TaskName
from mtu_compile.runtime.images import SUFFIXES
from mtu_compile.runtime.masks import MaskMode
from mtu_compile.runtime.request import Request

_HINT = "docs/guide.md shows such a file"


def _is_picture_name(name: str) -> bool:
    plain = Path(name).name == name and "\\" not in name and not name.startswith(".") and name.isprintable()
    return plain and name.lower().endswith(SUFFIXES)


#: Of a picture to write: nothing in the file leads out of the folder that was asked for.
PictureName = Annotated[str, Rule(_is_picture_name, f"the name of a picture ({', '.join(SUFFIXES)}), without a folder")]


@dataclass(frozen=True)
class RequestRow:
    """One request as the file has it; all but ``output`` are fields of ``Request``.

    Attributes:
        image, mask: relative to the file's folder.
        output: what the picture is called; the request's number and task otherwise.
    """

    task: TaskName
    prompt: str = ""
    negative_prompt: str = ""
    image: str | None = None
    mask: str | None = None
    seed: Annotated[int, Range(0, MAX_SEED)] = 0
    steps: Annotated[int, Range(1, 1000)] | None = None
    guidance_scale: Scale | None = None
    image_guidance_scale: Scale | None = None
    scheduler: str | None = None
    fit: Fit | None = None
    mask_mode: MaskMode = "auto"
    paste_unmasked: bool = True
    original_size: Size | None = None
    crops_coords_top_left: Offset | None = None
    target_size: Size | None = None
    step_cache: bool = True
    output: PictureName | None = None

    def request(self, folder: Path) -> Request:
        """The request; pictures are looked for in ``folder``."""
        given = {name: value for name, value in vars(self).items() if name not in ("image", "mask", "output")}
        image, mask = (None if name is None else folder / name for name in (self.image, self.mask))
        return Request(**given, image=image, mask=mask)


def read_requests(path: Path) -> list[tuple[Request, str]]:
    """The requests of a JSON file, a list of objects, each with the name of its picture.

    Raises:
        InputError: the file cannot be read, is no such list, or has two pictures of one name.
    """
    try:
        rows: Sequence[RequestRow] = conform(
            Annotated[tuple[RequestRow, ...], Length(1)], read_json(path, error=InputError, hint=_HINT)
        )
    except Mismatch as mismatch:
        raise mismatch.at(path, error=InputError, hint=_HINT) from mismatch
    digits = len(str(len(rows)))
    names = [row.output or f"{index:0{digits}}-{row.task}.png" for index, row in enumerate(rows, 1)]
    for index, name in enumerate(names):
        if name.lower() in (earlier.lower() for earlier in names[:index]):
            raise InputError(f"{path}: two pictures are called {name!r}", hint="give each an output of its own")
    return [(row.request(path.parent), name) for row, name in zip(rows, names, strict=True)]
