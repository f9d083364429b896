"""RoBERTa examples of HotpotQA: the answer's span or type, and the paragraphs and sentences for it.

The question is VIP; with `mark_context` the tokens that open paragraphs and sentences are too.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxmodels.core.losses import IGNORE
from jaxmodels.data import cache_folder, checks, tokenizer
from jaxmodels.vcc import qa_formats
from jaxmodels.vcc.inputs import check_inputs

ANSWER_TYPES = ("no", "yes", "span")


@dataclasses.dataclass(frozen=True)
class HotpotQASettings:
    """Sizes and choices of the examples.

    Attributes:
      length: n, tokens of a sequence.
      num_vip: p, VIP slots of the model; None: it has none.
      max_paragraphs, max_sentences: that are labelled.
      num_types: rows of the token-type table: the question and every paragraph have a type of their
        own; None: all have type 0.
      mark_context: the marks of paragraphs and sentences are VIP tokens too.
      overflow: more VIP tokens than slots: "error", "warn" or "demote".
      shuffle: paragraphs in random order.
    """

    length: int
    num_vip: int | None = None
    max_paragraphs: int = 32
    max_sentences: int = 512
    num_types: int | None = None
    mark_context: bool = False
    overflow: str = "error"
    shuffle: bool = True


class HotpotQAExample:
    """The transform of a record into an example; travels to workers.

    An example is, int32: `input_ids`, `attention_mask`, `vip_mask`, `position_ids`,
    `token_type_ids` [n]; `paragraph_positions`, `paragraph_labels` [max_paragraphs];
    `sentence_positions`, `sentence_labels` [max_sentences]; `answer_type` []; `start`, `end` [1],
    the first occurrence of the answer. Labels that do not count are -100.
    """

    def __init__(self, settings: HotpotQASettings, tokenizer_path: str) -> None:
        """Keeps the settings; the tokenizer is opened on first use, in the worker itself."""
        self.settings, self.tokenizer_path = settings, tokenizer_path
        self._tokenizer: Any = None

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What decides the examples, as JSON values."""
        return {
            "settings": dataclasses.asdict(self.settings),
            "tokenizer_sha256": cache_folder.sha256(self.tokenizer_path),
        }

    def __getstate__(self) -> dict[str, Any]:
        """Leaves the opened tokenizer behind."""
        return self.__dict__ | {"_tokenizer": None}

    @property
    def tokenizer(self) -> Any:
        """The tokenizer, with the marks.

        Raises:
          ValueError: it cannot be used.
        """
        if self._tokenizer is None:
            self._tokenizer = tokenizer.load(self.tokenizer_path)
            self._tokenizer.add_tokens(list(qa_formats.HOTPOTQA_TOKENS))
        return self._tokenizer

    def __call__(self, record: dict[str, Any], rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Returns the arrays of one example.

        Raises:
          ValueError: a field is missing or wrong, or the question does not fit.
        """
        order = qa_formats.shuffled(rng) if self.settings.shuffle else qa_formats.in_order
        paragraphs = qa_formats.paragraphs(record)
        ordered = [paragraphs[i] for i in order(len(paragraphs))]
        example, places = self.encode(checks.check_text(record, "question"), ordered)
        facts = supporting_facts(record)
        labels = [
            (self.settings.max_paragraphs, "paragraph", [title in facts for title, _ in ordered]),
            (
                self.settings.max_sentences,
                "sentence",
                [
                    number in facts.get(title, ())
                    for title, sentences in ordered
                    for number in range(len(sentences))
                ],
            ),
        ]
        for most, name, relevant in labels:
            found = places[name]
            if len(found) > most:
                raise ValueError(f"{len(found)} {name}s: at most {most} are labelled")
            spare = (0, most - len(found))
            kept = [label for label, at in zip(relevant, places[f"all_{name}s"], strict=True) if at]
            example[f"{name}_positions"] = np.pad(np.asarray(found, np.int32), spare)
            example[f"{name}_labels"] = np.pad(
                np.asarray(kept, np.int32), spare, constant_values=IGNORE
            )
        return example | self._answer(checks.check_text(record, "answer"), example["input_ids"])

    def encode(
        self, question: str, paragraphs: Sequence[tuple[str, Sequence[str]]]
    ) -> tuple[dict[str, np.ndarray], dict[str, list[Any]]]:
        """Returns the arrays of a question, and where paragraphs and sentences open.

        Args:
          question: the text.
          paragraphs: (title, sentences) pairs, in the order wanted.

        Returns:
          `input_ids`, `attention_mask`, `vip_mask`, `position_ids`, `token_type_ids` [n]; and the
          positions "paragraph" and "sentence" of those that begin within n, with "all_paragraphs"
          and "all_sentences" telling of each whether it does.

        Raises:
          ValueError: the question does not fit.
        """
        length, mark = self.settings.length, self.tokenizer.token_to_id
        ids = [mark("[cls]"), mark("[qs]"), *self._ids(question), mark("[qe]")]
        if len(ids) > length:
            raise ValueError(
                f"the question has {len(ids)} tokens, data.length={length}: VIP tokens would be "
                "cut; raise data.length"
            )
        marked, edges = len(ids), [0, len(ids)]
        places: dict[str, list[Any]] = {
            name: [] for name in ("paragraph", "sentence", "all_paragraphs", "all_sentences")
        }

        def opens(name: str, tokens: list[int]) -> None:
            fits = len(ids) < length
            places[f"all_{name}s"].append(fits)
            if fits:
                places[name].append(len(ids))
                ids.extend(tokens)

        for title, sentences in paragraphs:
            opens("paragraph", [mark("[ts]"), *self._ids(title), mark("[te]")])
            for sentence in sentences:
                opens("sentence", [mark("[ss]"), *self._ids(sentence)])
            edges.append(len(ids))
        return self._arrays(ids[:length], marked, edges, places), places

    def _arrays(
        self, ids: list[int], marked: int, edges: list[int], places: Mapping[str, list[Any]]
    ) -> dict[str, np.ndarray]:
        wanted, count = self.settings, len(ids)
        padding = (0, wanted.length - count)
        mask = np.pad(np.ones(count, np.int32), padding)
        vip = (np.arange(wanted.length) < marked).astype(np.int32)
        if wanted.mark_context:
            vip[[*places["paragraph"], *places["sentence"]]] = 1
        if wanted.num_vip is not None:
            mask, vip = check_inputs(mask, vip, wanted.num_vip, wanted.overflow)
        parts = int((np.diff(edges) > 0).sum())
        if wanted.num_types is not None and parts > wanted.num_types:
            raise ValueError(
                f"question and paragraphs are {parts} parts, each with a token type, but "
                f"model.num_token_types={wanted.num_types}; raise it, or set data.part_types to "
                "False"
            )
        types = np.repeat(np.arange(len(edges) - 1), np.diff(edges))[:count]
        arrays = {
            "input_ids": np.pad(ids, padding, constant_values=tokenizer.PAD_ID),
            "attention_mask": mask,
            "vip_mask": vip,
            "position_ids": np.pad(np.arange(count), padding),
            "token_type_ids": np.pad(types * (wanted.num_types is not None), padding),
        }
        return {name: array.astype(np.int32) for name, array in arrays.items()}

    def _answer(self, answer: str, ids: np.ndarray) -> dict[str, np.ndarray]:
        kind = answer if answer in ("no", "yes") else "span"
        spans = []
        if kind == "span":
            spans = find_spans(ids, self._ids(answer), self.tokenizer.token_to_id("[ss]"))
        start, end = spans[0] if spans else (IGNORE, IGNORE)
        return {
            "answer_type": np.int32(ANSWER_TYPES.index(kind)),
            "start": np.asarray([start], np.int32),
            "end": np.asarray([end], np.int32),
        }

    def decode(self, ids: Any, answer_type: int, start: int, end: int) -> str:
        """Returns the text of a predicted answer.

        Args:
          ids: [n], the sequence.
          answer_type: index into `ANSWER_TYPES`.
          start, end: first and last token of the span.
        """
        if ANSWER_TYPES[answer_type] != "span":
            return ANSWER_TYPES[answer_type]
        marks = {self.tokenizer.token_to_id(token) for token in qa_formats.HOTPOTQA_TOKENS}
        kept = [int(i) for i in np.asarray(ids)[start : end + 1] if int(i) not in marks]
        return self.tokenizer.decode(kept).strip()

    def _ids(self, text: str) -> list[int]:
        """Words are encoded as inside a text: behind one space, with single spaces between."""
        words = " ".join(part for part in text.strip().split(" ") if part)
        return self.tokenizer.encode(f" {words}", add_special_tokens=False).ids


def find_spans(ids: Any, wanted: Sequence[int], skipped: int) -> list[tuple[int, int]]:
    """Returns (first, last) of every occurrence of `wanted` in `ids`, overlapping ones too.

    The official search starts anew after a mismatch without looking back, and so misses "a a b" in
    "a a a b".

    Args:
      ids: [n] tokens.
      wanted: tokens to find.
      skipped: a token that may stand between those of an occurrence (a sentence mark).
    """
    kept = np.flatnonzero(np.asarray(ids) != skipped)
    count = len(wanted)
    if not count or len(kept) < count:
        return []
    windows = np.lib.stride_tricks.sliding_window_view(np.asarray(ids)[kept], count)
    found = np.flatnonzero((windows == np.asarray(wanted)).all(axis=1))
    return [(int(kept[i]), int(kept[i + count - 1])) for i in found]


def supporting_facts(record: qa_formats.Record) -> dict[str, set[int]]:
    """Returns the numbers of the sentences that support the answer, by the paragraph's title.

    Raises:
      ValueError: the field `supporting_facts` is missing or wrong.
    """
    facts = checks.field_of(record, "supporting_facts")
    if isinstance(facts, Mapping):
        facts = list(zip(facts.get("title", ()), facts.get("sent_id", ()), strict=False))
    found: dict[str, set[int]] = {}
    try:
        for title, number in facts:
            found.setdefault(title, set()).add(int(number))
    except (TypeError, ValueError):
        raise ValueError(
            "field 'supporting_facts': a list of [title, sentence number] is accepted"
        ) from None
    return found
