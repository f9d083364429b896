"""What a user may ask of generation, under Hugging Face's names, checked before anything runs."""

import dataclasses
from collections.abc import Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class GenerationSettings:
    """How to generate; frozen and hashable, so that it can be a static argument of `jax.jit`.

    Lengths count new tokens, the closing eos included; `from_total_lengths` takes Hugging Face's
    `max_length` and `min_length`, which count the prompt as well.

    Attributes:
      max_new_tokens: tokens generated at most; sizes every buffer.
      min_new_tokens: eos is impossible before this many tokens were generated.
      eos_token_id: the token, or tokens, that end a sequence; None generates to the full length.
      pad_token_id: fills the row after its end; None takes the first eos (0 without any).
      do_sample: draw from the filtered distribution; False takes the most probable token.
      temperature: divides the logits; only with do_sample.
      top_k: keeps the k most probable tokens, 0 keeps all; only with do_sample.
      top_p: keeps the most probable tokens that hold this much probability; only with do_sample.
      num_beams: hypotheses an example; 1 is no beam search.
      num_return_sequences: rows returned an example; needs do_sample or as many beams.
      length_penalty: a finished beam's score is its log-probability / length ** length_penalty.
      early_stopping: when an example with num_beams finished hypotheses is done: True at once,
        False when the best running beam would not improve them at its present length, "never" when
        it could not at any length.
      repetition_penalty: scores of tokens already present are divided by it where positive and
        multiplied where negative; 1.0 is off. Left padding is not present, the prompt is.
      no_repeat_ngram_size: no n-gram occurs twice in prompt and continuation; 0 is off. Padding
        tokens count as tokens here, as they do in Hugging Face.
      forced_bos_token_id: the first generated token, where the prompt is one token long (the start
        token of an encoder-decoder model); it has no effect for longer prompts.
      forced_eos_token_id: the only tokens allowed at the last of max_new_tokens places.
      return_logits: keep the raw logits of every step, [max_new_tokens, N, vocab].

    Raises:
      ValueError: a value out of its range, or settings that exclude each other.
    """

    max_new_tokens: int = 20
    min_new_tokens: int = 0
    eos_token_id: int | Sequence[int] | None = None
    pad_token_id: int | None = None
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    num_beams: int = 1
    num_return_sequences: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    forced_bos_token_id: int | None = None
    forced_eos_token_id: int | Sequence[int] | None = None
    return_logits: bool = False

    def __post_init__(self) -> None:
        for name in ("eos_token_id", "forced_eos_token_id"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, int):  # a list would not hash
                object.__setattr__(self, name, tuple(value))
        self._check_lengths()
        self._check_tokens()
        self._check_numbers()
        self._check_search()

    @classmethod
    def from_total_lengths(
        cls, max_length: int, min_length: int = 0, prompt_length: int = 1, **others: Any
    ) -> "GenerationSettings":
        """Settings from Hugging Face's `max_length` and `min_length`, which count the prompt.

        Args:
          max_length: prompt and new tokens together, at most.
          min_length: prompt and new tokens together, at least.
          prompt_length: padded length of the prompt; 1 (the start token) for encoder-decoders.
          **others: the other attributes.

        Raises:
          ValueError: the prompt alone is as long as `max_length`, or a value out of its range.
        """
        if max_length <= prompt_length:
            raise ValueError(
                f"max_length={max_length} leaves no room after a prompt of {prompt_length} tokens: "
                f"it counts the prompt; give at least {prompt_length + 1}, or max_new_tokens."
            )
        return cls(
            max_new_tokens=max_length - prompt_length,
            min_new_tokens=max(min_length - prompt_length, 0),
            **others,
        )

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """The tokens that end a sequence; empty if none does."""
        return _as_tuple(self.eos_token_id)

    @property
    def forced_eos_ids(self) -> tuple[int, ...]:
        """The tokens allowed at the last place; empty if all are."""
        return _as_tuple(self.forced_eos_token_id)

    @property
    def pad_id(self) -> int:
        """The token after the end of a row."""
        return (*_as_tuple(self.pad_token_id), *self.eos_ids, 0)[0]

    def _check_lengths(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={self.max_new_tokens}: give 1 or more.")
        if not 0 <= self.min_new_tokens <= self.max_new_tokens:
            raise ValueError(
                f"min_new_tokens={self.min_new_tokens} is not between 0 and "
                f"max_new_tokens={self.max_new_tokens}."
            )

    def _check_tokens(self) -> None:
        for name in ("eos_token_id", "pad_token_id", "forced_bos_token_id", "forced_eos_token_id"):
            value = getattr(self, name)
            ids = _as_tuple(value)
            if any(not isinstance(i, int) or i < 0 for i in ids) or (value is not None and not ids):
                raise ValueError(f"{name}={value!r}: token ids are integers >= 0; None is off.")

    def _check_numbers(self) -> None:
        for name in ("temperature", "repetition_penalty"):
            if not getattr(self, name) > 0:
                hint = " do_sample=False is greedy decoding." if name == "temperature" else ""
                raise ValueError(f"{name}={getattr(self, name)} must be above 0; 1.0 is off.{hint}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must lie in (0, 1]; 1.0 keeps every token.")
        for name in ("top_k", "no_repeat_ngram_size"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)}: give 1 or more, or 0 for off.")

    def _check_search(self) -> None:
        for name in ("num_beams", "num_return_sequences"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: give 1 or more.")
        if not isinstance(self.early_stopping, bool) and self.early_stopping != "never":
            raise ValueError(f'early_stopping={self.early_stopping!r}: use False, True or "never".')
        if self.do_sample and self.num_beams > 1:
            raise ValueError(
                f"do_sample=True with num_beams={self.num_beams}: sampled beams are not supported; "
                "use num_return_sequences with one beam, or do_sample=False."
            )
        if not self.do_sample and self.num_return_sequences > self.num_beams:
            raise ValueError(
                f"num_return_sequences={self.num_return_sequences} exceeds "
                f"num_beams={self.num_beams}: use as many beams, or do_sample=True."
            )


def _as_tuple(value: Any) -> tuple[int, ...]:
    if value is None:
        return ()
    return value if isinstance(value, tuple) else (value,)
