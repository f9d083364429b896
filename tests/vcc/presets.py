"""Presets of configs/vcc.py with changes, and the little text files that some of them need."""

import pathlib
from typing import Any

from ml_collections import ConfigDict

from configs import fields
from configs import vcc as presets

TEXT = "A first sentence here. The second one is not long. And a third one closes it."


def text_file(folder: pathlib.Path, paragraphs: int = 1) -> str:
    """Writes paragraphs of different words and returns the path."""
    path = folder / "corpus.txt"
    lines = [
        f"{TEXT} Paragraph {i} speaks of {i * i} and {i % 7} things." for i in range(paragraphs)
    ]
    path.write_text("\n\n".join(lines), encoding="utf-8")
    return str(path)


def build(preset: str, **changes: Any) -> ConfigDict:
    """The preset's config; `__` in a keyword stands for the dot of a field's name."""
    changes = {name.replace("__", "."): value for name, value in changes.items()}
    return fields.build(presets.FIELDS, presets.PRESETS[preset] | changes)


def tiny_facts(**changes: Any) -> ConfigDict:
    """The quickstart on documents of 128 tokens with one question, without a curriculum."""
    small = {f"data__curriculum_{name}": () for name in ("lengths", "groups", "batches", "steps")}
    small |= {"data__length": 128, "data__fact_groups": 3, "data__train_documents": 16}
    small |= {"data__validation_documents": 24, "batch_size": 4, "model__num_fine_blocks": 3}
    small |= {"data__questions": 1, "model__num_vip": 16, "model__block_size": 16}
    return build("quickstart", **(small | changes))


def tiny_text(folder: pathlib.Path, preset: str = "roberta_base_4k", **changes: Any) -> ConfigDict:
    """A masked-LM preset on sequences of 96 tokens, with its text in `folder`."""
    small = {"data__files": (text_file(folder, 40),), "data__dir": str(folder / "data")}
    small |= {"data__length": 96, "data__num_masked": 8, "batch_size": 2, "model__vocab_size": 320}
    small |= {"model__d_model": 16, "model__num_layers": 3, "model__num_local_layers": 1}
    small |= {"model__num_heads": 2, "model__d_ff": 32, "model__max_positions": 96}
    small |= {"model__segment_length": 32, "model__num_vip": 8, "model__num_fine_blocks": 2}
    return build(preset, **(small | changes))
