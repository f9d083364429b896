"""Makes the documents of `pydoc_facts` with numpy: real text, planted facts, questions in front.

Layout of a document of `length` tokens: `<s>`, the questions of 7 tokens each (these are the VIP
tokens), then a window of the text. Facts of 7 tokens are planted in the text, `facts_per_group`
adjacent ones to a group, each group within one slot of positions `[slot * i, slot * (i + 1))`:
counted in the whole sequence, so that a group straddles neither two local segments of `slot` tokens
nor, for segments of a multiple of `slot`, two larger ones.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from jaxmodels.data import cache_folder, facts_text, tokenizer

FACT_LENGTH = len(facts_text.FACT)
KEY_IN_FACT = facts_text.FACT.index("KEY")
VALUE_IN_FACT = facts_text.FACT.index("VALUE")
QUESTION_LENGTH = len(facts_text.QUESTION)
KEY_IN_QUESTION = facts_text.QUESTION.index("KEY")

# Documents are drawn in chunks of this many: fast in numpy, and a longer data set starts with the
# shorter one's documents.
_CHUNK = 256
Document = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class FactsLayout:
    """Sizes of a document, checked at construction.

    Attributes:
      length: tokens of a document, VIP tokens included.
      questions: questions in front, 1 to 4.
      fact_groups: groups of adjacent facts in the text.
      facts_per_group: facts of a group.
      slot: tokens of an aligned slot that holds one group.
    """

    length: int = 4096
    questions: int = 1
    fact_groups: int = 8
    facts_per_group: int = 4
    slot: int = 32

    def __post_init__(self) -> None:
        """Raises ValueError when the facts do not fit into the document."""
        for name in ("length", "fact_groups", "facts_per_group", "slot"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: at least 1 is needed")
        if not 1 <= self.questions <= 4:
            raise ValueError(f"questions={self.questions}: 1 to 4 are accepted")
        if self.group_length > self.slot:
            raise ValueError(
                f"facts_per_group={self.facts_per_group} facts of {FACT_LENGTH} tokens do not fit "
                f"into slot={self.slot} tokens: choose slot >= {self.group_length}"
            )
        if self.num_facts > len(facts_text.KEYS):
            raise ValueError(
                f"fact_groups={self.fact_groups} times facts_per_group={self.facts_per_group} is "
                f"{self.num_facts} facts, but there are {len(facts_text.KEYS)} distinct keys"
            )
        if self.questions > self.num_facts:
            raise ValueError(
                f"questions={self.questions} exceeds the {self.num_facts} planted facts"
            )
        free = self.length // self.slot - self.first_slot
        if free < self.fact_groups:
            least = (self.first_slot + self.fact_groups) * self.slot
            raise ValueError(
                f"fact_groups={self.fact_groups} do not fit into length={self.length}: after "
                f"{self.num_vip} VIP tokens there are {max(free, 0)} whole slots of {self.slot}. "
                f"Choose length >= {least}"
            )

    @property
    def num_vip(self) -> int:
        """VIP tokens: `<s>` and the questions."""
        return 1 + self.questions * QUESTION_LENGTH

    @property
    def num_facts(self) -> int:
        """Facts of a document."""
        return self.fact_groups * self.facts_per_group

    @property
    def group_length(self) -> int:
        """Tokens of a group of facts."""
        return self.facts_per_group * FACT_LENGTH

    @property
    def first_slot(self) -> int:
        """Index of the first slot that lies wholly behind the VIP tokens."""
        return -(-self.num_vip // self.slot)


@dataclasses.dataclass(frozen=True)
class FactsVocabulary:
    """Token ids that a user of `pydoc_facts` needs.

    Attributes:
      tokenizer_path: the tokenizer's JSON file, readable by `jaxmodels.data.tokenizer.load`.
      tokenizer_sha256: its SHA-256.
      size: number of ids; an embedding table needs this many rows.
      value_ids: id of each of the 16 values; `answers` index this tuple.
      key_ids: id of each of the 64 keys.
      cls_id, pad_id, sep_id, unk_id, mask_id: the special tokens.
    """

    tokenizer_path: str
    tokenizer_sha256: str
    size: int
    value_ids: tuple[int, ...]
    key_ids: tuple[int, ...]
    cls_id: int = tokenizer.CLS_ID
    pad_id: int = tokenizer.PAD_ID
    sep_id: int = tokenizer.SEP_ID
    unk_id: int = tokenizer.UNK_ID
    mask_id: int = tokenizer.MASK_ID


def vocabulary_of(path: str) -> FactsVocabulary:
    """Reads the ids of keys and values from the tokenizer at `path`.

    Raises:
      ValueError: a word of the facts is not exactly one token.
    """
    bpe = tokenizer.load(path)
    return FactsVocabulary(
        tokenizer_path=str(path),
        tokenizer_sha256=cache_folder.sha256(path),
        size=bpe.get_vocab_size(),
        value_ids=_word_ids(bpe, facts_text.VALUES),
        key_ids=_word_ids(bpe, facts_text.KEYS),
    )


def token_stream(bpe: Any, texts: Mapping[str, str]) -> np.ndarray:
    """Encodes topics one after another, a `</s>` after each; returns uint16 or int32 `[tokens]`."""
    dtype = np.uint16 if bpe.get_vocab_size() <= 2**16 else np.int32
    pieces = [
        np.asarray([*bpe.encode(text).ids, tokenizer.SEP_ID], dtype) for text in texts.values()
    ]
    return np.concatenate(pieces)


def generate(
    layout: FactsLayout, bpe: Any, stream: np.ndarray, *, count: int, seed: int, split: int = 0
) -> Iterator[Document]:
    """Yields `count` documents; the same arguments give the same documents.

    Args:
      layout: sizes of a document.
      bpe: tokenizer in which every word of the facts is one token.
      stream: `[tokens]` ids of the text; windows start anywhere and wrap around.
      count: number of documents. A larger count starts with the same documents.
      seed: any non-negative integer.
      split: number of the split, so that splits of one seed differ.

    Yields:
      `input_ids [length]` (dtype of `stream`), `num_vip ()` int32, and int32 `question_positions
      [Q]` (each question's KEY token), `answers [Q]` (index of the value), `answer_positions [Q]`
      (the VALUE token of the asked fact) and `fact_positions [facts]` (first token of each fact, in
      order of text).
    """
    for chunk in range(-(-count // _CHUNK)):
        rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, split, chunk])))
        documents = _chunk(layout, bpe, stream, rng)
        for row in range(min(_CHUNK, count - chunk * _CHUNK)):
            yield {name: array[row] for name, array in documents.items()}


def decode(
    input_ids: np.ndarray, bpe: Any, *, block: int = 32, opened: Mapping[int, str] | None = None
) -> str:
    """Returns a document's text in blocks, one a line, for a report.

    Args:
      input_ids: `[length]` token ids.
      bpe: the tokenizer they come from.
      block: tokens of a line.
      opened: marks of some blocks, by index; printed in front of them (">" for an opened one, say).

    Returns:
      Lines `[first position] mark text`, newlines of the text shown as spaces.
    """
    ids = np.asarray(input_ids).tolist()
    lines = []
    for index, start in enumerate(range(0, len(ids), block)):
        text = " ".join(bpe.decode(ids[start : start + block], skip_special_tokens=False).split())
        mark = (opened or {}).get(index, "")
        lines.append(f"[{start:>6}] {mark:<2}{text}")
    return "\n".join(lines)


def _chunk(
    layout: FactsLayout, bpe: Any, stream: np.ndarray, rng: np.random.Generator
) -> dict[str, np.ndarray]:
    """Draws `_CHUNK` documents at once; every array has a leading axis of that size."""
    rows = np.arange(_CHUNK)[:, None]
    starts = _group_starts(layout, rng)
    within_group = FACT_LENGTH * np.arange(layout.facts_per_group)
    facts = (starts[:, :, None] + within_group).reshape(_CHUNK, -1)
    keys = _distinct(np.arange(len(facts_text.KEYS)), layout.num_facts, rng)
    values = rng.integers(len(facts_text.VALUES), size=(_CHUNK, layout.num_facts))
    asked = _distinct(np.arange(layout.num_facts), layout.questions, rng)

    ids = np.empty((_CHUNK, layout.length), stream.dtype)
    fact_cells = (facts[:, :, None] + np.arange(FACT_LENGTH)).reshape(_CHUNK, -1)
    # The text flows around the facts: it fills, in order, every position that nothing else takes.
    is_text = np.ones(ids.shape, bool)
    is_text[:, : layout.num_vip] = False
    is_text[rows, fact_cells] = False
    num_text = layout.length - layout.num_vip - layout.num_facts * FACT_LENGTH
    window = rng.integers(len(stream), size=(_CHUNK, 1)) + np.arange(num_text)
    ids[is_text] = stream[window % len(stream)].reshape(-1)
    ids[rows, fact_cells] = _fill(bpe, facts_text.FACT, keys, values)
    ids[:, 0] = tokenizer.CLS_ID
    asked_keys = np.take_along_axis(keys, asked, axis=1)
    ids[:, 1 : layout.num_vip] = _fill(bpe, facts_text.QUESTION, asked_keys, None)

    question_positions = 1 + QUESTION_LENGTH * np.arange(layout.questions) + KEY_IN_QUESTION
    answer_positions = np.take_along_axis(facts, asked, axis=1) + VALUE_IN_FACT
    return {
        "input_ids": ids,
        "num_vip": np.full(_CHUNK, layout.num_vip, np.int32),
        "question_positions": np.tile(question_positions, (_CHUNK, 1)).astype(np.int32),
        "answers": np.take_along_axis(values, asked, axis=1).astype(np.int32),
        "answer_positions": answer_positions.astype(np.int32),
        "fact_positions": facts.astype(np.int32),
    }


def _group_starts(layout: FactsLayout, rng: np.random.Generator) -> np.ndarray:
    """Draws the first position of each group, `[_CHUNK, groups]`, ascending, one slot a group."""
    slots = np.arange(layout.first_slot, layout.length // layout.slot)
    chosen = np.sort(_distinct(slots, layout.fact_groups, rng), axis=1)
    # The last possible shift (a group ending with its slot) is left out: with groups of 28 in slots
    # of 32 a key and its value would lie in two blocks of 16.
    shifts = rng.integers(max(1, layout.slot - layout.group_length), size=chosen.shape)
    return chosen * layout.slot + shifts


def _distinct(choices: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Draws `count` distinct elements a document, in random order, `[_CHUNK, count]`."""
    return rng.permuted(np.tile(choices, (_CHUNK, 1)), axis=1)[:, :count]


def _fill(bpe: Any, template: list[str], keys: np.ndarray, values: np.ndarray | None) -> np.ndarray:
    """Fills a template with keys and values `[rows, n]`; returns `[rows, n * len(template)]`."""
    words = [word if word not in ("KEY", "VALUE") else facts_text.KEYS[0] for word in template]
    ids = np.empty((*keys.shape, len(template)), np.int64)
    ids[:] = _word_ids(bpe, words)
    ids[:, :, template.index("KEY")] = np.asarray(_word_ids(bpe, facts_text.KEYS))[keys]
    if values is not None:
        ids[:, :, template.index("VALUE")] = np.asarray(_word_ids(bpe, facts_text.VALUES))[values]
    return ids.reshape(len(keys), -1)


def _word_ids(bpe: Any, words: tuple[str, ...] | list[str]) -> tuple[int, ...]:
    """Returns the one id of each word (after a space)."""
    encoded = [bpe.encode(" " + word).ids for word in words]
    split = [word for word, ids in zip(words, encoded, strict=True) if len(ids) != 1]
    if split:
        raise ValueError(
            f"the tokenizer splits words of the facts into several tokens: {', '.join(split)}. "
            "Train it with jaxmodels.data.tokenizer.train_bpe(..., words=facts_text.ALL_WORDS, "
            "...)."
        )
    return tuple(ids[0] for ids in encoded)
