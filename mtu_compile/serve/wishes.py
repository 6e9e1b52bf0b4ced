"""The fields a client may send: OpenAI's, those OpenVINO Model Server has beside them, and our own.

What has no effect here but comes with OpenAI's clients by itself (``quality``, ``user``, …) is taken and left alone;
what would change the picture and cannot be had is refused, and so is every name that is not listed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError

from mtu_compile.core.fit import Fit
from mtu_compile.core.seeds import MAX_SEED
from mtu_compile.core.tasks import MAX_SCALE
from mtu_compile.runtime.masks import MaskMode
from mtu_compile.serve.errors import ApiError

Pixels = Annotated[list[Annotated[int, Field(ge=0, le=32768)]], Field(min_length=2, max_length=2)]
OutputFormat = Literal["png", "jpeg", "webp"]
Scale = Annotated[float, Field(ge=0, le=MAX_SCALE, allow_inf_nan=False)]

_IGNORED = "Taken for compatibility; has no effect."


class Wish(BaseModel):
    """What every endpoint that makes pictures takes."""

    model_config = ConfigDict(extra="forbid")

    prompt: str = Field("", description="What to show, or the instruction of an edit.")
    negative_prompt: str | None = Field(None, description="Takes the place of the empty prompt in guidance.")
    model: str | None = Field(None, description="The bundle's id, or `id:task` for one of its tasks.")
    n: int = Field(
        1,
        ge=1,
        validation_alias=AliasChoices("n", "num_images_per_prompt"),
        description="Pictures, of consecutive seeds. OpenVINO Model Server's `num_images_per_prompt`.",
    )
    size: str | None = Field(None, max_length=20, description="`auto`, or the engine's own as `WIDTHxHEIGHT`.")
    num_inference_steps: int | None = Field(None, ge=1, le=1000, description="Denoising steps; the bundle's default.")
    guidance_scale: Scale | None = Field(None, description="Of the prompt's direction; 1 or less is no guidance.")
    image_guidance_scale: Scale | None = Field(None, description="Of the picture's direction.")
    rng_seed: int | None = Field(None, ge=0, le=MAX_SEED, description="Of the noise; random by default.")
    scheduler: str | None = Field(None, max_length=40, description="Sampler; the model's own by default.")
    original_size: Pixels | None = Field(None, description="SDXL: [height, width].")
    crops_coords_top_left: Pixels | None = Field(None, description="SDXL: [top, left].")
    target_size: Pixels | None = Field(None, description="SDXL: [height, width].")
    response_format: Literal["b64_json"] | None = Field(None, description="Pictures come as base64; `url` is refused.")
    output_format: OutputFormat = Field("png", description="File format of the pictures.")
    output_compression: int = Field(95, ge=0, le=100, description="Quality of jpeg and webp.")
    background: Literal["auto", "opaque"] | None = Field(None, description="Pictures are opaque.")
    stream: bool = Field(False, description="Answer with server-sent events.")
    partial_images: int = Field(0, ge=0, le=3, description="With `stream`: pictures on the way.")
    quality: str | None = Field(None, max_length=20, description=_IGNORED)
    style: str | None = Field(None, max_length=20, description=_IGNORED)
    moderation: str | None = Field(None, max_length=20, description=_IGNORED)
    input_fidelity: str | None = Field(None, max_length=20, description=_IGNORED)
    user: str | None = Field(None, max_length=1000, description=_IGNORED)
    safety_identifier: str | None = Field(None, max_length=1000, description=_IGNORED)


class PictureWish(Wish):
    """What endpoints that start from a picture take beside that."""

    fit: Fit | None = Field(None, description="What becomes of a picture of other proportions; the bundle's own way.")
    mask_mode: MaskMode = Field(
        "alpha", description="What of the mask is repainted: what is transparent (`alpha`), what is white, or `auto`."
    )
    paste_unmasked: bool = Field(True, description="Take what lies outside of the mask from the picture.")


class TaskWish(PictureWish):
    """What a task's own endpoint takes; in JSON its pictures are base64 text, or ``data:`` URLs."""

    mask_mode: MaskMode = Field("auto", description="What of the mask is repainted: `auto`, `white` or `alpha`.")
    image: str | None = Field(None, description="The source picture, in base64 (JSON), or as a file (form).")
    mask: str | None = Field(None, description="The mask, likewise.")


def read_wish(kind: type[Wish], values: Mapping[str, Any], *, is_form: bool) -> Wish:
    """``values`` as a ``kind``; ``ApiError`` (400) that names the field that is wrong.

    In JSON numbers are numbers; in a form all is text, and lists of numbers are written as in JSON.
    """
    given = {name: value for name, value in values.items() if value is not None}  # null is not said
    if is_form:
        for name, value in given.items():
            if isinstance(value, str) and re.fullmatch(r"\[\s*\d{1,6}\s*,\s*\d{1,6}\s*\]", value):
                given[name] = [int(number) for number in re.findall(r"\d+", value)]
        given = {name: value for name, value in given.items() if value != "" or name == "prompt"}
    try:
        return kind.model_validate(given, strict=not is_form)
    except ValidationError as error:
        raise _about(error) from None
    except RecursionError as error:
        raise ApiError(400, "the request is nested too deeply", "invalid_value") from error


def _about(error: ValidationError) -> ApiError:
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    name = ".".join(str(part) for part in first["loc"])[:80] or None
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"unknown field {name!r}", "unknown_parameter", name)
    what = first["msg"][:200]
    return ApiError(400, f"{name}: {what[:1].lower()}{what[1:]}" if name else what, "invalid_value", name)
