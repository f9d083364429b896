"""T5's tokenizer.json, and one of the same kind trained here, so that no preset needs a download.

Ids 0, 1 and 2 are `<pad>`, `</s>` and `<unk>`; white space of any kind and length is one space.
"""

import os
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from jaxmodels.data import extras

SPECIAL_TOKENS = ("<pad>", "</s>", "<unk>")
PAD_ID, EOS_ID, UNK_ID = range(3)
_WORD_SPLITTERS = ("WhitespaceSplit", "Metaspace", "Whitespace")


def load(path: str | os.PathLike[str], added: Sequence[str] = ()) -> Any:
    """Returns the `tokenizers.Tokenizer` saved at `path`.

    Args:
      path: a tokenizer.json.
      added: tokens to add after the last id, in this order; those it has already keep their ids.

    Raises:
      ValueError: there is no such file, it is not a tokenizer, or its first ids are not T5's.
    """
    tokenizers = extras.needed("tokenizers", "T5's tokenizer")
    path = Path(path).expanduser()
    if not path.is_file():
        raise ValueError(
            f"no tokenizer at {path}: give the path of T5's tokenizer.json (it lies beside the "
            "weights in every T5 repository of huggingface.co)"
        )
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the binding raises bare Exception
        raise ValueError(
            f"{path} is not a tokenizer.json of the tokenizers package: {error}"
        ) from error
    found = tuple(tokenizer.id_to_token(i) for i in range(len(SPECIAL_TOKENS)))
    if found != SPECIAL_TOKENS:
        raise ValueError(
            f"{path} has {found} as its first ids, but {SPECIAL_TOKENS} are needed. Use a T5-type "
            "tokenizer, or leave the path out to have one trained on the text."
        )
    tokenizer.no_padding()
    tokenizer.no_truncation()
    tokenizer.add_tokens([token for token in added if tokenizer.token_to_id(token) is None])
    return tokenizer


def train(texts: Iterable[str], vocab_size: int, path: str | os.PathLike[str]) -> Any:
    """Trains a BPE over space-marked words, saves it as JSON at `path` and returns it.

    The same texts and sizes give the same file.

    Args:
      texts: the training texts.
      vocab_size: number of ids wanted; a small text may give fewer, many scripts more.
      path: where the file goes; replaced in one step.

    Raises:
      ValueError: `vocab_size` is too small.
    """
    tokenizers = extras.needed("tokenizers", "T5's tokenizer")
    from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

    if vocab_size < 128:
        raise ValueError(f"vocab_size={vocab_size}: 128 or more ids are needed")
    tokenizer = tokenizers.Tokenizer(models.BPE(unk_token=SPECIAL_TOKENS[UNK_ID]))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]
    )
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=list(SPECIAL_TOKENS), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", EOS_ID)]
    )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        tokenizer.save(f"{folder}/tokenizer.json", pretty=True)
        os.replace(f"{folder}/tokenizer.json", path)
    return tokenizer


def splits_on_space(tokenizer: Any) -> bool:
    """Whether words apart by white space are encoded independently, as in T5's own tokenizer."""
    import json

    def kinds(part: Any) -> list[str]:
        if part is None:
            return []
        return [part["type"], *(k for each in part.get("pretokenizers", ()) for k in kinds(each))]

    found = kinds(json.loads(tokenizer.to_str())["pre_tokenizer"])
    return any(kind in _WORD_SPLITTERS for kind in found)


def encode_start(tokenizer: Any, text: str, count: int) -> list[int]:
    """Returns the first `count` ids of a text, without special tokens.

    A text much longer than that (a book, of which 16K tokens are read) is not encoded whole: it is
    cut at white space, across which nothing is merged.

    Args:
      tokenizer: from `load`.
      text: any length.
      count: ids wanted; a short text gives fewer.
    """
    length = 8 * count + 256
    if len(text) > 2 * length and splits_on_space(tokenizer):
        # Before a letter or digit: nothing there could combine with the space.
        cut = next(
            (
                i
                for i in range(length, len(text) // 2)
                if text[i].isspace() and text[i + 1].isascii() and text[i + 1].isalnum()
            ),
            None,
        )
        ids = tokenizer.encode(text[:cut], add_special_tokens=False).ids if cut else []
        if len(ids) >= count:
            return ids[:count]
    return tokenizer.encode(text, add_special_tokens=False).ids[:count]
