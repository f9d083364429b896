"""CLIP's image preprocessing: sizes, crops, numbers and modes."""

import sys
from typing import Any

import numpy as np
import pytest
from PIL import Image

from jaxmodels.data import clip_images
from jaxmodels.data.clip_images import (
    center_crop,
    evaluation_transform,
    normalize,
    resize_shorter_side,
    to_rgb,
)


def noise(height: int, width: int, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), np.uint8)


@pytest.mark.parametrize(
    ("width", "height", "wanted"),
    [(40, 57, (32, 45)), (91, 33, (88, 32)), (10, 10, (32, 32)), (32, 99, (32, 99))],
)
def test_the_longer_side_is_rounded_down(width: int, height: int, wanted: tuple) -> None:
    assert resize_shorter_side(Image.new("RGB", (width, height)), 32).size == wanted


def test_the_crop_is_central_and_halves_are_rounded_to_even() -> None:
    pixels = np.arange(7 * 4, dtype=np.uint8).reshape(7, 4)
    # 7 - 4 = 3 rows too many: the crop starts at round(1.5) = 2.
    cropped = np.asarray(center_crop(Image.fromarray(pixels), 4))
    np.testing.assert_array_equal(cropped, pixels[2:6])
    # One too many: at round(0.5) = 0.
    np.testing.assert_array_equal(
        np.asarray(center_crop(Image.fromarray(pixels[:5]), 4))[0], pixels[0]
    )


def test_an_image_of_the_right_size_is_only_scaled() -> None:
    pixels = noise(8, 8)
    found = evaluation_transform(pixels, 8)
    assert found.dtype == np.float32 and found.shape == (8, 8, 3)
    wanted = (pixels / 255 - np.array(clip_images.MEAN)) / np.array(clip_images.STD)
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


def test_a_uniform_image_stays_uniform_and_a_shrunk_one_is_averaged() -> None:
    uniform = evaluation_transform(np.full((50, 30, 3), 200, np.uint8), 16, (0, 0, 0), (1, 1, 1))
    np.testing.assert_allclose(uniform, 200 / 255, rtol=1e-6)
    board = np.indices((64, 64)).sum(0) % 2 * 255
    shrunk = evaluation_transform(board.astype(np.uint8), 8, (0, 0, 0), (1, 1, 1))
    # Without antialiasing a checkerboard would give black or white.
    np.testing.assert_allclose(shrunk[1:-1, 1:-1], 0.5, atol=0.01)


@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "La", "P", "RGBA", "RGBa", "CMYK", "YCbCr", "HSV"]
)
def test_every_mode_of_eight_bits_becomes_rgb(mode: str) -> None:
    image = Image.new("RGB", (3, 2), (255, 255, 255))
    for step in {"La": ("LA", "La"), "RGBa": ("RGBA", "RGBa")}.get(mode, (mode,)):
        image = image.convert(step)
    found = to_rgb(image)
    assert found.mode == "RGB" and found.size == (3, 2)
    assert np.asarray(found).min() >= 254


def test_colours_of_a_palette_are_not_its_indices() -> None:
    pixels = np.zeros((4, 4, 3), np.uint8)
    pixels[:2] = (10, 200, 30)
    palette = Image.fromarray(pixels).convert("P", palette=Image.Palette.ADAPTIVE)
    np.testing.assert_array_equal(np.asarray(to_rgb(palette)), pixels)


def test_sixteen_bits_are_scaled_not_cut() -> None:
    image = Image.fromarray(np.array([[0, 256 * 100, 65535]], np.uint16))
    assert image.mode == "I;16"
    np.testing.assert_array_equal(np.asarray(to_rgb(image))[0, :, 0], [0, 100, 255])


def test_arrays_of_one_and_four_channels_are_images_too() -> None:
    gray, alpha = noise(5, 6, 1), noise(5, 6, 4)
    np.testing.assert_array_equal(np.asarray(to_rgb(gray)), np.repeat(gray, 3, axis=-1))
    np.testing.assert_array_equal(np.asarray(to_rgb(gray[..., 0])), np.repeat(gray, 3, axis=-1))
    np.testing.assert_array_equal(np.asarray(to_rgb(alpha)), alpha[..., :3])
    np.testing.assert_array_equal(np.asarray(to_rgb(alpha[:, ::-1])), alpha[:, ::-1, :3])


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (Image.new("RGB", (0, 5)), "no pixels: 0 x 5"),
        (np.zeros((5, 0, 3), np.uint8), "no pixels: 0 x 5"),
        (np.zeros((5, 5, 2), np.uint8), r"uint8 and shape \[5, 5, 2\] is no image"),
        (np.zeros((3, 5, 5), np.uint8), r"shape \[3, 5, 5\] is no image"),
        (np.zeros((5, 5, 3), np.float32), "float32 .* is no image"),
        (np.zeros(5, np.uint8), r"shape \[5\] is no image"),
        (Image.new("F", (2, 2)), "mode F .* scale it to 8 bits"),
        (Image.new("I", (2, 2)), "mode I "),
        ("dog.jpg", "an image is needed, this is a str"),
        (None, "an image is needed, this is a NoneType"),
    ],
)
def test_what_is_no_image_is_refused(image: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evaluation_transform(image, 4)


def test_a_sliver_that_would_fill_the_memory_is_refused() -> None:
    with pytest.raises(ValueError, match="1 x 60000 would be 224 x 13440000"):
        evaluation_transform(Image.new("RGB", (1, 60_000)), 224)


def test_settings_that_make_no_sense_are_refused() -> None:
    image = noise(4, 4)
    with pytest.raises(ValueError, match="size=0"):
        evaluation_transform(image, 0)
    with pytest.raises(ValueError, match="three numbers each"):
        evaluation_transform(image, 4, mean=(0.5, 0.5))
    with pytest.raises(ValueError, match="those of std positive"):
        evaluation_transform(image, 4, std=(1.0, 0.0, 1.0))
    with pytest.raises(ValueError, match="float64 and shape"):
        normalize(np.zeros((2, 2, 3)))
    with pytest.raises(ValueError, match="4 x 3 has no crop of 4 x 4"):
        center_crop(Image.new("RGB", (4, 3)), 4)


def test_without_pillow_the_command_that_installs_it_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(ImportError, match=r"pillow.*pip install 'jaxmodels\[data\]'"):
        evaluation_transform(noise(4, 4), 4)
