"""BERT's masking: 15 % of the tokens, of which 80 % become <mask>, 10 % another, 10 % stay."""

import dataclasses
import math
from typing import Any

import numpy as np

from jaxmodels.core.losses import IGNORE
from jaxmodels.data import cache_folder
from jaxmodels.data.tokenizer import CLS_ID, MASK_ID, PAD_ID, SEP_ID, SPECIAL_TOKENS, load


@dataclasses.dataclass(frozen=True)
class MaskedExample:
    """The random transform of a window of tokens into an example; travels to workers.

    Attributes:
      vocab_size: of the tokenizer; random tokens come from it.
      length: tokens of a window.
      rate: share of the real tokens that are predicted.
      mask_id: id of <mask>.
    """

    vocab_size: int
    length: int
    rate: float = 0.15
    mask_id: int = MASK_ID

    @property
    def num_masked(self) -> int:
        """Places for predicted tokens; shorter windows leave some empty."""
        return max(1, math.ceil(self.rate * self.length))

    @property
    def fingerprint(self) -> dict[str, object]:
        """What decides the examples, as JSON values."""
        return dataclasses.asdict(self)

    def __call__(
        self, record: dict[str, np.ndarray], rng: np.random.Generator
    ) -> dict[str, np.ndarray]:
        """Returns `input_ids`, `attention_mask` [L], `masked_positions`, `masked_labels` [M].

        Args:
          record: `input_ids` and `attention_mask` [L].
          rng: decides the masks.
        """
        ids = np.array(record["input_ids"], np.int32)
        special = len(SPECIAL_TOKENS)
        real = np.flatnonzero(record["attention_mask"] & (ids >= special))
        count = min(self.num_masked, max(1, round(self.rate * len(real))), len(real))
        chosen = np.sort(rng.choice(real, count, replace=False))
        positions = np.zeros(self.num_masked, np.int32)
        labels = np.full(self.num_masked, IGNORE, np.int32)
        positions[:count], labels[:count] = chosen, ids[chosen]
        draw = rng.random(count)
        ids[chosen[draw < 0.8]] = self.mask_id
        other = chosen[draw >= 0.9]
        ids[other] = rng.integers(special, self.vocab_size, len(other))
        return {
            "input_ids": ids,
            "attention_mask": np.asarray(record["attention_mask"], np.int32),
            "masked_positions": positions,
            "masked_labels": labels,
        }


class DocumentExample:
    """A document of text into an example: a random window of it, masked; travels to workers."""

    def __init__(self, tokenizer_path: str, masked: MaskedExample):
        """Keeps the settings; the tokenizer is opened on first use, in the worker itself."""
        self.tokenizer_path, self.masked = tokenizer_path, masked
        self._bpe: Any = None

    @property
    def fingerprint(self) -> dict[str, object]:
        """What decides the examples, as JSON values."""
        return self.masked.fingerprint | {
            "tokenizer_sha256": cache_folder.sha256(self.tokenizer_path)
        }

    def __getstate__(self) -> dict[str, Any]:
        """Leaves the opened tokenizer behind."""
        return self.__dict__ | {"_bpe": None}

    def __call__(self, record: dict[str, Any], rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Returns the arrays of `MaskedExample`.

        Args:
          record: has `text`, str or UTF-8 bytes.
          rng: decides the window and the masks.
        """
        if self._bpe is None:
            self._bpe = load(self.tokenizer_path)
        text, length = record["text"], self.masked.length
        text = text.decode("utf-8") if isinstance(text, bytes) else text
        tokens = self._bpe.encode(text, add_special_tokens=False).ids
        start = int(rng.integers(0, max(1, len(tokens) - (length - 2) + 1)))
        piece = [CLS_ID, *tokens[start : start + length - 2], SEP_ID]
        ids = np.full(length, PAD_ID, np.int32)
        ids[: len(piece)] = piece
        window = {"input_ids": ids, "attention_mask": np.arange(length) < len(piece)}
        return self.masked(window, rng)
