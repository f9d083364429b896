"""`pydoc_text`: windows of Python's own documentation, real English text without a download."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxmodels.data import cache_folder, facts_text, tokenizer
from jaxmodels.data.text_lines import TextWindows

NAME = "pydoc_text"


def load_windows(
    data_dir: str | os.PathLike[str], split: str, length: int, vocab_size: int = 2000
) -> TextWindows:
    """Encodes the topics of a split once, keeps the tokens in `data_dir`, returns windows of them.

    Args:
      data_dir: folder of all data sets.
      split: "train" or "validation"; no topic is in both, and no paragraph: Python's topics repeat
        each other in places, and validation leaves out what stands in the training text.
      length: tokens of a window, special tokens included.
      vocab_size: ids of the BPE that is trained on the train split.

    Raises:
      ValueError: another split, a length below 3, or a vocabulary that is too small.
    """
    if length < 3:
        raise ValueError(f"length={length}: <s>, text and </s> take 3 tokens or more")
    topics = facts_text.topics()
    parts = facts_text.split_topics(topics)
    if split not in parts:
        raise ValueError(f"split={split!r}: use one of {sorted(parts)}")
    parts["validation"] = unseen(parts["validation"], parts["train"])
    settings = {
        "vocab_size": vocab_size,
        "topics_sha256": facts_text.topics_sha256(topics),
        "validation": "unseen paragraphs",
    }
    folder = Path(data_dir) / NAME / f"bpe{vocab_size}-{cache_folder.digest(settings)[:16]}"

    def build(work: Path) -> dict[str, Any]:
        path = work / "tokenizer.json"
        bpe = tokenizer.train_bpe(parts["train"].values(), vocab_size, (), path)
        for name, texts in parts.items():
            encoded = bpe.encode_batch(list(texts.values()), add_special_tokens=False)
            pieces = [[*document.ids, tokenizer.SEP_ID] for document in encoded]
            np.save(work / f"{name}.npy", np.concatenate(pieces)[:-1].astype(np.int32))
        return {}

    cache_folder.ensure(folder, settings, build, f"preparing {NAME} in {folder}")
    tokens = np.load(folder / f"{split}.npy", mmap_mode="r")
    identity = settings | {"name": NAME, "split": split, "length": length}
    return TextWindows(tokens, length, identity, str(folder / "tokenizer.json"))


def unseen(texts: Mapping[str, str], seen: Mapping[str, str]) -> dict[str, str]:
    """Returns texts without the paragraphs that stand in `seen` as well."""
    known = {paragraph for text in seen.values() for paragraph in text.split("\n\n")}
    kept = {
        name: "\n\n".join(part for part in text.split("\n\n") if part not in known)
        for name, text in texts.items()
    }
    return {name: text for name, text in kept.items() if text.strip()}
