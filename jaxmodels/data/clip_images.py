"""CLIP's image preprocessing: published CLIP weights expect pixels resized and scaled in this way.

    image = PIL.Image.open("dog.jpg")
    pixels = clip_images.evaluation_transform(image, size=224)  # float32 [224, 224, 3]

Resizing is Pillow's bicubic filter with antialiasing, which other libraries do not reproduce.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxmodels.data import extras

# Mean and standard deviation of the channels of CLIP's training images, in units of 0 to 1.
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
# Pixels of a resized image before it is cropped: bounds the memory that a sliver of an image takes.
_MOST_PIXELS = 2**26
_SIXTEEN_BITS = ("I;16", "I;16L", "I;16B", "I;16N")
_PURPOSE = "image preprocessing"


def to_rgb(image: Any) -> Any:
    """Returns a Pillow image of mode RGB.

    Grayscale (8 and 16 bits), palette and CMYK are converted and alpha is dropped: what is
    transparent shows the colour stored under it. Orientation tags of cameras are not applied, as in
    the original.

    Args:
      image: a Pillow image of any mode, or uint8 [height, width], [height, width, 1, 3 or 4].

    Raises:
      ValueError: the image has no pixels, or neither a mode nor a shape and dtype given above.
      ImportError: Pillow is not installed.
    """
    module = extras.needed("PIL.Image", _PURPOSE)
    if isinstance(image, np.ndarray):
        image = _from_array(image, module)
    if not isinstance(image, module.Image):
        raise ValueError(
            f"an image is needed, this is a {type(image).__name__}: give a Pillow image or a uint8 "
            "array [height, width, channels]"
        )
    if not all(image.size):
        raise ValueError(f"the image has no pixels: {image.width} x {image.height}")
    if image.mode in _SIXTEEN_BITS:  # Pillow would cut at 255 instead of scaling
        image = module.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise ValueError(
            f"an image of mode {image.mode} (32 bits a pixel) has no known range: scale it to 8 "
            "bits first"
        )
    elif image.mode in ("RGBa", "La"):  # colours multiplied with alpha: undo that first
        image = image.convert("RGBA" if image.mode == "RGBa" else "LA")
    return image if image.mode == "RGB" else image.convert("RGB")


def resize_shorter_side(image: Any, size: int) -> Any:
    """Returns the RGB Pillow image with its shorter side resized to `size`, proportions kept.

    The longer side becomes `int(size * longer / shorter)`; bicubic, with antialiasing.

    Raises:
      ValueError: `size` is not positive, or the result would be huge.
    """
    if size < 1:
        raise ValueError(f"size={size}: give 1 or more")
    width, height = image.size
    shorter, longer = min(width, height), max(width, height)
    long_size = int(size * longer / shorter)
    if size * long_size > _MOST_PIXELS:
        raise ValueError(
            f"an image of {width} x {height} would be {size} x {long_size} when its shorter side "
            f"is resized to {size}, more than {_MOST_PIXELS} pixels: cut it first"
        )
    if shorter == size:
        return image
    wanted = (size, long_size) if width <= height else (long_size, size)
    return image.resize(wanted, extras.needed("PIL.Image", _PURPOSE).Resampling.BICUBIC)


def center_crop(image: Any, size: int) -> Any:
    """Returns the central `size` x `size` pixels of a Pillow image.

    Raises:
      ValueError: the image is smaller.
    """
    width, height = image.size
    if min(width, height) < size:
        raise ValueError(f"an image of {width} x {height} has no crop of {size} x {size}")
    left, top = round((width - size) / 2), round((height - size) / 2)
    return image.crop((left, top, left + size, top + size))


def normalize(pixels: Any, mean: Sequence[float] = MEAN, std: Sequence[float] = STD) -> np.ndarray:
    """Returns `(pixels / 255 - mean) / std` as float32 [..., 3].

    Args:
      pixels: uint8 [..., 3], or an RGB Pillow image.
      mean, std: of the channels, in units of 0 to 1.

    Raises:
      ValueError: `pixels` has another dtype or shape, or `mean` or `std` not three numbers.
    """
    pixels = np.asarray(pixels)
    if pixels.dtype != np.uint8 or pixels.shape[-1:] != (3,):
        raise ValueError(
            f"pixels of {pixels.dtype} and shape {list(pixels.shape)}: uint8 [..., 3] is accepted"
        )
    mean, std = np.asarray(mean, np.float32), np.asarray(std, np.float32)
    if mean.shape != (3,) or std.shape != (3,) or not (std > 0).all():
        raise ValueError(
            f"mean={mean.tolist()} and std={std.tolist()}: three numbers each are accepted, "
            "those of std positive"
        )
    return (pixels.astype(np.float32) / np.float32(255) - mean) / std


def evaluation_transform(
    image: Any, size: int, mean: Sequence[float] = MEAN, std: Sequence[float] = STD
) -> np.ndarray:
    """Returns an image as CLIP's image tower takes it, without augmentation.

    RGB, shorter side resized to `size`, centre cropped, scaled and normalised.

    Args:
      image: see `to_rgb`.
      size: of the image tower, such as 224.
      mean, std: see `normalize`.

    Returns:
      float32 [size, size, 3].

    Raises:
      ValueError: see `to_rgb`, `resize_shorter_side` and `normalize`.
      ImportError: Pillow is not installed.
    """
    image = center_crop(resize_shorter_side(to_rgb(image), size), size)
    return normalize(image, mean, std)


def _from_array(pixels: np.ndarray, module: Any) -> Any:
    if pixels.ndim == 3 and pixels.shape[-1] == 1:
        pixels = pixels[..., 0]
    if pixels.dtype != np.uint8 or not (
        pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[-1] in (3, 4))
    ):
        raise ValueError(
            f"an array of {pixels.dtype} and shape {list(pixels.shape)} is no image: uint8 "
            "[height, width] or [height, width, 1, 3 or 4] is accepted"
        )
    if not pixels.size:
        raise ValueError(f"the image has no pixels: {pixels.shape[1]} x {pixels.shape[0]}")
    return module.fromarray(np.ascontiguousarray(pixels))
