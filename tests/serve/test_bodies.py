"""What a request may hold: limits at their edges, pictures as bombs, forms and JSON alike."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from typing import Any

import pytest
from PIL import Image

from bench.bad_requests import bomb
from mtu_compile.core.errors import InputError
from mtu_compile.serve import pictures
from mtu_compile.serve.errors import ApiError
from mtu_compile.serve.wishes import TaskWish, Wish, read_wish
from tests.serve.conftest import SOURCE, Running, png

WISH = {"prompt": "red", "num_inference_steps": "2", "rng_seed": "1"}


def edit(server: Running, data: bytes, **wish: str) -> Any:
    return server.http.post("/v1/images/edits", files={"image": ("a", data)}, data={**WISH, **wish})


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_the_formats_that_are_taken(server: Running, format: str) -> None:
    file = io.BytesIO()
    SOURCE.save(file, format)
    assert edit(server, file.getvalue()).status_code == 200


@pytest.mark.parametrize("format", ["GIF", "BMP", "TIFF", "PPM", "ICO", "EPS"])
def test_others_are_not_even_looked_into(server: Running, format: str) -> None:
    file = io.BytesIO()
    SOURCE.save(file, format)
    answer = edit(server, file.getvalue())
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "image")
    assert "is not a picture" in answer.json()["error"]["message"]


def test_a_bomb_is_known_by_its_header(server: Running) -> None:
    for width, height in ((60000, 60000), (1, 2**31 - 1), (9000, 9000)):
        assert len(bomb(width, height)) < 3000
        answer = edit(server, bomb(width, height))
        assert answer.status_code == 400 and "too large" in answer.json()["error"]["message"]


def test_pixels_up_to_the_limit_are_taken_and_no_more(server: Running) -> None:
    for size, status in (((400, 250), 200), ((400, 251), 400)):  # 0.1 megapixels
        assert edit(server, png(Image.new("RGB", size))).status_code == status


def test_bytes_up_to_the_limit_are_taken_and_no_more(server: Running) -> None:
    most = server.service.settings.upload_bytes
    for size, status in ((most, 400), (most + 1, 413)):
        body = b'{"prompt": "' + b"a" * (size - 14) + b'"}'
        assert len(body) == size
        answer = server.http.post("/v1/images/generations", content=body, headers={"Content-Type": "application/json"})
        assert answer.status_code == status
    assert "4000 characters" in server.http.post("/v1/images/generations", json={"prompt": "a" * 5000}).text


def test_a_damaged_picture_says_so(server: Running) -> None:
    whole = png(SOURCE)
    answer = edit(server, whole[: len(whole) // 2])
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "image")


@pytest.mark.parametrize(
    ("path", "options", "status", "says"),
    [
        ("/v1/images/edits", {"data": WISH}, 400, "picture"),
        ("/v1/images/edits", {"json": {"prompt": "a"}}, 415, "multipart/form-data"),
        ("/v1/images/generations", {"files": {"image": b"x"}}, 415, "application/json"),
        ("/v1/images/edits", {"files": [("image", png(SOURCE)), ("image", png(SOURCE))], "data": WISH}, 400, "not 2"),
        ("/v1/images/edits", {"files": {"image": png(SOURCE), "other": b"x"}, "data": WISH}, 400, "unknown file"),
        ("/v1/tasks/sr", {"json": {"image": "%%%"}}, 400, "not base64"),
        ("/v1/tasks/sr", {"json": {"image": 7}}, 400, "no text"),
        ("/v1/tasks/sr", {"json": {}}, 400, "needs a picture"),
        (
            "/v1/tasks/t2i",
            {"json": {"prompt": "a", "image": base64.b64encode(png(SOURCE)).decode()}},
            400,
            "no use for",
        ),
        ("/v1/tasks/none", {"json": {"prompt": "a"}}, 404, "no task"),
    ],
)
def test_what_does_not_fit_is_said(server: Running, path: str, options: dict[str, Any], status: int, says: str) -> None:
    if "data" in options and "files" not in options:
        options = {"files": {name: (None, value) for name, value in options["data"].items()}}
    answer = server.http.post(path, **options)
    assert (answer.status_code, says in answer.json()["error"]["message"]) == (status, True), answer.text


def test_a_form_and_json_mean_the_same(server: Running) -> None:
    as_json = {
        "image": base64.b64encode(png(SOURCE)).decode(),
        "prompt": "red",
        "num_inference_steps": 2,
        "rng_seed": 1,
    }
    answers = [
        server.http.post("/v1/tasks/edit", json=as_json),
        server.http.post("/v1/tasks/edit", files={"image": png(SOURCE)}, data=WISH),
        edit(server, png(SOURCE)),
    ]
    assert len({answer.json()["data"][0]["b64_json"] for answer in answers}) == 1


def test_a_task_of_another_name_needs_no_code(start: Callable[..., Running]) -> None:
    server = start()
    about = server.http.get("/v1/tasks").json()
    assert [task["name"] for task in about["tasks"]] == ["t2i", "edit", "sr", "inpaint"]
    assert about["tasks"][2]["needs"] == {"prompt": False, "image": True, "mask": False}
    assert (about["size"], about["limits"]["num_inference_steps"]) == ("32x32", 60)
    # what an endpoint of OpenAI's takes is found by what tasks need, and not by what they are called
    service = server.service
    service.tasks = {f"my-{name}": task for name, task in service.tasks.items()}
    answer = server.http.post("/v1/images/generations", json={"prompt": "a", "model": "tiny:my-edit"})
    assert "'my-edit' is not for making pictures from words" in answer.json()["error"]["message"]


def test_json_is_strict_and_forms_are_text() -> None:
    assert read_wish(Wish, {"n": "2", "stream": "true", "guidance_scale": "7.5"}, is_form=True).n == 2
    assert read_wish(TaskWish, {"original_size": "[64, 32]"}, is_form=True).original_size == [64, 32]
    assert read_wish(Wish, {"n": None, "size": None}, is_form=False).n == 1
    for values in ({"n": "2"}, {"n": 2.5}, {"n": True}, {"stream": 1}, {"rng_seed": -1}, {"rng_seed": 2**63}):
        with pytest.raises(ApiError):
            read_wish(Wish, values, is_form=False)


def test_what_decoders_raise_is_an_input_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any, **options: Any) -> Any:
        raise MemoryError("no")

    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(InputError, match="cannot be read"):
        pictures.decode(b"x", "picture", 100)
