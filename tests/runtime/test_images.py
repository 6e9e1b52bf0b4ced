"""Pictures: hostile files are refused, and friendly ones arrive as the float original sees them."""

from __future__ import annotations

import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mtu_compile.core.errors import EXIT_INPUT, ConfigError, InputError, MtuError
from mtu_compile.runtime import images


def noise(width: int, height: int, channels: int = 3) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8))


def refused(path: Path | str, *words: str) -> None:
    with pytest.raises(InputError) as caught:
        images.open_image(path)
    assert caught.value.exit_code == EXIT_INPUT
    for word in words:
        assert word in caught.value.message


def png_of_size(width: int, height: int) -> bytes:
    """A PNG that says it is large, in a few bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def test_files_that_are_not_pictures(tmp_path: Path) -> None:
    refused(tmp_path / "none.png", "none.png", "does not exist")
    refused(tmp_path, "is not a file")
    (tmp_path / "text.png").write_text("hello")
    refused(tmp_path / "text.png", "text.png", "is not a picture")
    (tmp_path / "empty.png").write_bytes(b"")
    refused(tmp_path / "empty.png", "is not a picture")
    os.mkfifo(tmp_path / "pipe.png")  # opening it would hang
    refused(tmp_path / "pipe.png", "is not a file")
    (tmp_path / "post.png").write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n"
    )  # would start Ghostscript
    refused(tmp_path / "post.png", "is not a picture")


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".gif", ".bmp", ".tiff"])
def test_every_format_is_read_whole_and_refused_cut(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    noise(40, 30).save(path)
    assert images.open_image(path).size == (40, 30)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    refused(path, path.name)


def test_damaged_png(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    noise(40, 30).save(path)
    content = bytearray(path.read_bytes())
    content[60] ^= 0xFF
    path.write_bytes(content)
    refused(path, "cannot be read")


@pytest.mark.parametrize("size", [(9000, 9000), (30_000, 30_000), (2_000_000_000, 2_000_000_000)])
def test_decompression_bombs(tmp_path: Path, size: tuple[int, int]) -> None:
    (tmp_path / "bomb.png").write_bytes(png_of_size(*size))
    refused(tmp_path / "bomb.png", "bomb.png", "too large")


def test_masks_are_called_masks(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="mask"):
        images.open_mask(tmp_path / "m.png")


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    noise(40, 30).save(tmp_path / "a.jpg", exif=exif)
    assert images.open_image(tmp_path / "a.jpg").size == (30, 40)


def test_sixteen_bits_are_scaled(tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 4), 0x8000, np.uint16)).save(tmp_path / "a.png")
    opened = images.flatten(images.open_image(tmp_path / "a.png"))
    assert opened.getpixel((0, 0)) == (128, 128, 128)
    Image.fromarray(np.ones((4, 4), np.float32)).save(tmp_path / "f.tiff")
    refused(tmp_path / "f.tiff", "brightness")


def test_transparency_is_white() -> None:
    layer = Image.new("RGBA", (2, 1), (255, 0, 0, 0))
    layer.putpixel((1, 0), (0, 0, 0, 128))
    flat = images.flatten(layer)
    assert flat.getpixel((0, 0)) == (255, 255, 255)
    assert flat.getpixel((1, 0)) == (127, 127, 127)
    palette = Image.new("P", (1, 1), 0)
    palette.putpalette([255, 0, 0])
    palette.info["transparency"] = 0
    assert images.flatten(palette).getpixel((0, 0)) == (255, 255, 255)
    assert images.flatten(Image.new("LA", (1, 1), (0, 0))).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("latent", [(8, 12), (2, 3), (4, 4), (5, 7)])
def test_masks_shrink_as_torch_does_exactly(latent: tuple[int, int]) -> None:
    mask = (np.asarray(noise(24, 16).convert("L")) >= 128).astype(np.float32)
    expected = torch.nn.functional.interpolate(torch.from_numpy(mask)[None, None], latent, mode="nearest-exact")
    np.testing.assert_array_equal(images.shrink_mask(mask, latent), expected[0, 0].numpy())


def test_array_to_picture_and_back() -> None:
    picture = noise(7, 5)
    array = images.to_array(picture)
    np.testing.assert_allclose(array[0, :, 2, 3], np.array(picture.getpixel((3, 2))) / 127.5 - 1, atol=1e-6)
    np.testing.assert_array_equal(images.to_picture(array), picture)
    beyond = images.to_picture(np.array([-7.0, 0.0, 7.0], np.float32).reshape(1, 3, 1, 1))
    assert beyond.getpixel((0, 0)) == (0, 128, 255)


def test_paste_takes_each_pixel_from_one_side() -> None:
    above, below = noise(4, 2), Image.new("RGB", (4, 2), "red")
    mask = np.zeros((2, 4), np.float32)
    mask[0, 1] = 1
    pasted = images.paste(above, below, mask)
    assert pasted.getpixel((1, 0)) == above.getpixel((1, 0))
    assert pasted.getpixel((0, 0)) == (255, 0, 0)


def test_save_is_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a.png", "a.jpg", "a.webp"):
        images.save(noise(8, 8), tmp_path / name)
        assert images.open_image(tmp_path / name).size == (8, 8)
    before = sorted(tmp_path.iterdir())

    def full(self: Image.Image, path: Path, **options: object) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(MtuError, match="No space left"):
        images.save(noise(8, 8), tmp_path / "b.png")
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("name", ["a", "a.txt", "a.gif", "nowhere/a.png", "folder.png"])
def test_places_a_picture_cannot_be_saved(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(ConfigError):
        images.check_writable(tmp_path / name)
