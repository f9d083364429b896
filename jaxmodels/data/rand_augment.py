"""RandAugment2: two random operations an image, with which CLIP's prompts are pre-trained.

    rng = np.random.default_rng([seed, index])
    image = rand_augment.rand_augment(image, rng)

Every operation is a pure function of an RGB Pillow image and a value. All randomness is in
`draw_operations`, which looks at no image. What an operation moves in from outside is black.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jaxmodels.data import extras

NUM_OPERATIONS = 2
# The original skips each drawn operation with probability 0.4.
PROBABILITY = 0.6
_PURPOSE = "RandAugment"


@dataclasses.dataclass(frozen=True)
class Operation:
    """One kind of augmentation.

    Attributes:
      function: (RGB Pillow image, value) -> RGB Pillow image of the same size.
      low, high: range of the value.
      signed: the sign of a drawn value is flipped at random.
    """

    function: Callable[[Any, float], Any]
    low: float
    high: float
    signed: bool = False


def auto_contrast(image: Any, value: float = 0.0) -> Any:
    """Stretches each channel to 0...255; `value` is not used."""
    return _ops().autocontrast(image)


def brightness(image: Any, value: float) -> Any:
    """Blends with black: 0 is black, 1 the image, more is brighter."""
    return _enhance().Brightness(image).enhance(value)


def color(image: Any, value: float) -> Any:
    """Blends with the grayscale image: 0 is gray, 1 the image, more is more colourful."""
    return _enhance().Color(image).enhance(value)


def contrast(image: Any, value: float) -> Any:
    """Blends with the mean gray: 0 is uniform, 1 the image, more has more contrast."""
    return _enhance().Contrast(image).enhance(value)


def equalize(image: Any, value: float = 0.0) -> Any:
    """Makes the histogram of each channel flat; `value` is not used."""
    return _ops().equalize(image)


def identity(image: Any, value: float = 0.0) -> Any:
    """Returns the image; `value` is not used."""
    return image


def invert(image: Any, value: float = 0.0) -> Any:
    """Returns the negative; `value` is not used."""
    return _ops().invert(image)


def posterize(image: Any, value: float) -> Any:
    """Keeps the `int(value)` highest bits of each channel."""
    return _ops().posterize(image, int(value))


def rotate(image: Any, value: float) -> Any:
    """Rotates by `value` degrees counter-clockwise about the centre, nearest neighbour."""
    return image.rotate(value)


def sharpness(image: Any, value: float) -> Any:
    """Blends with the smoothed image: 0 is smooth, 1 the image, more is sharper."""
    return _enhance().Sharpness(image).enhance(value)


def shear_x(image: Any, value: float) -> Any:
    """Shifts each row to the left by `value` times its number."""
    return _affine(image, (1, value, 0, 0, 1, 0))


def shear_y(image: Any, value: float) -> Any:
    """Shifts each column up by `value` times its number."""
    return _affine(image, (1, 0, 0, value, 1, 0))


def solarize(image: Any, value: float) -> Any:
    """Inverts what is `value` or brighter."""
    return _ops().solarize(image, value)


def translate_x(image: Any, value: float) -> Any:
    """Shifts to the left by `value` times the width."""
    return _affine(image, (1, 0, value * image.width, 0, 1, 0))


def translate_y(image: Any, value: float) -> Any:
    """Shifts up by `value` times the height."""
    return _affine(image, (1, 0, 0, 0, 1, value * image.height))


OPERATIONS = {
    "AutoContrast": Operation(auto_contrast, 0.0, 1.0),
    "Brightness": Operation(brightness, 0.1, 1.9),
    "Color": Operation(color, 0.1, 1.9),
    "Contrast": Operation(contrast, 0.1, 1.9),
    "Equalize": Operation(equalize, 0.0, 1.0),
    "Identity": Operation(identity, 0.0, 1.0),
    "Invert": Operation(invert, 0.0, 1.0),
    "Posterize": Operation(posterize, 4, 8),
    "Rotate": Operation(rotate, -30.0, 30.0, signed=True),
    "Sharpness": Operation(sharpness, 0.1, 1.9),
    "ShearX": Operation(shear_x, -0.3, 0.3, signed=True),
    "ShearY": Operation(shear_y, -0.3, 0.3, signed=True),
    "Solarize": Operation(solarize, 0.0, 256.0),
    "TranslateX": Operation(translate_x, -0.3, 0.3, signed=True),
    "TranslateY": Operation(translate_y, -0.3, 0.3, signed=True),
}


def apply_operation(image: Any, name: str, value: float) -> Any:
    """Returns the image after one operation of `OPERATIONS`.

    Args:
      image: an RGB Pillow image.
      name: of the operation.
      value: its strength, in the operation's range.

    Raises:
      ValueError: unknown operation, a value outside its range, or no RGB Pillow image.
      ImportError: Pillow is not installed.
    """
    module = extras.needed("PIL.Image", _PURPOSE)
    if not isinstance(image, module.Image) or image.mode != "RGB":
        found = getattr(image, "mode", None) or type(image).__name__
        raise ValueError(f"an RGB Pillow image is needed, not {found}: use clip_images.to_rgb")
    if name not in OPERATIONS:
        raise ValueError(f"unknown operation {name!r}: known are {', '.join(OPERATIONS)}")
    operation = OPERATIONS[name]
    if not operation.low <= value <= operation.high:
        raise ValueError(
            f"{name} with value {value}: {operation.low} to {operation.high} is accepted"
        )
    return operation.function(image, value)


def draw_operations(
    rng: np.random.Generator,
    num_operations: int = NUM_OPERATIONS,
    probability: float = PROBABILITY,
) -> list[tuple[str, float]]:
    """Draws the operations of one image, as (name, value) in the order in which they are applied.

    Operations are drawn with replacement, each is kept with `probability`, and its value is uniform
    in its range. The generator advances by as much whatever is drawn.

    Raises:
      ValueError: `num_operations` is negative, or `probability` outside 0...1.
    """
    if num_operations < 0 or not 0 <= probability <= 1:
        raise ValueError(
            f"num_operations={num_operations}, probability={probability}: give 0 or more "
            "operations and a probability of 0 to 1"
        )
    names = rng.integers(len(OPERATIONS), size=num_operations)
    kept, strengths, signs = rng.random((3, num_operations))
    drawn = []
    for place in np.flatnonzero(kept < probability):
        name = tuple(OPERATIONS)[names[place]]
        operation = OPERATIONS[name]
        value = operation.low + float(strengths[place]) * (operation.high - operation.low)
        drawn.append((name, -value if operation.signed and signs[place] < 0.5 else value))
    return drawn


def rand_augment(
    image: Any,
    rng: np.random.Generator,
    num_operations: int = NUM_OPERATIONS,
    probability: float = PROBABILITY,
) -> Any:
    """Returns an RGB Pillow image after randomly drawn operations; see `draw_operations`.

    Raises:
      ValueError: no RGB Pillow image, or settings that `draw_operations` refuses.
      ImportError: Pillow is not installed.
    """
    drawn: Sequence[tuple[str, float]] = draw_operations(rng, num_operations, probability)
    # Identity too, so that a wrong image is told at once and not when an operation is drawn.
    for name, value in [("Identity", 0.0), *drawn]:
        image = apply_operation(image, name, value)
    return image


def _affine(image: Any, coefficients: tuple[float, ...]) -> Any:
    """Takes each pixel (x, y) from (ax + by + c, dx + ey + f), nearest neighbour."""
    affine = extras.needed("PIL.Image", _PURPOSE).Transform.AFFINE
    return image.transform(image.size, affine, coefficients)


def _ops() -> Any:
    return extras.needed("PIL.ImageOps", _PURPOSE)


def _enhance() -> Any:
    return extras.needed("PIL.ImageEnhance", _PURPOSE)
