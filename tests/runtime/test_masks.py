"""What a mask selects, by white and by transparency, and what is said when that is nothing or everything."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from PIL import Image

from mtu_compile.core.errors import ConfigError, InputError
from mtu_compile.runtime.images import open_mask
from mtu_compile.runtime.masks import check_selection, read_mask

#: [4, 6]: where the masks below are to repaint.
HOLE = np.zeros((4, 6), bool)
HOLE[1:3, 2:5] = True


def selected(mask: Image.Image, mode: Any = "auto") -> Any:
    black_and_white, _ = read_mask(mask, mode)
    values = np.asarray(black_and_white)
    assert black_and_white.mode == "L" and set(np.unique(values)) <= {0, 255}
    return values == 255


def kinds(mask: Image.Image, mode: Any = "auto") -> list[str]:
    return [notice.kind for notice in read_mask(mask, mode)[1]]


def with_alpha(colour: Any, alpha: Any) -> Image.Image:
    pixels = np.empty((4, 6, 4), np.uint8)
    pixels[..., :3], pixels[..., 3] = colour, alpha
    return Image.fromarray(pixels)


PHOTO = np.random.default_rng(0).integers(0, 256, (4, 6, 3))


@pytest.mark.parametrize("mode", ["auto", "white"])
@pytest.mark.parametrize("form", ["L", "1", "RGB", "P", "RGBA", "LA"])
def test_white_selects(form: str, mode: str) -> None:
    mask = Image.fromarray(HOLE.astype(np.uint8) * 255).convert(form)
    np.testing.assert_array_equal(selected(mask, mode), HOLE)
    assert kinds(mask, mode) == []


def test_half_bright_is_the_limit() -> None:
    grey = Image.fromarray(np.array([[0, 127, 128, 255]], np.uint8))
    assert selected(grey).tolist() == [[False, False, True, True]]


def test_a_hole_in_the_picture_selects_as_the_images_api_has_it() -> None:
    mask = with_alpha(PHOTO, np.where(HOLE, 0, 255))
    for mode in ("auto", "alpha"):
        np.testing.assert_array_equal(selected(mask, mode), HOLE)
        assert kinds(mask, mode) == []
    palette = with_alpha((9, 90, 9), np.where(HOLE, 0, 255)).quantize(4)
    assert palette.mode == "P" and palette.has_transparency_data
    np.testing.assert_array_equal(selected(palette), HOLE)


def test_white_on_nothing_is_told_apart_by_its_mode() -> None:
    """Strokes on a transparent layer: programs differ in what that means, so it is said."""
    strokes = with_alpha(255, np.where(HOLE, 255, 0))
    np.testing.assert_array_equal(selected(strokes), ~HOLE)
    assert kinds(strokes) == ["mask-alpha"]
    np.testing.assert_array_equal(selected(strokes, "white"), HOLE)  # what cannot be seen is not white
    assert kinds(strokes, "white") == kinds(strokes, "alpha") == []


def test_an_opaque_alpha_channel_says_nothing() -> None:
    mask = with_alpha(HOLE[..., None] * 255, 255)
    np.testing.assert_array_equal(selected(mask), HOLE)
    with pytest.raises(InputError, match="no transparency") as caught:
        read_mask(mask.convert("RGB"), "alpha")
    assert "--mask-mode white" in str(caught.value.hint)
    assert not selected(mask, "alpha").any()


def test_ones_are_white_where_nothing_is_brighter() -> None:
    mask = Image.fromarray(HOLE.astype(np.uint8))
    np.testing.assert_array_equal(selected(mask), HOLE)
    assert kinds(mask) == ["mask-zero-one"]
    mask.putpixel((0, 0), 2)  # now 1 is only very dark
    assert not selected(mask).any() and kinds(mask) == []
    black = Image.new("L", (6, 4))
    assert not selected(black).any() and kinds(black) == []


def test_sixteen_bits_select_as_eight_do(tmp_path: Any) -> None:
    Image.fromarray(HOLE.astype(np.uint16) * 65535).save(tmp_path / "m.png")
    np.testing.assert_array_equal(selected(open_mask(tmp_path / "m.png")), HOLE)


def test_nothing_everything_and_too_little_are_said() -> None:
    def said(mask: Any, latent: Any) -> Any:
        return [(notice.kind, notice.facts["pixels"]) for notice in check_selection(mask, latent)]

    nothing, everything, dot = np.zeros((16, 16)), np.ones((16, 16)), np.zeros((16, 16))
    dot[0, 0] = 1
    assert said(nothing, np.zeros((2, 2))) == [("mask-empty", 0)]
    assert said(everything, np.ones((2, 2))) == [("mask-full", 256)]
    assert said(dot, np.zeros((2, 2))) == [("mask-lost", 1)]
    assert said(dot, np.eye(2)) == []


def test_there_is_no_other_mode() -> None:
    with pytest.raises(ConfigError, match="'black'"):
        read_mask(Image.new("L", (2, 2)), "black")  # type: ignore[arg-type]
