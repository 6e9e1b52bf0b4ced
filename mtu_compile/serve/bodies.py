"""A request's body, read within the operator's limits: JSON, or a multipart form with files."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request

from mtu_compile.core.schema import parse_json
from mtu_compile.serve.errors import ApiError
from mtu_compile.serve.settings import Settings

#: Fields and files of a form: more than any client has.
_MOST_FIELDS, _MOST_FILES = 64, 16
#: Bytes of JSON that are parsed before anything else could be done.
_AT_ONCE = 64 * 1024


@dataclass(frozen=True)
class Body:
    """What was sent.

    Attributes:
        values: fields by name, as JSON has them; of a form all are text.
        files: contents of the files of a form, by field.
        is_form: whether ``values`` are a form's.
    """

    values: dict[str, Any]
    files: dict[str, list[bytes]]
    is_form: bool


async def read_body(request: Request, settings: Settings, *, json: bool = True, form: bool = True) -> Body:
    """The body of ``request``.

    Args:
        request: nothing of its body was read yet.
        settings: for the limits.
        json, form: which of both the endpoint takes.

    Raises:
        ApiError: too large (413), too slow (408), of another type (415), or not what its type says (400).
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    is_form = kind == "multipart/form-data" and form
    if not is_form and not (json and (kind == "application/json" or (kind == "" and not form))):
        taken = " or ".join(name for name, yes in (("application/json", json), ("multipart/form-data", form)) if yes)
        raise ApiError(415, f"the content type is {kind[:80]!r}, and this takes {taken}", "unsupported_media_type")
    try:
        return await asyncio.wait_for(_read(request, settings, is_form), settings.upload_timeout)
    except (asyncio.TimeoutError, TimeoutError) as error:
        message = f"the request did not arrive within {settings.upload_timeout:g} seconds"
        raise ApiError(408, message, "upload_timeout") from error
    except ClientDisconnect as error:
        raise ApiError(400, "the request ended early", "incomplete") from error


async def _read(request: Request, settings: Settings, is_form: bool) -> Body:
    chunks = _limited(request, settings)
    if is_form:
        return await _read_form(request, chunks, settings)
    raw = b"".join([chunk async for chunk in chunks])
    try:
        small = len(raw) < _AT_ONCE
        value = _parse(raw) if small else await run_in_threadpool(_parse, raw)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the request is not JSON: {_short(error)}", "invalid_json") from error
    if not isinstance(value, dict):
        raise ApiError(400, "the request is no JSON object", "invalid_json")
    return Body(value, {}, is_form=False)


def _parse(raw: bytes) -> Any:
    return parse_json(raw.decode("utf-8"))


async def _limited(request: Request, settings: Settings) -> AsyncGenerator[bytes, None]:
    """The chunks of the body; ``ApiError`` as soon as it is, or says it is, too large."""
    said = request.headers.get("content-length", "0")
    if said.isdecimal() and int(said[:20]) > settings.upload_bytes:
        raise _too_large(settings)
    size = 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > settings.upload_bytes:
            raise _too_large(settings)
        yield chunk


async def _read_form(request: Request, chunks: AsyncGenerator[bytes, None], settings: Settings) -> Body:
    parser = MultiPartParser(
        request.headers, chunks, max_files=_MOST_FILES, max_fields=_MOST_FIELDS, max_part_size=settings.upload_bytes
    )
    parser.spool_max_size = settings.upload_bytes  # stays in memory, which the limit bounds: boards have slow disks
    values: dict[str, Any] = {}
    files: dict[str, list[bytes]] = {}
    try:
        form = await parser.parse()
    except MultiPartException as error:
        raise ApiError(400, f"the form is damaged: {_short(error.message)}", "invalid_form") from error
    try:
        for name, value in form.multi_items():
            name = name.removesuffix("[]")  # how PHP and OpenAI's clients write a list
            if isinstance(value, UploadFile):
                files.setdefault(name, []).append(await value.read())
            elif name in values:
                raise ApiError(400, f"{name[:80]!r} is given twice", "invalid_form", name[:80])
            else:
                values[name] = value
    finally:
        await form.close()
    return Body(values, files, is_form=True)


def _too_large(settings: Settings) -> ApiError:
    return ApiError(413, f"the request is larger than {settings.upload_mb:g} MB", "too_large")


def _short(text: object) -> str:
    return str(text)[:200]
