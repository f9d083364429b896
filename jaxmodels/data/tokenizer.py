"""Byte-level BPE tokenizers trained here, so that no preset needs a download.

The special tokens have RoBERTa's order and ids, so that a model trained here and a published
checkpoint agree on what 0...4 mean.
"""

import collections
import os
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

SPECIAL_TOKENS = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
CLS_ID, PAD_ID, SEP_ID, UNK_ID, MASK_ID = range(5)

# The byte alphabet and the special tokens are always in the vocabulary.
_SMALLEST_VOCABULARY = 256 + len(SPECIAL_TOKENS)
# In the training text each guaranteed word counts this often per word of real text (at least), so
# that its merges win.
_WORD_WEIGHT = 1_000


def train_bpe(
    texts: Iterable[str], vocab_size: int, words: Sequence[str], path: str | os.PathLike[str]
) -> Any:
    """Trains a byte-level BPE tokenizer, saves it as JSON at `path` and returns it.

    The same texts and settings give the same file. `words` are guaranteed to become one token each
    when they follow a space.

    Args:
      texts: the training texts.
      vocab_size: number of ids wanted, special tokens and byte alphabet included. A small text may
        give fewer.
      words: words that must be one token each, written without the space.
      path: where the JSON file goes; replaced in one step.

    Returns:
      A `tokenizers.Tokenizer`.

    Raises:
      ValueError: `vocab_size` is too small for the byte alphabet or for `words`.
    """
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    if vocab_size < _SMALLEST_VOCABULARY:
        raise ValueError(
            f"vocab_size={vocab_size} is too small: the byte alphabet and the special tokens take "
            f"{_SMALLEST_VOCABULARY} ids. Choose {_SMALLEST_VOCABULARY} or more."
        )
    tokenizer = tokenizers.Tokenizer(models.BPE(unk_token=SPECIAL_TOKENS[UNK_ID]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    guaranteed = " " + " ".join(dict.fromkeys(words)) if words else ""
    tokenizer.train_from_iterator(_with_words(texts, guaranteed), trainer)
    split = [word for word in words if len(tokenizer.encode(" " + word).ids) != 1]
    if split:
        raise ValueError(
            f"vocab_size={vocab_size} is too small: {len(split)} of {len(words)} words would not "
            f"be one token each ({', '.join(split[:5])}...). Choose a larger vocab_size."
        )
    _write_atomically(Path(path), tokenizer.to_str(pretty=True))
    return tokenizer


def load(path: str | os.PathLike[str]) -> Any:
    """Returns the `tokenizers.Tokenizer` saved at `path`.

    Raises:
      ValueError: there is no such file, it is not a tokenizer, or its special tokens are not this
        library's.
    """
    import tokenizers

    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no tokenizer at {path}: give the path of a tokenizer.json")
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the binding raises bare Exception
        raise ValueError(
            f"{path} is not a tokenizer.json of the tokenizers package: {error}"
        ) from error
    first = SPECIAL_TOKENS[:-1]
    found = tuple(tokenizer.id_to_token(i) for i in range(len(first)))
    mask = SPECIAL_TOKENS[-1]
    if found != first or tokenizer.token_to_id(mask) is None:
        raise ValueError(
            f"{path} has {found} as its first ids, but {first} are needed, and {mask} at any id. "
            "Use a RoBERTa-type tokenizer, or leave the path out to have one trained on the text."
        )
    return tokenizer


def _with_words(texts: Iterable[str], guaranteed: str) -> Iterable[str]:
    """Yields the texts, then the guaranteed words, often enough that their merges come first."""
    most_frequent = collections.Counter[str]()
    for text in texts:
        most_frequent.update(text.split())
        yield text
    if guaranteed:
        weight = max(_WORD_WEIGHT, max(most_frequent.values(), default=0))
        for _ in range(weight):
            yield guaranteed


def _write_atomically(path: Path, text: str) -> None:
    """Writes `text` beside `path` and renames it, so that no reader sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
