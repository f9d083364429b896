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
"""

from typing import Any

import jax
from flax import struct


@struct.dataclass
class Prepared:
    """The parameters as steps read them; held beside the others while tokens are generated.

    Attributes:
      layer_params: the decoder's layers by themselves, see `core.stack.Stack.unstacked`: no step
        copies a layer out of the stack.
      head_kernel: [d_model, vocab], in the type of the products. A tied table is turned round
        once: read by rows at every step it costs several times as much.
    """

    layer_params: tuple[Any, ...]
    head_kernel: jax.Array


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
