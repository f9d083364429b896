"""One training example of a T5 model with VIP marks: tokens, masks and labels (section 6)."""

import dataclasses
import logging
from typing import Any

import numpy as np

from jaxmodels.core.losses import IGNORE
from jaxmodels.data import cache_folder, t5_tokenizer
from jaxmodels.vcc import qa_formats
from jaxmodels.vcc.inputs import check_inputs

_LOG = logging.getLogger(__name__)
_POLICIES = ("error", "warn")


@dataclasses.dataclass(frozen=True)
class Seq2SeqSettings:
    """Sizes and choices of the examples.

    Attributes:
      encoder_length: n, tokens of query and context, end-of-sequence included.
      decoder_length: T, tokens of the answer, end-of-sequence included.
      num_vip: p, VIP slots of the model; None: it has none, so that any query fits.
      exact_vip: mark the query alone. The official code marks one token more, the first of the
        context, because it counts the query's end-of-sequence token.
      overflow: a query with more tokens than slots: "error", "warn" or "demote".
      long_query: a query that is cut at `encoder_length`, and VIP marks with it: "error" or "warn".
      shuffle: paragraphs, candidates and supports in random order (HotpotQA, WikiHop).
    """

    encoder_length: int
    decoder_length: int
    num_vip: int | None = None
    exact_vip: bool = False
    overflow: str = "error"
    long_query: str = "error"
    shuffle: bool = True

    def __post_init__(self) -> None:
        """Raises ValueError for sizes or choices that cannot be."""
        for name, least in (("encoder_length", 4), ("decoder_length", 2)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)}: at least {least} is needed")
        for name, accepted in (("long_query", _POLICIES), ("overflow", (*_POLICIES, "demote"))):
            if getattr(self, name) not in accepted:
                raise ValueError(
                    f"{name}={getattr(self, name)!r}: use one of {', '.join(accepted)}"
                )


class Seq2SeqExample:
    """The transform of a record into an example; travels to workers.

    An example is `input_ids`, `attention_mask`, `vip_mask` [n] and `labels` [T], int32; labels that
    pad are -100. With `numbered`, `record` [] is the record's number in the source.
    """

    def __init__(
        self,
        format_name: str,
        settings: Seq2SeqSettings,
        tokenizer_path: str,
        *,
        numbered: bool = False,
    ) -> None:
        """Keeps the settings; the tokenizer is opened on first use, in the worker itself.

        Args:
          format_name: see `qa_formats.FORMATS`.
          settings: sizes and choices.
          tokenizer_path: T5's tokenizer.json.
          numbered: records have a field `record`, to be kept.

        Raises:
          ValueError: no format of that name.
        """
        qa_formats.get_format(format_name)
        self.format_name, self.settings = format_name, settings
        self.tokenizer_path, self.numbered = tokenizer_path, numbered
        self._tokenizer: Any = None
        self._warned = False

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What decides the examples, as JSON values."""
        return {
            "format": self.format_name,
            "settings": dataclasses.asdict(self.settings),
            "tokenizer_sha256": cache_folder.sha256(self.tokenizer_path),
        }

    def __getstate__(self) -> dict[str, Any]:
        """Leaves the opened tokenizer behind."""
        return self.__dict__ | {"_tokenizer": None}

    @property
    def tokenizer(self) -> Any:
        """The tokenizer, with the format's own tokens.

        Raises:
          ValueError: it cannot be used.
        """
        if self._tokenizer is None:
            added = qa_formats.get_format(self.format_name).added_tokens
            self._tokenizer = t5_tokenizer.load(self.tokenizer_path, added)
        return self._tokenizer

    def __call__(self, record: dict[str, Any], rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Returns the arrays of one example.

        Raises:
          ValueError: a field is missing or wrong, or the query is too long.
        """
        chosen = qa_formats.get_format(self.format_name)
        order = qa_formats.shuffled(rng) if self.settings.shuffle else qa_formats.in_order
        query, context = chosen.inputs(record, order)
        example = self.encode(query, context) | {"labels": self.labels(chosen.answer(record))}
        if self.numbered:
            example["record"] = np.int32(record["record"])
        return example

    def encode(self, query: str, context: str) -> dict[str, np.ndarray]:
        """Returns `input_ids`, `attention_mask` and `vip_mask` [n] of any query and context.

        Raises:
          ValueError: the query is too long.
        """
        wanted = self.settings
        length = wanted.encoder_length
        text = query + qa_formats.SEPARATOR + context
        ids = t5_tokenizer.encode_start(self.tokenizer, text, length - 1)
        ids = np.asarray([*ids, t5_tokenizer.EOS_ID], np.int32)
        padded = np.pad(ids, (0, length - len(ids)), constant_values=t5_tokenizer.PAD_ID)
        marked = len(self.tokenizer.encode(query, add_special_tokens=False).ids)
        if marked + 1 > length:
            self._cut(marked)
        marked = min(marked + (not wanted.exact_vip), len(ids))
        mask = (np.arange(length) < len(ids)).astype(np.int32)
        vip = (np.arange(length) < marked).astype(np.int32)
        if wanted.num_vip is not None:
            mask, vip = check_inputs(mask, vip, wanted.num_vip, wanted.overflow)
        return {"input_ids": padded, "attention_mask": mask, "vip_mask": vip}

    def labels(self, answer: str) -> np.ndarray:
        """Returns the labels [T] of an answer: cut, closed by end-of-sequence, padded with -100."""
        length = self.settings.decoder_length
        ids = self.tokenizer.encode(answer, add_special_tokens=False).ids[: length - 1]
        ids = [*ids, t5_tokenizer.EOS_ID]
        return np.pad(np.asarray(ids, np.int32), (0, length - len(ids)), constant_values=IGNORE)

    def decode(self, ids: Any) -> str:
        """Returns the text of generated ids [T], up to end-of-sequence; padding is left out."""
        kept = np.asarray(ids).tolist()
        if t5_tokenizer.EOS_ID in kept:
            kept = kept[: kept.index(t5_tokenizer.EOS_ID)]
        return self.tokenizer.decode([i for i in kept if i > 0], skip_special_tokens=True).strip()

    def _cut(self, count: int) -> None:
        length = self.settings.encoder_length
        message = (
            f"the query has {count} tokens and an end, but data.length={length}: VIP tokens are "
            "cut; raise data.length, or set data.long_query to 'warn'"
        )
        if self.settings.long_query == "error":
            raise ValueError(message)
        if not self._warned:  # once a process, not once a record
            _LOG.warning(message)
        self._warned = True
