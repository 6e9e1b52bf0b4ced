"""Pictures of other proportions, and the masks that go with them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from mtu_compile.core.errors import ConfigError
from mtu_compile.core.fit import FITS
from mtu_compile.runtime import images
from mtu_compile.runtime.fitting import Frame, fit_mask, fit_picture


def noise(width: int, height: int, channels: int = 3) -> Image.Image:
    pixels = np.random.default_rng(width * height).integers(0, 256, (height, width, channels), np.uint8)
    return Image.fromarray(pixels)


def array(picture: Image.Image) -> Any:
    return np.asarray(picture).astype(int)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1", "CMYK"])
@pytest.mark.parametrize("size", [(24, 16), (50, 20), (5, 9), (1, 100), (300, 1)])
@pytest.mark.parametrize("fit", FITS)
def test_every_picture_becomes_rgb_of_the_size(mode: str, size: tuple[int, int], fit: Any) -> None:
    fitted = fit_picture(noise(*size, channels=4).convert(mode), (16, 24), fit)
    assert (fitted.mode, fitted.size) == ("RGB", (24, 16))
    values = images.to_array(fitted)
    assert (values.shape, values.dtype) == ((1, 3, 16, 24), np.float32)
    assert values.min() >= -1 and values.max() <= 1


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("size", [(24, 24), (48, 48), (100, 100), (9, 9)])
def test_a_picture_of_the_same_proportions_is_resized_and_nothing_else(fit: Any, size: tuple[int, int]) -> None:
    picture, mask = noise(*size), noise(*size).convert("L")
    expected = picture if size == (24, 24) else picture.resize((24, 24), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(fit_picture(picture, (24, 24), fit), expected)
    shrunk = mask if size == (24, 24) else mask.resize((24, 24), Image.Resampling.NEAREST)
    np.testing.assert_array_equal(fit_mask(mask, (24, 24), fit), np.asarray(shrunk) >= 128)


def test_a_crop_is_the_middle_pixel_for_pixel() -> None:
    wide, tall = noise(129, 64), noise(64, 128)
    np.testing.assert_array_equal(fit_picture(wide, (64, 64)), wide.crop((32, 0, 96, 64)))
    np.testing.assert_array_equal(fit_picture(tall, (64, 64)), tall.crop((0, 32, 64, 96)))
    mask = noise(129, 64).convert("L")
    np.testing.assert_array_equal(fit_mask(mask, (64, 64)), np.asarray(mask.crop((32, 0, 96, 64))) >= 128)


@pytest.mark.parametrize("size", [(256, 64), (64, 160), (97, 31), (640, 480)])
def test_a_crop_covers_and_keeps_proportions_as_pillow_does_it(size: tuple[int, int]) -> None:
    picture = noise(*size)
    centred = ImageOps.fit(picture, (32, 32), Image.Resampling.BICUBIC)
    left = Frame.of(size, (32, 32)).box[:2]
    assert all(abs(have - max(0, (side - min(size)) / 2)) < 1 for have, side in zip(left, size, strict=True))
    # Pillow's begins within the pixel before which ours does
    assert np.abs(array(fit_picture(picture, (32, 32))) - array(centred)).mean() < 40
    assert Frame.of(size, (32, 32)).place == (0, 0, 32, 32)


def test_a_circle_stays_round_unless_it_is_stretched() -> None:
    circle = Image.new("L", (128, 64))
    yy, xx = np.mgrid[:64, :128]
    circle = Image.fromarray(((yy - 31.5) ** 2 + (xx - 63.5) ** 2 < 20**2).astype(np.uint8) * 255)

    def extent(fit: Any) -> tuple[int, int]:
        selected = fit_mask(circle, (64, 64), fit)
        return int(selected.any(axis=1).sum()), int(selected.any(axis=0).sum())

    assert extent("crop") == (40, 40) and extent("pad") == (20, 20) and extent("stretch") == (40, 20)


def test_padding_repeats_the_edge_and_is_never_selected() -> None:
    picture = noise(128, 64)
    padded, frame = array(fit_picture(picture, (64, 64), "pad")), Frame.of((128, 64), (64, 64), "pad")
    assert frame.place == (0, 16, 64, 48) and frame.box == (0, 0, 128, 64)
    np.testing.assert_array_equal(padded[16:48], array(picture.resize((64, 32), Image.Resampling.BICUBIC)))
    assert (padded[:16] == padded[16]).all() and (padded[48:] == padded[47]).all()
    selected = fit_mask(Image.new("L", (128, 64), 255), (64, 64), "pad")
    assert selected[16:48].all() and not selected[:16].any() and not selected[48:].any()
    tall = Frame.of((64, 128), (64, 64), "pad")
    assert tall.place == (16, 0, 48, 64)
    assert (array(tall.picture(noise(64, 128)))[:, :16] == array(tall.picture(noise(64, 128)))[:, 16:17]).all()


@pytest.mark.parametrize("fit", FITS)
def test_a_mask_of_another_size_is_laid_over_its_picture(fit: Any) -> None:
    """A quarter of the picture is selected; the mask says so at the picture's size, at half of it, and as a square."""
    sizes = ((128, 64), (64, 32), (64, 64))
    fitted = []
    for width, height in sizes:
        mask = Image.new("L", (width, height))
        mask.paste(255, (width // 2, 0, width * 3 // 4, height))
        fitted.append(fit_mask(mask, (64, 64), fit, over=(128, 64)))
    assert fitted[0].any() and not fitted[0].all()
    for other in fitted[1:]:
        np.testing.assert_array_equal(other, fitted[0])


def test_transparency_is_flattened_before_the_picture_is_resized() -> None:
    """The other order would let the colour under transparent pixels bleed into their neighbours."""
    layer = noise(9, 5, channels=4)
    flat = Image.new("RGB", layer.size, "white")
    flat.paste(layer, mask=layer.getchannel("A"))
    expected = array(flat.resize((24, 16), Image.Resampling.BICUBIC))
    assert np.abs(array(fit_picture(layer, (16, 24), "stretch")) - expected).max() <= 2  # rounding of the blend


def test_masks_are_zeros_and_ones_by_brightness() -> None:
    grey = Image.fromarray(np.array([[0, 127], [128, 255]], np.uint8))
    expected = np.kron(np.array([[0, 0], [1, 1]], np.float32), np.ones((2, 3)))
    np.testing.assert_array_equal(fit_mask(grey, (4, 6), "stretch"), expected)
    assert fit_mask(grey, (4, 6), "stretch").dtype == np.float32


def test_there_is_no_other_way() -> None:
    with pytest.raises(ConfigError, match="'zoom'"):
        fit_picture(noise(3, 3), (4, 4), "zoom")  # type: ignore[arg-type]
