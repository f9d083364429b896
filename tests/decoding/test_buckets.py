"""Prompts of many lengths share few shapes."""

from typing import Any

import numpy as np
import pytest

from jaxmodels import decoding


@pytest.mark.parametrize(
    ("side", "ids", "mask"),
    [
        ("left", [[9, 9, 5, 6], [9, 7, 8, 4]], [[0, 0, 1, 1], [0, 1, 1, 1]]),
        ("right", [[5, 6, 9, 9], [7, 8, 4, 9]], [[1, 1, 0, 0], [1, 1, 1, 0]]),
    ],
)
def test_prompts_are_padded_on_the_side_asked_for(side: str, ids: Any, mask: Any) -> None:
    found = decoding.pad_to_bucket([[5, 6], [7, 8, 4]], (8, 4), pad_id=9, side=side)
    np.testing.assert_array_equal(found[0], ids)
    np.testing.assert_array_equal(found[1], mask)
    assert found[0].dtype == found[1].dtype == np.int32


@pytest.mark.parametrize(("length", "bucket"), [(1, 16), (16, 16), (17, 32), (8192, 8192)])
def test_the_smallest_bucket_that_fits_is_taken(length: int, bucket: int) -> None:
    assert decoding.pad_to_bucket([[3], [3] * length])[0].shape == (2, bucket)


@pytest.mark.parametrize(
    ("prompts", "options", "words"),
    [
        ([[1], [1, 2, 3]], {"buckets": (1, 2)}, "prompt 1 has 3 tokens, the largest bucket 2"),
        ([[1]], {"buckets": ()}, "largest bucket 0"),
        ([[1], []], {}, "prompt 1 is empty"),
        ([], {}, "at least one row"),
        ([[1]], {"side": "both"}, "pad on one of"),
    ],
)
def test_prompts_that_fit_no_bucket_are_refused(
    prompts: Any, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        decoding.pad_to_bucket(prompts, **options)
