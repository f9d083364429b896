"""RandAugment2: what each operation does, and what is drawn."""

import collections
from typing import Any

import numpy as np
import pytest
from PIL import Image

from jaxmodels.data.rand_augment import (
    OPERATIONS,
    apply_operation,
    draw_operations,
    rand_augment,
)

GEOMETRIC = ("Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY")


def picture() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (10, 20, 3), np.uint8)


def applied(name: str, value: float, pixels: np.ndarray | None = None) -> np.ndarray:
    image = Image.fromarray(picture() if pixels is None else pixels)
    return np.asarray(apply_operation(image, name, value)).astype(int)


NEUTRAL = [
    *(("Identity", 0.5), ("Posterize", 8), ("Solarize", 256.0)),
    *((name, 1.0) for name in ("Brightness", "Color", "Contrast", "Sharpness")),
    *((name, 0.0) for name in GEOMETRIC),
]


@pytest.mark.parametrize(("name", "value"), NEUTRAL)
def test_an_operation_without_strength_changes_nothing(name: str, value: float) -> None:
    np.testing.assert_array_equal(applied(name, value), picture())


def test_operations_on_grey_levels_do_what_they_say() -> None:
    pixels = picture().astype(int)
    np.testing.assert_array_equal(applied("Invert", 0.3), 255 - pixels)
    np.testing.assert_array_equal(applied("Posterize", 4.9), pixels & 0xF0)
    wanted = np.where(pixels < 100, pixels, 255 - pixels)
    np.testing.assert_array_equal(applied("Solarize", 100.0), wanted)
    np.testing.assert_allclose(applied("Brightness", 0.5), pixels / 2, atol=1)
    gray = pixels @ [0.299, 0.587, 0.114]
    blended = np.clip(0.5 * pixels + 0.5 * gray[..., None], 0, 255)
    np.testing.assert_allclose(applied("Color", 0.5), blended, atol=1.01)
    np.testing.assert_allclose(applied("Contrast", 0.5), 0.5 * (pixels + gray.mean()), atol=1.01)


def test_contrast_and_histogram_are_stretched_to_the_whole_range() -> None:
    # Pillow leaves the histogram of a small image as it is.
    dull = np.tile((100 + picture() // 8).astype(np.uint8), (10, 10, 1))
    for name in ("AutoContrast", "Equalize"):
        found = applied(name, 0.5, dull)
        assert found.min() == 0 and found.max() == 255, name


def test_sharpness_is_away_from_or_towards_the_smoothed_image() -> None:
    pixels = picture()
    spread = [applied("Sharpness", value, pixels)[1:-1, 1:-1].std() for value in (0.1, 1.0, 1.9)]
    assert spread[0] < spread[1] < spread[2]


def test_geometric_operations_move_pixels_and_fill_with_black() -> None:
    pixels = picture()
    moved = applied("TranslateX", 0.25)  # 5 of 20 columns to the left
    np.testing.assert_array_equal(moved[:, :15], pixels[:, 5:])
    assert not moved[:, 15:].any()
    moved = applied("TranslateY", -0.2)  # 2 of 10 rows down
    np.testing.assert_array_equal(moved[2:], pixels[:-2])
    assert not moved[:2].any()
    sheared = applied("ShearX", 0.25)
    for row in (1, 5, 9):  # a pixel is taken from where its centre lies
        shift = int(0.5 + 0.25 * (row + 0.5))
        np.testing.assert_array_equal(sheared[row, : 20 - shift], pixels[row, shift:])
    upright = np.asarray(Image.fromarray(pixels).transpose(Image.Transpose.TRANSPOSE))
    flipped = np.asarray(applied("ShearY", 0.25, upright)).swapaxes(0, 1)
    np.testing.assert_array_equal(flipped, sheared)


def test_rotation_is_counter_clockwise() -> None:
    pixels = np.zeros((21, 21, 3), np.uint8)
    pixels[10, 18] = 255  # to the right of the centre
    row, column = np.argwhere(applied("Rotate", 30.0, pixels)[..., 0])[0]
    assert row < 10 and column > 10  # now up


def test_there_are_fifteen_operations_and_only_geometric_ones_flip_their_sign() -> None:
    assert len(OPERATIONS) == 15
    assert {name for name, one in OPERATIONS.items() if one.signed} == set(GEOMETRIC)


@pytest.mark.parametrize(
    ("image", "name", "value", "message"),
    [
        (Image.new("RGB", (2, 2)), "Blur", 0.5, "unknown operation 'Blur'.*AutoContrast"),
        (Image.new("RGB", (2, 2)), "Rotate", 31.0, "Rotate with value 31.0: -30.0 to 30.0"),
        (Image.new("RGB", (2, 2)), "Posterize", 3, "Posterize with value 3: 4 to 8"),
        (Image.new("RGB", (2, 2)), "ShearX", float("nan"), "ShearX with value nan"),
        (Image.new("L", (2, 2)), "Invert", 0.5, "an RGB Pillow image is needed, not L"),
        (picture(), "Invert", 0.5, "an RGB Pillow image is needed, not ndarray"),
    ],
)
def test_bad_calls_are_refused(image: Any, name: str, value: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        apply_operation(image, name, value)


def test_a_wrong_image_is_refused_even_if_no_operation_is_drawn() -> None:
    with pytest.raises(ValueError, match="an RGB Pillow image is needed"):
        rand_augment(picture(), np.random.default_rng(0), probability=0.0)


@pytest.mark.parametrize("settings", [(-1, 0.5), (2, 1.5), (2, -0.1), (2, float("nan"))])
def test_settings_that_make_no_sense_are_refused(settings: tuple[int, float]) -> None:
    with pytest.raises(ValueError, match="num_operations="):
        draw_operations(np.random.default_rng(0), *settings)


def test_what_is_drawn_has_the_original_distribution() -> None:
    rng = np.random.default_rng(0)
    draws = [draw_operations(rng) for _ in range(20_000)]
    lengths = np.bincount([len(drawn) for drawn in draws], minlength=3) / len(draws)
    # Each of two is kept with 0.6; the standard error is below 0.0036.
    np.testing.assert_allclose(lengths, [0.16, 0.48, 0.36], atol=0.015)
    values = collections.defaultdict(list)
    for name, value in (pair for drawn in draws for pair in drawn):
        values[name].append(value)
    assert set(values) == set(OPERATIONS)
    for name, drawn in values.items():
        operation, found = OPERATIONS[name], np.array(drawn)
        assert len(found) == pytest.approx(24_000 / 15, rel=0.15), name
        width = operation.high - operation.low
        assert operation.low <= found.min() < operation.low + 0.02 * width, name
        assert operation.high >= found.max() > operation.high - 0.02 * width, name
        assert found.mean() == pytest.approx((operation.low + operation.high) / 2, abs=0.05 * width)
    repeated = [drawn for drawn in draws if len(drawn) == 2 and drawn[0][0] == drawn[1][0]]
    assert len(repeated) == pytest.approx(0.36 * 20_000 / 15, rel=0.2)  # with replacement


def test_the_same_generator_gives_the_same_image_and_another_another() -> None:
    image = Image.fromarray(picture())
    before = image.tobytes()
    found = [
        rand_augment(image, np.random.default_rng([7, number]), 4, 1.0).tobytes()
        for number in (0, 0, 1)
    ]
    assert found[0] == found[1] != found[2]
    assert image.tobytes() == before


def test_the_generator_advances_by_as_much_whatever_is_drawn() -> None:
    states = set()
    for probability in (0.0, 0.5, 1.0):
        rng = np.random.default_rng(3)
        draw_operations(rng, 2, probability)
        states.add(rng.random())
    assert len(states) == 1
