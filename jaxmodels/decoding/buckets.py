"""Prompts padded to few lengths, so that a new length does not compile a new program."""

from collections.abc import Sequence

import numpy as np

POWERS_OF_TWO = tuple(2**i for i in range(4, 14))  # 16 .. 8192
SIDES = ("left", "right")


def pad_to_bucket(
    prompts: Sequence[Sequence[int]],
    buckets: Sequence[int] = POWERS_OF_TWO,
    pad_id: int = 0,
    side: str = "left",
) -> tuple[np.ndarray, np.ndarray]:
    """Pads prompts to the smallest bucket that holds the longest of them.

    Args:
      prompts: one list of token ids a row, none empty.
      buckets: allowed lengths, in any order.
      pad_id: the token in the padding.
      side: "left" for prompts that a decoder continues, "right" for inputs of an encoder.

    Returns:
      ids [batch, bucket] int32 and their mask [batch, bucket] int32, 1 for tokens.

    Raises:
      ValueError: no prompt, an empty one, one longer than the largest bucket, or an unknown side.
    """
    if side not in SIDES:
        raise ValueError(f"side={side!r}: pad on one of {SIDES}.")
    lengths = [len(prompt) for prompt in prompts]
    if not lengths:
        raise ValueError("no prompts: give at least one row.")
    if min(lengths) == 0:
        raise ValueError(f"prompt {lengths.index(0)} is empty: give at least one token a row.")
    longest = max(lengths)
    fitting = [bucket for bucket in buckets if bucket >= longest]
    if not fitting:
        raise ValueError(
            f"prompt {lengths.index(longest)} has {longest} tokens, the largest bucket "
            f"{max(buckets, default=0)}: shorten it or add a bucket."
        )
    ids = np.full((len(lengths), min(fitting)), pad_id, np.int32)
    mask = np.zeros_like(ids)
    for row, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
        place = slice(ids.shape[1] - length, None) if side == "left" else slice(length)
        ids[row, place] = prompt
        mask[row, place] = 1
    return ids, mask
