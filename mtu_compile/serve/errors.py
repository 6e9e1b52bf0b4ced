"""What a client is told when its request is not answered: OpenAI's error shape, and an HTTP status."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mtu_compile.core.errors import ConfigError, InputError, MtuError

#: What the API calls what the command line calls otherwise.
_FIELDS = {"guidance": "guidance_scale", "image-guidance": "image_guidance_scale", "steps": "num_inference_steps"}
_OPTION = re.compile(r"--([a-z][a-z-]+)")


@dataclass
class ApiError(Exception):
    """A refusal or a failure.

    Attributes:
        status: HTTP's.
        message: what is wrong, and what to do about it.
        code: for programs.
        param: the field it is about.
        headers: of the response.
    """

    status: int
    message: str
    code: str | None = None
    param: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """OpenAI's ``type``."""
        if self.status >= 500:
            return "server_error"
        return {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}.get(
            self.status, "invalid_request_error"
        )

    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}


def busy(seconds: int) -> ApiError:
    """The queue is full; a place will be free in ``seconds`` or so."""
    return ApiError(429, "all places are taken; try again later", "queue_full", headers={"Retry-After": str(seconds)})


def closing() -> ApiError:
    return ApiError(503, "the server is shutting down", "shutting_down", headers={"Retry-After": "10"})


def timed_out(seconds: float) -> ApiError:
    return ApiError(504, f"there was no answer within {seconds:g} seconds", "timeout")


def cancelled() -> ApiError:
    return ApiError(409, "the request was cancelled", "cancelled")


def from_mtu(error: MtuError, param: str | None = None) -> ApiError:
    """What the runtime refused is the client's to mend; what failed in it is not."""
    if isinstance(error, (ConfigError, InputError)):
        hint = f" ({error.hint})" if error.hint else ""
        return ApiError(400, _in_fields(error.message + hint), "invalid_value", param)
    return ApiError(500, error.message, "engine_error")


def _in_fields(text: str) -> str:
    """``--image-guidance`` → ``image_guidance_scale``."""
    return _OPTION.sub(lambda found: _FIELDS.get(found[1], found[1].replace("-", "_")), text)
