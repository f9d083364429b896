"""Porter's stemmer, so that ROUGE needs no package and gives the numbers that papers print.

The algorithm of M. F. Porter, "An algorithm for suffix stripping" (1980), with the changes that the
NLTK makes to it and that the usual ROUGE scorer therefore has: a few irregular words, `-fulli` and
`-logi`, `y` after a consonant, four-letter words in `-ies` and `-ied`.
"""

import functools
from collections.abc import Callable, Sequence

_IRREGULAR = {
    "skies": "sky",
    "dying": "die",
    "lying": "lie",
    "tying": "tie",
    "innings": "inning",
}
_FIXED = (
    *("sky", "die", "lie", "tie", "news", "inning", "outing", "canning"),
    *("howe", "proceed", "exceed", "succeed"),
)

# (suffix, replacement) pairs; the first suffix that a word ends in decides, as in Porter's tables.
_STEP2 = (
    ("ational", "ate"),
    ("tional", "tion"),
    ("enci", "ence"),
    ("anci", "ance"),
    ("izer", "ize"),
    ("bli", "ble"),
    ("alli", "al"),
    ("entli", "ent"),
    ("eli", "e"),
    ("ousli", "ous"),
    ("ization", "ize"),
    ("ation", "ate"),
    ("ator", "ate"),
    ("alism", "al"),
    ("iveness", "ive"),
    ("fulness", "ful"),
    ("ousness", "ous"),
    ("aliti", "al"),
    ("iviti", "ive"),
    ("biliti", "ble"),
    ("fulli", "ful"),
)
_STEP3 = (
    ("icate", "ic"),
    ("ative", ""),
    ("alize", "al"),
    ("iciti", "ic"),
    ("ical", "ic"),
    ("ful", ""),
    ("ness", ""),
)
_STEP4 = (
    *("al", "ance", "ence", "er", "ic", "able", "ible", "ant", "ement", "ment", "ent", "ion"),
    *("ou", "ism", "ate", "iti", "ous", "ive", "ize"),
)


@functools.lru_cache(maxsize=1 << 16)
def stem(word: str) -> str:
    """Returns the stem of one lower-case word."""
    if word in _IRREGULAR:
        return _IRREGULAR[word]
    if word in _FIXED or len(word) <= 2:
        return word
    for step in (_step1a, _step1b, _step1c, _step2, _step3, _step4, _step5a, _step5b):
        word = step(word)
    return word


def _consonants(word: str) -> list[bool]:
    """Whether each letter is a consonant; `y` is one at the start and after a vowel."""
    found: list[bool] = []
    for letter in word:
        found.append(letter not in "aeiou" and (letter != "y" or not found or not found[-1]))
    return found


def _measure(stem_: str) -> int:
    """Porter's m: how often a vowel is followed by a consonant."""
    kinds = _consonants(stem_)
    return sum(b and not a for a, b in zip(kinds, kinds[1:], strict=False))


def _has_vowel(stem_: str) -> bool:
    return not all(_consonants(stem_))


def _ends_double(word: str) -> bool:
    return len(word) > 1 and word[-1] == word[-2] and _consonants(word)[-1]


def _ends_cvc(word: str) -> bool:
    """Consonant, vowel, consonant other than w, x, y; two letters need only the last two."""
    kinds = _consonants(word)
    if kinds[-3:] == [True, False, True]:
        return word[-1] not in "wxy"
    return kinds == [False, True]


def _replace(word: str, rules: Sequence[tuple[str, str]], condition: Callable[[str], bool]) -> str:
    for suffix, new in rules:
        if word.endswith(suffix):
            rest = word[: len(word) - len(suffix)]
            return rest + new if condition(rest) else word
    return word


def _step1a(word: str) -> str:
    if word.endswith("ies") and len(word) == 4:
        return word[:-1]
    rules = (("sses", "ss"), ("ies", "i"), ("ss", "ss"), ("s", ""))
    return _replace(word, rules, lambda rest: True)


def _step1b(word: str) -> str:
    if word.endswith("ied"):
        return word[:-1] if len(word) == 4 else word[:-2]
    if word.endswith("eed"):
        return word[:-1] if _measure(word[:-3]) > 0 else word
    rest = next((word[: -len(end)] for end in ("ed", "ing") if word.endswith(end)), None)
    if rest is None or not _has_vowel(rest):
        return word
    if rest.endswith(("at", "bl", "iz")):
        return rest + "e"
    if _ends_double(rest):
        return rest if rest[-1] in "lsz" else rest[:-1]
    return rest + "e" if _measure(rest) == 1 and _ends_cvc(rest) else rest


def _step1c(word: str) -> str:
    rest = word[:-1]
    turns = word.endswith("y") and len(rest) > 1 and _consonants(rest)[-1]
    return rest + "i" if turns else word


def _step2(word: str) -> str:
    if word.endswith("alli") and _measure(word[:-4]) > 0:
        return _step2(word[:-2])
    if word.endswith("logi"):
        return word[:-1] if _measure(word[:-3]) > 0 else word
    return _replace(word, _STEP2, lambda rest: _measure(rest) > 0)


def _step3(word: str) -> str:
    return _replace(word, _STEP3, lambda rest: _measure(rest) > 0)


def _step4(word: str) -> str:
    for suffix in _STEP4:
        if word.endswith(suffix):
            rest = word[: len(word) - len(suffix)]
            allowed = suffix != "ion" or rest[-1:] in ("s", "t")
            return rest if _measure(rest) > 1 and allowed else word
    return word


def _step5a(word: str) -> str:
    if not word.endswith("e"):
        return word
    rest = word[:-1]
    count = _measure(rest)
    return rest if count > 1 or (count == 1 and not _ends_cvc(rest)) else word


def _step5b(word: str) -> str:
    return word[:-1] if word.endswith("ll") and _measure(word[:-1]) > 1 else word
