"""ROUGE-1, -2, -L and -Lsum as the usual scorer counts them: lower case, stemmed, F1 of tokens.

    rouge.scores("the cat was under the bed", "the cat sat on the bed")["rouge1"]      # 0.667

C.-Y. Lin, "ROUGE: A package for automatic evaluation of summaries" (2004). Only ROUGE-Lsum looks at
sentences. `split_sentences` is a rule, not the trained splitter that other scorers download: where
summaries come as one sentence a line, both agree.
"""

import collections
import re
from collections.abc import Sequence

from jaxmodels.data import porter_stemmer

NAMES = ("rouge1", "rouge2", "rougeL", "rougeLsum")

_NO_TOKEN = re.compile(r"[^a-z0-9]+")
_END = re.compile(r"([.!?][\"')\]]*)\s+(?=[\"'(\[]?[A-Z0-9])")
# A full stop after these ends no sentence; neither does one after a single capital.
_ABBREVIATIONS = frozenset(
    "mr mrs ms dr prof sr jr st gen sen rep gov lt col sgt capt vs etc inc ltd co corp fig "
    "jan feb mar apr jun jul aug sep sept oct nov dec u.s u.k u.n e.g i.e a.m p.m".split()
)


def tokens(text: str) -> list[str]:
    """Returns the lower-case words and numbers of a text; those longer than three are stemmed."""
    words = _NO_TOKEN.sub(" ", text.lower()).split()
    return [porter_stemmer.stem(word) if len(word) > 3 else word for word in words]


def split_sentences(text: str) -> list[str]:
    """Returns the sentences of a text: its lines, cut after `.`, `!` or `?` before a capital."""
    sentences = []
    for line in text.split("\n"):
        start = 0
        for match in _END.finditer(line):
            words = line[start : match.start()].split()
            last = words[-1].lower().lstrip("\"'([") if words else ""
            if match[1][0] == "." and (last in _ABBREVIATIONS or re.fullmatch("[a-z]", last)):
                continue
            sentences.append(line[start : match.end(1)])
            start = match.end()
        sentences.append(line[start:])
    return [sentence.strip() for sentence in sentences if sentence.strip()]


def scores(prediction: str, reference: str, *, sentences: bool = True) -> dict[str, float]:
    """Returns F1 between 0 and 1 for each of `NAMES`.

    Args:
      prediction: the text to judge.
      reference: the text that it should be.
      sentences: cut both into sentences for ROUGE-Lsum; False: a line is a sentence.
    """
    made, wanted = tokens(prediction), tokens(reference)
    cut = split_sentences if sentences else str.splitlines
    return {
        "rouge1": _ngram_f1(made, wanted, 1),
        "rouge2": _ngram_f1(made, wanted, 2),
        "rougeL": _f1(lcs_length(made, wanted), len(made), len(wanted)),
        "rougeLsum": _summary_f1(
            [tokens(sentence) for sentence in cut(prediction)],
            [tokens(sentence) for sentence in cut(reference)],
        ),
    }


def lcs_length(a: Sequence[str], b: Sequence[str]) -> int:
    """Returns the length of the longest common subsequence, with one big integer as a bit row."""
    places: dict[str, int] = collections.defaultdict(int)
    for position, word in enumerate(a):
        places[word] |= 1 << position
    full = (1 << len(a)) - 1
    row = full
    for word in b:
        matches = row & places.get(word, 0)
        row = ((row + matches) | (row - matches)) & full
    return len(a) - row.bit_count()


def _f1(hits: int, made: int, wanted: int) -> float:
    return 2 * hits / (made + wanted) if hits else 0.0


def _ngram_f1(made: list[str], wanted: list[str], size: int) -> float:
    counts = [
        collections.Counter(zip(*(words[i:] for i in range(size)), strict=False))
        for words in (made, wanted)
    ]
    hits = sum((counts[0] & counts[1]).values())
    return _f1(hits, *(sum(count.values()) for count in counts))


def _summary_f1(made: list[list[str]], wanted: list[list[str]]) -> float:
    """Union of the common subsequences of each wanted sentence with all made ones.

    A word counts at most as often as it stands in either text.
    """
    left = [collections.Counter(word for s in each for word in s) for each in (made, wanted)]
    sizes = [sum(count.values()) for count in left]
    hits = 0
    for sentence in wanted:
        union = set().union(*(_common_positions(sentence, other) for other in made))
        for position in sorted(union):
            word = sentence[position]
            if all(count[word] > 0 for count in left):
                hits += 1
                for count in left:
                    count[word] -= 1
    return _f1(hits, *sizes)


def _common_positions(wanted: list[str], made: list[str]) -> list[int]:
    """Positions in `wanted` of one longest common subsequence, the one found from the end.

    Where two are equally long, the step goes towards the start of `wanted`: the usual scorer's
    choice, which decides its numbers.
    """
    table = [[0] * (len(made) + 1)]
    for word in wanted:
        above, row = table[-1], [0]
        for j, other in enumerate(made):
            row.append(above[j] + 1 if word == other else max(above[j + 1], row[j]))
        table.append(row)
    positions = []
    i, j = len(wanted), len(made)
    while i and j:
        if wanted[i - 1] == made[j - 1]:
            i, j = i - 1, j - 1
            positions.append(i)
        elif table[i][j - 1] > table[i - 1][j]:
            j -= 1
        else:
            i -= 1
    return positions
