"""How the paper turns a record of each data set into a query, a context and answers (section 6).

The query is what the VIP marks cover; query and context go to the encoder, joined by three
newlines. Records may come from TFDS or from the published files: where both differ, the fields of
either are accepted.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxmodels.data import checks

Record = Mapping[str, Any]
Order = Callable[[int], Sequence[int]]

SEPARATOR = "\n\n\n"
SUMMARIZE = "summarize"
HOTPOTQA_TOKENS = ("[cls]", "[qs]", "[qe]", "[ts]", "[te]", "[ss]")
WIKIHOP_TOKENS = ("[question]", "[candidate]", "[support]")


@dataclasses.dataclass(frozen=True)
class Format:
    """The format of one data set.

    Attributes:
      inputs: (record, order) -> (query, context); `order(n)` gives the order of n paragraphs,
        candidates or supports.
      answer: record -> the text to generate.
      added_tokens: tokens that the tokenizer needs beside its own, in the order of their ids.
      metrics: names in `jaxmodels.data.text_metrics` that judge it.
    """

    inputs: Callable[[Record, Order], tuple[str, str]]
    answer: Callable[[Record], str]
    added_tokens: tuple[str, ...] = ()
    metrics: tuple[str, ...] = ("exact_match", "f1")


def in_order(count: int) -> Sequence[int]:
    """The order as stored."""
    return range(count)


def shuffled(rng: np.random.Generator) -> Order:
    """A random order, other for each call; it follows from the generator's state alone."""
    return lambda count: np.argsort(rng.random(count), kind="stable").tolist()


def get_format(name: str) -> Format:
    """Returns the format of a data set.

    Raises:
      ValueError: there is none of that name.
    """
    if name not in FORMATS:
        raise ValueError(f"no format for {name!r}: use one of {', '.join(FORMATS)}")
    return FORMATS[name]


def texts(record: Record, name: str) -> list[str]:
    """Returns a field that is a list of texts.

    Raises:
      ValueError: it is missing, no list, empty, or holds something else.
    """
    value = checks.field_of(record, name)
    if isinstance(value, (str, bytes)) or not isinstance(value, (Sequence, np.ndarray)):
        raise ValueError(f"field {name!r} is of type {type(value).__name__}: a list is accepted")
    wrong = [item for item in value if not isinstance(item, str)]
    if wrong or not len(value):
        found = f"holds {wrong[0]!r:.60}" if wrong else "is empty"
        raise ValueError(f"field {name!r} {found}: one text or more are accepted")
    return list(value)


def paragraphs(record: Record) -> list[tuple[str, list[str]]]:
    """Returns HotpotQA's (title, sentences) pairs.

    The field `context` is [[title, [sentence, ...]], ...], or {"title": [...], "sentences": [...]}.

    Raises:
      ValueError: it is neither.
    """
    context = checks.field_of(record, "context")
    if isinstance(context, Mapping):
        titles = texts(context, "title")
        bodies = list(checks.field_of(context, "sentences"))
        if len(titles) != len(bodies):
            raise ValueError(
                f"field 'context' has {len(titles)} titles and {len(bodies)} lists of sentences"
            )
        context = list(zip(titles, bodies, strict=True))
    try:
        pairs = [(title, list(sentences)) for title, sentences in context]
        good = pairs and all(isinstance(t, str) for title, rest in pairs for t in (title, *rest))
    except (TypeError, ValueError):
        good = False
    if not good:
        raise ValueError("field 'context': a list of [title, [sentence, ...]] is accepted")
    return pairs


def _hotpotqa(record: Record, order: Order) -> tuple[str, str]:
    query = f"[qs]{checks.check_text(record, 'question')}[qe]"
    pairs = paragraphs(record)
    context = ""
    for i in order(len(pairs)):
        title, sentences = pairs[i]
        context += f"[ts]{title}[te]" + "".join(f"[ss]{sentence}" for sentence in sentences)
    return query, context


def _wikihop(record: Record, order: Order) -> tuple[str, str]:
    candidates, supports = texts(record, "candidates"), texts(record, "supports")
    chosen = "".join(f"[candidate]{candidates[i]}" for i in order(len(candidates)))
    context = "".join(f"[support]{supports[i]}" for i in order(len(supports)))
    return f"[question]{checks.check_text(record, 'query')}{chosen}", context


def _after_blank_line(parts: int | None = None) -> Callable[[Record, Order], tuple[str, str]]:
    """SCROLLS: the question, a blank line, the document; `parts` fixes how many there are."""

    def inputs(record: Record, order: Order) -> tuple[str, str]:
        del order
        text = checks.check_text(record, "input")
        query, found, context = text.partition("\n\n")
        if not found or not query.strip():
            raise ValueError("field 'input': a question, a blank line and a document are accepted")
        count = len(text.split("\n\n"))
        if parts not in (None, count):
            raise ValueError(
                f"field 'input' has {count} parts between blank lines: {parts} are accepted"
            )
        return query, context

    return inputs


def _quality(record: Record, order: Order) -> tuple[str, str]:
    """The question with its four options, up to the line of the last one."""
    del order
    lines = checks.check_text(record, "input").split("\n")
    last = next((i for i, line in enumerate(lines) if " (D) " in line), None)
    query = "\n".join(lines[: 0 if last is None else last + 1])
    missing = [option for option in "ABCD" if f" ({option}) " not in query]
    if missing:
        raise ValueError(
            f"field 'input' has no option ({missing[0]}) before its document: a question and the "
            "options (A) to (D), a line each, are accepted"
        )
    return query, "\n".join(lines[last + 1 :])


def _summary_of(name: str) -> Callable[[Record, Order], tuple[str, str]]:
    def inputs(record: Record, order: Order) -> tuple[str, str]:
        del order
        return SUMMARIZE, checks.check_text(record, name)

    return inputs


def _paper(record: Record, order: Order) -> tuple[str, str]:
    """arXiv, PubMed: TFDS's `article`, or the published list of paragraphs."""
    if record.get("article") is not None:
        return _summary_of("article")(record, order)
    return SUMMARIZE, "\n".join(texts(record, "article_text"))


def _abstract(record: Record) -> str:
    if record.get("abstract") is not None:
        return checks.check_text(record, "abstract")
    text = "\n".join(texts(record, "abstract_text"))
    return checks.check_text(
        {"abstract_text": text.replace("<S>", "").replace("</S>", "")}, "abstract_text"
    )


def _interview(record: Record, order: Order) -> tuple[str, str]:
    """MediaSum: what was said, without who said it, a blank line between two turns."""
    del order
    name = "document" if record.get("document") is not None else "utt"
    return SUMMARIZE, "\n\n".join(texts(record, name))


def _text_field(name: str) -> Callable[[Record], str]:
    return lambda record: checks.check_text(record, name)


_ROUGE = ("rouge1", "rouge2", "rougeL", "rougeLsum")
_OUTPUT = _text_field("output")

FORMATS: dict[str, Format] = {
    "hotpotqa": Format(_hotpotqa, _text_field("answer"), HOTPOTQA_TOKENS),
    "wikihop": Format(_wikihop, _text_field("answer"), WIKIHOP_TOKENS),
    "quality": Format(_quality, _OUTPUT),
    "qasper": Format(_after_blank_line(), _OUTPUT),
    "narrative_qa": Format(_after_blank_line(), _OUTPUT, metrics=("exact_match", "f1", *_ROUGE)),
    "contract_nli": Format(_after_blank_line(), _OUTPUT),
    "qmsum": Format(_after_blank_line(2), _OUTPUT, metrics=_ROUGE),
    "gov_report": Format(_summary_of("input"), _OUTPUT, metrics=_ROUGE),
    "summ_screen_fd": Format(_summary_of("input"), _OUTPUT, metrics=_ROUGE),
    "cnn_dailymail": Format(_summary_of("article"), _text_field("highlights"), metrics=_ROUGE),
    "media_sum": Format(_interview, _text_field("summary"), metrics=_ROUGE),
    "multi_news": Format(_summary_of("document"), _text_field("summary"), metrics=_ROUGE),
    "arxiv": Format(_paper, _abstract, metrics=_ROUGE),
    "pubmed": Format(_paper, _abstract, metrics=_ROUGE),
    "big_patent": Format(_summary_of("description"), _text_field("abstract"), metrics=_ROUGE),
}
