"""The page in a real Chromium: every task, with mouse and finger, in light and dark."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.serve.chromium import Browser, Page, executable
from tests.serve.conftest import SOURCE, Running

pytestmark = pytest.mark.skipif(executable() is None, reason="Chromium is not installed: apt install chromium")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("profile")) as made:
        yield made


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("photos") / "photo.png"
    SOURCE.resize((96, 64)).save(path)
    return path


def opened(browser: Browser, server: Running, *, phone: bool = False, dark: bool = False) -> Page:
    page = browser.page(*((390, 844) if phone else (1280, 800)), phone=phone, dark=dark)
    page.goto(f"{server.url}/#token={server.token.reveal()}")
    page.until("document.querySelector('#tasks button')")
    return page


def made(page: Page, pictures: int) -> None:
    """Wait until so many pictures are in the history."""
    page.until(
        f"document.querySelectorAll('#history button').length == {pictures} && !document.querySelector('#run').disabled"
    )


@pytest.mark.parametrize("phone", [False, True], ids=["desktop", "phone"])
def test_every_task_can_be_tried(browser: Browser, server: Running, photo: Path, phone: bool) -> None:
    page = opened(browser, server, phone=phone)
    page.type("#prompt", "a cat")
    page.click("#run")
    made(page, 1)
    page.click("[data-task=edit]")
    page.choose_file("#file", photo)
    page.until("!document.querySelector('#source-picture').hidden")
    page.click("#run")
    made(page, 2)
    page.click("[data-task=sr]")
    page.click("#run")
    made(page, 3)
    page.click("[data-task=inpaint]")
    page.click("#run")
    page.until("document.querySelector('#error').textContent.includes('paint over')")
    page.until("document.querySelector('#mask').style.width")
    box = page.box("#mask")
    line = [(box["x"] + box["width"] * (0.1 + 0.04 * i), box["y"] + box["height"] * 0.5) for i in range(10)]
    (page.swipe if phone else page.drag)(line)
    page.click("#run")
    made(page, 4)
    assert page.js("document.querySelector('#error').hidden")
    last = page.js("document.querySelector('#canvas img').src")
    assert last.startswith("data:image/png;base64,")
    # what was not painted over is the photo, cropped; what was, is not
    changed = page.js(
        """(async () => {
          const [result, photo] = await Promise.all([document.querySelector('#canvas img').src,
            document.querySelector('#source-picture').src].map(async (src) => {
              const image = new Image(); image.src = src; await image.decode();
              const canvas = document.createElement('canvas'); canvas.width = canvas.height = 32;
              const context = canvas.getContext('2d'), side = Math.min(image.width, image.height);
              context.drawImage(image, (image.width - side) / 2, (image.height - side) / 2, side, side, 0, 0, 32, 32);
              return context.getImageData(0, 0, 32, 32).data; }));
          const off = (row) => Array.from({length: 8 * 4}, (_, i) => Math.abs(result[(row * 32) * 4 + i]
            - photo[(row * 32) * 4 + i])).reduce((a, b) => a + b) / 32;
          return [off(16), off(2)]; })()"""
    )
    assert changed[0] > 3 * changed[1], changed


def test_the_token_is_asked_for_leaves_the_address_and_can_be_forgotten(browser: Browser, server: Running) -> None:
    page = browser.page(1000, 700)
    page.goto(server.url)
    page.until("!document.querySelector('#login').hidden && document.querySelector('#work').hidden")
    page.type("#token", "wrong")
    page.click("#login-form button")
    page.until("document.querySelector('#login-error').textContent.includes('wrong')")
    browser.problems.clear()  # the 401 is one
    page.js("document.querySelector('#token').value = ''")
    page.type("#token", server.token.reveal())
    page.click("#login-form button")
    page.until("!document.querySelector('#work').hidden")
    page.goto(f"{server.url}/#token={server.token.reveal()}")
    page.until("location.hash == '' && document.querySelector('#work')?.hidden === false")
    page.click("#leave")
    page.until("document.querySelector('#login')?.hidden === false && sessionStorage.getItem('token') === null")


def test_progress_is_shown_and_cancel_ends_it(browser: Browser, start: Callable[..., Running]) -> None:
    server = start()
    page = opened(browser, server)
    page.type("#prompt", "a cat")
    server.gate.shut()
    page.click("#run")
    page.until("document.querySelector('#state').textContent == 'preparing'")
    assert page.js("document.querySelector('#run').disabled && !document.querySelector('#cancel').hidden")
    page.click("#cancel")
    page.until("document.querySelector('#cancel').hidden && !document.querySelector('#run').disabled")
    assert server.service.waiting.jobs == [] or server.service.waiting.jobs[0].abandoned
    server.gate.open.set()
    page.click("#run")
    made(page, 1)


def test_what_was_made_can_be_seen_and_made_again(browser: Browser, server: Running) -> None:
    page = opened(browser, server)
    page.type("#prompt", "a cat")
    page.js("document.querySelector('#count').value = 2")
    page.click("#run")
    made(page, 2)
    first = page.js("document.querySelectorAll('#history img')[1].src")
    page.click("#history button:last-child")
    page.until("document.querySelectorAll('#canvas img').length == 1")
    page.click("#again")
    page.click("#run")
    made(page, 3)
    assert page.js("document.querySelector('#canvas img').src") == first  # same seed, same picture


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("phone", [False, True], ids=["desktop", "phone"])
def test_it_fits_its_window_and_follows_the_systems_colours(
    browser: Browser, server: Running, phone: bool, dark: bool
) -> None:
    page = opened(browser, server, phone=phone, dark=dark)
    page.click("[data-task=inpaint]")
    page.click("#more summary")
    assert page.js("document.documentElement.scrollWidth <= innerWidth")
    corner = np.asarray(Image.open(io.BytesIO(page.picture())).convert("L"))[-4:, -4:].mean()
    assert corner < 60 if dark else corner > 200
    small = page.js(
        "[...document.querySelectorAll('button, input, select, textarea, a.secondary')].filter(e => e.offsetParent"
        " && e.type != 'file').map(e => [e.id || e.textContent, e.offsetHeight]).filter(([, height]) => height < 20)"
    )
    assert small == []


def test_the_api_page_needs_nothing_from_elsewhere(browser: Browser, server: Running) -> None:
    page = browser.page(1000, 700)
    page.goto(f"{server.url}/docs")
    page.until("document.querySelectorAll('.docs .card').length > 8")
    text = page.js("document.body.innerText")
    assert "/v1/images/edits" in text and "num_inference_steps" in text and "mask_mode" in text


def test_pages_ask_nobody_else_and_complain_of_nothing(browser: Browser, server: Running) -> None:
    opened(browser, server).goto(f"{server.url}/docs")
    others = [one for one in browser.requested if not one.startswith(("http://127.0.0.1:", "data:", "blob:", "about:"))]
    assert others == [] and browser.problems == []
