"""Patches: a strided convolution, positions that resize as PyTorch's do, images that do not fit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodels.core import patches
from tests.vcc import small

IMAGES = jax.random.normal(jax.random.key(0), (2, 8, 8, 3))


def test_projection_is_a_convolution_with_stride_of_its_window() -> None:
    module = patches.PatchProjection(5, 4)
    params = small.drawn(module.init, IMAGES, size=0.3, spread=True)
    kernel, bias = params["params"]["kernel"], params["params"]["bias"]
    expected = jax.lax.conv_general_dilated(
        IMAGES, kernel, (4, 4), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    np.testing.assert_allclose(module.apply(params, IMAGES), expected + bias, atol=2e-5)


def test_class_token_stands_first_and_patches_follow_row_by_row() -> None:
    module = patches.PatchEmbeddings(8, 4, 5)
    params = small.drawn(module.init, IMAGES, size=0.3, spread=True)
    found = module.apply(params, IMAGES)
    own, table = params["params"], params["params"]["position"]["embedding"]
    np.testing.assert_allclose(found[:, 0], np.tile(own["class_token"] + table[0], (2, 1)))
    squares = module.apply(params, IMAGES, method="patches")
    np.testing.assert_allclose(found[:, 2], squares[:, 0, 1] + table[2], rtol=1e-6)
    np.testing.assert_allclose(found[:, 3], squares[:, 1, 0] + table[3], rtol=1e-6)


@pytest.mark.parametrize("grid", [(7, 3), (2, 9), (4, 4), (1, 1)])
def test_positions_resize_as_bicubic_in_pytorch(grid: tuple[int, int]) -> None:
    torch = pytest.importorskip("torch")
    table = np.random.default_rng(0).normal(size=(1 + 16, 6)).astype(np.float32)
    squares = torch.tensor(table[1:]).reshape(1, 4, 4, 6).permute(0, 3, 1, 2)
    resized = torch.nn.functional.interpolate(
        squares, size=grid, mode="bicubic", align_corners=False
    )
    expected = resized.permute(0, 2, 3, 1).reshape(-1, 6).numpy()
    found = patches.resized_positions(jnp.asarray(table), grid)
    np.testing.assert_allclose(found[1:], expected, atol=2e-6)
    np.testing.assert_array_equal(found[0], table[0])


def test_weights_of_positions_add_up_to_one_and_the_same_size_changes_nothing() -> None:
    np.testing.assert_allclose(patches.cubic_weights(5, 13).sum(1), 1, atol=1e-6)
    np.testing.assert_array_equal(patches.cubic_weights(5, 5), np.eye(5))


@pytest.mark.parametrize(
    ("shape", "any_size", "words"),
    [
        ((2, 3, 8, 8), False, r"\(2, 3, 8, 8\).*channels stand last"),
        ((8, 8, 3), True, r"\(8, 8, 3\): give \[batch, height, width, 3\]"),
        ((2, 8, 12, 3), False, "8 x 12 pixels, but the positions are for 8 x 8.*interpolate"),
        ((2, 8, 10, 3), True, "8 x 10 pixels do not divide into patches of 4 x 4"),
        ((2, 0, 8, 3), True, "0 x 8 pixels"),
    ],
)
def test_images_that_do_not_fit_are_refused(shape: tuple, any_size: bool, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        patches.check_images(shape, 8, 4, any_size)
