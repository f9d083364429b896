"""RoBERTa examples that choose among candidates: WikiHop and QuALITY (section 6).

The question and every candidate come first and are the VIP tokens; a candidate is scored at the
token that opens it.
"""

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from jaxmodels.data import cache_folder, checks, tokenizer
from jaxmodels.vcc import qa_formats
from jaxmodels.vcc.inputs import check_inputs

MARKS = ("[question]", "[/question]", "[ent]", "[/ent]")
NAMES = ("wikihop", "quality_articles")


@dataclasses.dataclass(frozen=True)
class ChoiceSettings:
    """Sizes and choices of the examples.

    Attributes:
      length: n, tokens of a sequence.
      num_vip: p, VIP slots of the model; None: it has none.
      max_choices: c, candidates that a record may have.
      num_types: rows of the token-type table: the question, every candidate and every support have
        a type of their own; None: all have type 0, as in the paper's presets.
      overflow: more VIP tokens than slots: "error", "warn" or "demote".
      shuffle: candidates and supports in random order.
    """

    length: int
    num_vip: int | None = None
    max_choices: int = 128
    num_types: int | None = None
    overflow: str = "error"
    shuffle: bool = True


class ChoiceExample:
    """The transform of a record into an example; travels to workers.

    An example is, int32: `input_ids`, `attention_mask`, `vip_mask`, `position_ids`,
    `token_type_ids` [n], `candidate_positions`, `candidate_mask` [c] and `answer` [].
    """

    def __init__(self, name: str, settings: ChoiceSettings, tokenizer_path: str) -> None:
        """Keeps the settings; the tokenizer is opened on first use, in the worker itself.

        Args:
          name: "wikihop" or "quality_articles".
          settings: sizes and choices.
          tokenizer_path: RoBERTa's tokenizer.json.

        Raises:
          ValueError: no such data set.
        """
        if name not in NAMES:
            raise ValueError(f"data set {name!r}: use one of {', '.join(NAMES)}")
        self.name, self.settings, self.tokenizer_path = name, settings, tokenizer_path
        self._tokenizer: Any = None

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What decides the examples, as JSON values."""
        return {
            "name": self.name,
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
            self._tokenizer.add_tokens(list(MARKS))
        return self._tokenizer

    def __call__(self, record: dict[str, Any], rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Returns the arrays of one example.

        Raises:
          ValueError: a field is missing or wrong, or question and candidates do not fit.
        """
        read = wikihop_fields if self.name == "wikihop" else quality_fields
        question, candidates, supports, answer = read(record)
        order = qa_formats.shuffled(rng) if self.settings.shuffle else qa_formats.in_order
        places = list(order(len(candidates)))
        chosen = [candidates[i] for i in places]
        example = self.encode(question, chosen, (supports[i] for i in order(len(supports))))
        return example | {"answer": np.int32(places.index(answer))}

    def encode(
        self, question: str, candidates: list[str], supports: Iterable[str]
    ) -> dict[str, np.ndarray]:
        """Returns the arrays of a question without its answer.

        Raises:
          ValueError: question and candidates do not fit.
        """
        wanted, choices = self.settings, len(candidates)
        if choices > wanted.max_choices:
            raise ValueError(
                f"{choices} candidates: at most {wanted.max_choices} are accepted; raise "
                "data.max_choices"
            )
        head = [self._marked(question, *MARKS[:2])]
        head += [self._marked(candidate, *MARKS[2:]) for candidate in candidates]
        marked = sum(map(len, head))
        if marked > wanted.length:
            raise ValueError(
                f"question and candidates have {marked} tokens, data.length={wanted.length}: VIP "
                "tokens would be cut; raise data.length"
            )
        parts = [*head, *self._supports(supports, wanted.length - marked)]
        ids = np.concatenate([np.asarray(part, np.int32) for part in parts])[: wanted.length]
        starts = np.cumsum([0, *map(len, head[:-1])])[1:]
        padding, spare = (0, wanted.length - len(ids)), (0, wanted.max_choices - choices)
        mask = np.pad(np.ones(len(ids), np.int32), padding)
        vip = (np.arange(wanted.length) < marked).astype(np.int32)
        if wanted.num_vip is not None:
            mask, vip = check_inputs(mask, vip, wanted.num_vip, wanted.overflow)
        arrays = {
            "input_ids": np.pad(ids, padding, constant_values=tokenizer.PAD_ID),
            "attention_mask": mask,
            "vip_mask": vip,
            "position_ids": np.pad(np.arange(len(ids)), padding),
            "token_type_ids": np.pad(self._types(parts)[: len(ids)], padding),
            "candidate_positions": np.pad(starts, spare),
            "candidate_mask": np.pad(np.ones(choices, np.int32), spare),
        }
        return {name: array.astype(np.int32) for name, array in arrays.items()}

    def _types(self, parts: list[list[int]]) -> np.ndarray:
        count, known = len(parts), self.settings.num_types
        if known is None:
            return np.zeros(sum(map(len, parts)), np.int32)
        if count > known:
            raise ValueError(
                f"question, candidates and supports are {count} parts, each with a token type, but "
                f"model.num_token_types={known}; raise it, or set data.part_types to False"
            )
        return np.repeat(np.arange(count), [len(part) for part in parts])

    def _marked(self, text: str, first: str, last: str) -> list[int]:
        ids = self.tokenizer.encode(text, add_special_tokens=False).ids
        return [self.tokenizer.token_to_id(first), *ids, self.tokenizer.token_to_id(last)]

    def _supports(self, supports: Iterable[str], room: int) -> Iterator[list[int]]:
        """Yields supports, each between `<s>` and `</s>`, until the sequence is full."""
        for support in supports:
            if room <= 0:
                return
            ids = self.tokenizer.encode(support, add_special_tokens=False).ids
            room -= len(ids) + 2
            yield [tokenizer.CLS_ID, *ids, tokenizer.SEP_ID]


def wikihop_fields(record: qa_formats.Record) -> tuple[str, list[str], list[str], int]:
    """Returns (question, candidates, supports, index of the answer) of a QAngaroo record.

    Raises:
      ValueError: a field is missing or wrong, or the answer is no candidate.
    """
    candidates = qa_formats.texts(record, "candidates")
    answer = checks.check_text(record, "answer")
    if answer not in candidates:
        raise ValueError(f"field 'answer' holds {answer!r}, which is not among the candidates")
    question = checks.check_text(record, "query")
    return question, candidates, qa_formats.texts(record, "supports"), candidates.index(answer)


def quality_fields(record: qa_formats.Record) -> tuple[str, list[str], list[str], int]:
    """Returns (question, options, [article], index of the answer) of a QuALITY question.

    Raises:
      ValueError: a field is missing or wrong.
    """
    options = qa_formats.texts(record, "options")
    label = checks.check_field(record, "gold_label", kinds="iu", shape=(), low=1, high=len(options))
    article = checks.check_text(record, "article")
    return checks.check_text(record, "question"), options, [article], int(label) - 1
