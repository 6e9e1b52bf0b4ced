"""OpenAI's own client, and what OpenVINO Model Server's clients send: the same pictures as the runtime makes."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from PIL import Image

from mtu_compile import runtime
from tests.serve.conftest import HOLE, MASK, SOURCE, Running, png

OURS = {"num_inference_steps": 3, "rng_seed": 7}


@pytest.fixture(scope="module")
def client(server: Running) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=server.token.reveal(), max_retries=0)


@pytest.fixture(scope="module")
def loaded(shared_root: Path) -> runtime.Runtime:
    return runtime.load(shared_root, warn=False)


def decoded(b64: str | None) -> Image.Image:
    assert b64
    return Image.open(io.BytesIO(base64.b64decode(b64)))


def same(b64: str | None, wanted: Image.Image) -> bool:
    return bool((np.asarray(decoded(b64)) == np.asarray(wanted)).all())


def test_generation_makes_the_runtimes_pictures_of_consecutive_seeds(
    client: openai.OpenAI, loaded: runtime.Runtime
) -> None:
    answer = client.images.generate(prompt="a cat", n=2, size="32x32", extra_body=OURS)
    assert answer.data is not None and len(answer.data) == 2
    for index, one in enumerate(answer.data):
        assert same(one.b64_json, loaded.run("t2i", "a cat", seed=7 + index, steps=3).image)
    assert not same(answer.data[0].b64_json, decoded(answer.data[1].b64_json))
    assert (answer.size, answer.output_format, answer.background) == ("32x32", "png", "opaque")


def test_fields_of_model_server_do_what_they_say(client: openai.OpenAI, loaded: runtime.Runtime) -> None:
    fields = {**OURS, "guidance_scale": 2.5, "negative_prompt": "blurry", "num_images_per_prompt": 1}
    answer = client.images.generate(prompt="a cat", extra_body=fields)
    wanted = loaded.run("t2i", "a cat", negative_prompt="blurry", guidance_scale=2.5, seed=7, steps=3).image
    assert answer.data is not None and same(answer.data[0].b64_json, wanted)
    assert not same(answer.data[0].b64_json, loaded.run("t2i", "a cat", seed=7, steps=3).image)


def test_without_a_seed_two_answers_differ(client: openai.OpenAI) -> None:
    first, second = (client.images.generate(prompt="a cat", extra_body={"num_inference_steps": 2}) for _ in range(2))
    assert first.data and second.data and not same(first.data[0].b64_json, decoded(second.data[0].b64_json))


@pytest.mark.parametrize(("output_format", "kind"), [("png", "PNG"), ("jpeg", "JPEG"), ("webp", "WEBP")])
def test_output_formats(client: openai.OpenAI, output_format: Any, kind: str) -> None:
    answer = client.images.generate(prompt="a", output_format=output_format, output_compression=80, extra_body=OURS)
    assert answer.data is not None and answer.output_format == output_format
    picture = decoded(answer.data[0].b64_json)
    assert (picture.format, picture.size) == (kind, (32, 32))


def test_a_stream_has_pictures_on_the_way_that_come_nearer(client: openai.OpenAI) -> None:
    options = {"num_inference_steps": 12, "rng_seed": 1}
    events = list(client.images.generate(prompt="a cat", stream=True, partial_images=3, extra_body=options))
    kinds = [event.type for event in events]
    assert kinds == ["image_generation.partial_image"] * 3 + ["image_generation.completed"]
    assert [event.partial_image_index for event in events[:3]] == [0, 1, 2]  # type: ignore[union-attr]
    pictures = [np.asarray(decoded(event.b64_json), np.float32) for event in events]
    off = [float(np.abs(picture - pictures[-1]).mean()) for picture in pictures]
    assert off[0] > off[2] > 0
    assert events[-1].usage.total_tokens == 0  # type: ignore[union-attr]


def test_an_edit_without_a_mask_is_the_editing_task(client: openai.OpenAI, loaded: runtime.Runtime) -> None:
    answer = client.images.edit(image=("in.png", png(SOURCE)), prompt="make it red", extra_body=OURS)
    wanted = loaded.run("edit", "make it red", image=SOURCE, seed=7, steps=3).image
    assert answer.data is not None and same(answer.data[0].b64_json, wanted)


def test_a_masks_transparent_pixels_are_repainted_and_nothing_else(
    client: openai.OpenAI, loaded: runtime.Runtime
) -> None:
    answer = client.images.edit(
        image=[("in.png", png(SOURCE))], mask=("mask.png", png(HOLE)), prompt="a hat", extra_body=OURS
    )
    wanted = loaded.run("inpaint", "a hat", image=SOURCE, mask=MASK, mask_mode="white", seed=7, steps=3).image
    assert answer.data is not None and same(answer.data[0].b64_json, wanted)
    got, outside = np.asarray(decoded(answer.data[0].b64_json)), np.asarray(MASK) == 0
    assert (got[outside] == np.asarray(SOURCE)[outside]).all() and (got[~outside] != np.asarray(SOURCE)[~outside]).any()


def test_a_white_mask_says_so_and_is_refused_otherwise(client: openai.OpenAI, loaded: runtime.Runtime) -> None:
    image, mask = ("in.png", png(SOURCE)), ("mask.png", png(MASK))
    with pytest.raises(openai.BadRequestError, match="no transparency"):
        client.images.edit(image=image, mask=mask, prompt="a hat", extra_body=OURS)
    white = {**OURS, "mask_mode": "white"}
    answer = client.images.edit(image=image, mask=mask, prompt="a hat", extra_body=white)
    wanted = loaded.run("inpaint", "a hat", image=SOURCE, mask=MASK, seed=7, steps=3).image
    assert answer.data is not None and same(answer.data[0].b64_json, wanted)


def test_edits_stream_too(client: openai.OpenAI) -> None:
    events = client.images.edit(
        image=("in.png", png(SOURCE)), prompt="red", stream=True, partial_images=1, extra_body=OURS
    )
    assert [event.type for event in events] == ["image_edit.partial_image", "image_edit.completed"]


def test_models_are_the_bundle_and_its_tasks(client: openai.OpenAI) -> None:
    names = [model.id for model in client.models.list()]
    assert names == ["tiny", "tiny:t2i", "tiny:edit", "tiny:sr", "tiny:inpaint"]
    assert [client.models.retrieve(name).id for name in names] == names
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("tiny:nothing")


def test_a_model_may_name_the_task_where_it_fits(client: openai.OpenAI) -> None:
    assert client.images.generate(model="tiny", prompt="a", extra_body=OURS).data
    assert client.images.generate(model="tiny:t2i", prompt="a", extra_body=OURS).data
    with pytest.raises(openai.BadRequestError, match="task 'edit' is not for making pictures from words"):
        client.images.generate(model="tiny:edit", prompt="a")
    with pytest.raises(openai.NotFoundError) as refused:
        client.images.generate(model="gpt-image-2", prompt="a")
    assert refused.value.code == "model_not_found"


@pytest.mark.parametrize(
    ("wish", "param", "says"),
    [
        ({"prompt": ""}, None, "needs a prompt"),
        ({"prompt": "a", "size": "1024x1024"}, "size", "makes pictures of 32x32"),
        ({"prompt": "a", "n": 5}, "n", "at most 4"),
        ({"prompt": "a", "extra_body": {"num_inference_steps": 61}}, "num_inference_steps", "at most 60"),
        ({"prompt": "a", "response_format": "url"}, "response_format", "b64_json"),
        ({"prompt": "a", "background": "transparent"}, "background", "opaque"),
        ({"prompt": "a", "extra_body": {"strength": 0.5}}, "strength", "unknown field"),
        ({"prompt": "a", "extra_body": {"guidance_scale": "7"}}, "guidance_scale", "valid number"),
        ({"prompt": "a", "extra_body": {"image_guidance_scale": 3}}, None, "image_guidance_scale has no effect"),
        ({"prompt": "a", "extra_body": {"scheduler": "magic"}}, None, "unknown sampler"),
        ({"prompt": "a" * 5000}, "prompt", "at most 4000 characters"),
    ],
)
def test_what_cannot_be_had_is_refused_by_name(
    client: openai.OpenAI, wish: dict[str, Any], param: str | None, says: str
) -> None:
    with pytest.raises(openai.BadRequestError, match=says) as refused:
        client.images.generate(**wish)
    assert (refused.value.param, refused.value.type) == (param, "invalid_request_error")


def test_a_wrong_token_is_an_authentication_error(server: Running) -> None:
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0).models.list()


def test_what_clients_send_by_themselves_does_no_harm(client: openai.OpenAI) -> None:
    assert client.images.generate(
        prompt="a", quality="high", style="vivid", moderation="low", user="somebody", size="auto", extra_body=OURS
    ).data
