"""Masking for masked-language models: BERT's 80/10/10 rule on a fixed number of tokens."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxmodels.data import tokenizer

IGNORED = -100  # label of a token that is not predicted


@dataclasses.dataclass(frozen=True)
class MaskTokens:
    """A transform for `pipeline`: hides tokens of a window, the model has to name them.

    Of the chosen tokens 80% become `<mask>`, 10% a random one, 10% stay. Special tokens and padding
    are never chosen. The number chosen is fixed, so that shapes are static; a window with fewer
    ordinary tokens has all of them chosen.

    Attributes:
      num_masked: tokens chosen in a window.
      vocab_size: random tokens are drawn from the ordinary ids below this.
    """

    num_masked: int
    vocab_size: int

    def __post_init__(self) -> None:
        """Raises ValueError for sizes that leave nothing to choose."""
        if self.num_masked < 1:
            raise ValueError(f"num_masked={self.num_masked}: at least 1 is needed")
        if self.vocab_size <= len(tokenizer.SPECIAL_TOKENS):
            raise ValueError(
                f"vocab_size={self.vocab_size}: more than the {len(tokenizer.SPECIAL_TOKENS)} "
                "special tokens are needed"
            )

    def __call__(
        self, record: Mapping[str, Any], rng: np.random.Generator
    ) -> dict[str, np.ndarray]:
        """Returns `input_ids`, `labels` (int32 `[length]`) and `attention_mask` (bool `[length]`).

        Args:
          record: `input_ids [length]` and `attention_mask [length]`, as `text_lines` windows have.
          rng: decides all draws.
        """
        original = np.asarray(record["input_ids"], np.int32)
        mask = np.asarray(record["attention_mask"], bool)
        first_ordinary = len(tokenizer.SPECIAL_TOKENS)
        ordinary = np.flatnonzero(mask & (original >= first_ordinary))
        chosen = rng.permutation(ordinary)[: self.num_masked]
        labels = np.full_like(original, IGNORED)
        labels[chosen] = original[chosen]
        action = rng.random(len(chosen))
        random_ids = rng.integers(first_ordinary, self.vocab_size, len(chosen))
        replaced = np.where(action < 0.9, random_ids, original[chosen])
        ids = original.copy()
        ids[chosen] = np.where(action < 0.8, tokenizer.MASK_ID, replaced)
        return {"input_ids": ids, "labels": labels, "attention_mask": mask}
