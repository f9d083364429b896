"""What a model that generates offers to `jaxmodels.decoding`, which knows no model.

A generating module has three methods:

    prepare() -> Prepared
    start(input_ids, attention_mask, max_new_tokens=..., prepared=..., **inputs) -> Started
    step(tokens, cache, fixed) -> (logits, cache)

`prepare` lays out the parameters as steps read them, once for the same parameters; `start` does so
itself where it is not given any. `start` runs what comes before the first new token: the encoder
and the decoder's start token, or the whole prompt of a decoder-only model. `step` runs one token a
row: tokens [N] int32, logits [N, vocab] float32. N is the batch, or batch x beams with the beams of
an example side by side.

A class whose `start` continues the ids themselves, and so wants them padded on the left, says so by
`left_padded = True`.
"""

from typing import Any

import jax
import numpy as np
from flax import struct

from jaxmodels.core import layers


@struct.dataclass
class Prepared:
    """The parameters as steps read them; held beside the others while tokens are generated.

    Attributes:
      layer_params: the decoder's layers by themselves, see `core.stack.Stack.unstacked`: no step
        copies a layer out of the stack.
      head_kernel: [d_model, vocab], in the type of the products, by `layers.for_few_rows`.
    """

    layer_params: tuple[Any, ...]
    head_kernel: jax.Array | layers.Turned


@struct.dataclass
class Started:
    """All that the first choice of a token needs, and the steps after it.

    Attributes:
      prompt: [B, P] int32, tokens in front of the first new one (encoder-decoder: the start token).
      prompt_mask: [B, P], 1 on real tokens, or None: all real.
      logits: [B, vocab] float32, for the first new token.
      cache: what grows: leaves of rank 0 count for all rows, others have the rows on axis 0, so
        that beams can be put in another order.
      fixed: what stays: the keys and values of the encoder output, masks (of the B examples,
        whatever the number of beams), what `prepare` made.
    """

    prompt: jax.Array
    prompt_mask: jax.Array | None
    logits: jax.Array
    cache: Any
    fixed: Any = None


def check_left_padded(mask: Any, length: int, name: str = "attention_mask") -> None:
    """Refuses a mask [batch, >= length] whose prompts have padding behind or between their tokens.

    The last `length` places are the prompt's; soft prompts may stand in front of its padding.
    Looks at values: a mask that is being traced, or is spread over processes, passes. A row without
    any token passes too: it fills a batch.

    Raises:
      ValueError: names the first such row.
    """
    if np.ndim(mask) != 2 or isinstance(mask, (jax.core.Tracer, jax.ShapeDtypeStruct)):
        return  # none, of another shape (told by others), or without values
    if isinstance(mask, jax.Array) and not mask.is_fully_addressable:
        return
    real = np.asarray(jax.device_get(mask))[:, -length:] != 0
    wrong = np.flatnonzero((real[:, :-1] & ~real[:, 1:]).any(axis=1))
    if wrong.size:
        raise ValueError(
            f"{name}: row {wrong[0]} is {real[wrong[0]].astype(int).tolist()}, with padding behind "
            "or between its tokens; new tokens follow the last place, so all padding must be in "
            "front: pad on the left, as decoding.pad_to_bucket does."
        )
