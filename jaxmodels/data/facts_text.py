"""The words of the planted facts, and the real text that they are planted in."""

import hashlib
import pydoc_data.topics
from collections.abc import Mapping

# Names and colours that (nearly) never occur in Python's documentation, so that a key stands for
# nothing but its fact.
KEYS = tuple(
    """Alice Bruno Clara Dennis Edith Felix Greta Hector Irene Jonas Karen Leon Martha Nadia Oscar
    Paula Quentin Rosa Simon Tessa Ursula Victor Wanda Xavier Yvonne Zachary Agnes Boris Celia Dario
    Elena Franz Gloria Hugo Ingrid Jasper Kirsten Lionel Miriam Norman Olga Pedro Ramona Stefan
    Tamara Ulrich Vera Walter Adele Basil Connie Doris Ernest Fiona Gavin Helga Ivan Judith Klaus
    Lydia Marcel Nora Otto Priscilla""".split()
)
VALUES = tuple(
    """amber bronze cobalt copper crimson emerald golden indigo ivory lavender maroon purple ruby
    scarlet silver violet""".split()
)

# One token a word: the index of a word in its template is the offset of its token.
FACT = "the code of KEY is VALUE .".split()
QUESTION = "what is the code of KEY ?".split()
TEMPLATE_WORDS = tuple(
    dict.fromkeys(word for word in (*FACT, *QUESTION) if word not in ("KEY", "VALUE"))
)
ALL_WORDS = (*TEMPLATE_WORDS, *KEYS, *VALUES)

# Part of the text whose topics are held out for validation.
_VALIDATION_SHARE = 0.15


def topics() -> dict[str, str]:
    """Returns Python's documentation topics in English, `{name: text}`, ordered by name."""
    return dict(sorted(pydoc_data.topics.topics.items()))


def topics_sha256(texts: Mapping[str, str]) -> str:
    """Returns the SHA-256 of names and texts; it differs between Python versions."""
    digest = hashlib.sha256()
    for name, text in sorted(texts.items()):
        digest.update(f"{name}\0{text}\0".encode())
    return digest.hexdigest()


def split_topics(texts: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """Splits topics into "train" and "validation", never one topic into both.

    Topics are visited in the order of the hash of their names, so that the split depends neither on
    a seed nor on which other topics a Python version has. Validation takes about 15% of the
    characters.

    Raises:
      ValueError: there are fewer than two topics.
    """
    if len(texts) < 2:
        raise ValueError(
            f"{len(texts)} topics cannot be split into train and validation: give two or more"
        )
    wanted = _VALIDATION_SHARE * sum(map(len, texts.values()))
    order = sorted(texts, key=lambda name: hashlib.sha256(name.encode()).digest())
    held_out: list[str] = []
    characters = 0
    for name in order:
        # A topic that would make the share half as large again stays in train.
        if characters < wanted and characters + len(texts[name]) <= 1.5 * wanted:
            held_out.append(name)
            characters += len(texts[name])
    if not held_out:
        held_out = [min(texts, key=lambda name: (len(texts[name]), name))]
    return {
        "train": {name: text for name, text in texts.items() if name not in held_out},
        "validation": {name: texts[name] for name in sorted(held_out)},
    }
