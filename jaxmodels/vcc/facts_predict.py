"""Answers of a trained facts model to a user's own questions and documents."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmodels.core.task import Batch, Params
from jaxmodels.data import tokenizer
from jaxmodels.vcc.opened import block_ranges


def answer(task: Any, params: Params, inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Answers the question of every row; arguments and errors as of `FactsTask.predict`.

    Args:
      task: the `FactsTask`.
      params: of the trained model.
      inputs: rows with `question` and `document`.
    """
    bpe = tokenizer.load(task.vocabulary.tokenizer_path)
    batches = [_encode(task, bpe, number, row) for number, row in enumerate(inputs, start=1)]
    run = jax.jit(task.logits)  # compiles once a bucket of lengths
    outputs = []
    for batch in batches:
        logits, opened = run(params, batch)
        chances = jax.nn.softmax(logits[0, 0])
        best = int(chances.argmax())
        outputs.append(
            {
                "answer": bpe.decode([task.vocabulary.value_ids[best]]).strip(),
                "probability": round(float(chances[best]), 6),
                "opened_blocks": block_ranges(opened, task.vcc),
            }
        )
    return outputs


def _encode(task: Any, bpe: Any, number: int, row: dict[str, Any]) -> Batch:
    """Encodes [CLS] question document, padded to a power of two.

    Raises:
      ValueError: see `FactsTask.predict`.
    """
    texts = [row.get(name) for name in ("question", "document")]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(
            f"row {number}: the text fields 'question' and 'document' are needed, found "
            f"{sorted(row)}."
        )
    words = task.vocabulary
    question, document = (bpe.encode(" " + text, add_special_tokens=False).ids for text in texts)
    keys = [i for i, token in enumerate(question) if token in words.key_ids]
    if len(keys) != 1:
        known = ", ".join(bpe.decode([token]).strip() for token in words.key_ids[:8])
        raise ValueError(
            f"row {number}: the question names {len(keys)} keys; it must name exactly one key "
            f"that the model was trained on ({known}, ...), like 'what is the code of KEY ?'."
        )
    ids = [words.cls_id, *question, *document]
    longest, slots = task.config.data.length, task.config.model.num_vip
    if len(ids) > longest or 1 + len(question) > slots:
        raise ValueError(
            f"row {number}: {len(ids)} tokens, {1 + len(question)} of them in the question; the "
            f"model takes {longest} tokens and questions of {slots - 1}."
        )
    length = 1 << (len(ids) - 1).bit_length()
    positions = np.arange(length)
    padded = np.pad(ids, (0, length - len(ids)), constant_values=words.pad_id)
    batch = {
        "input_ids": padded[None],
        "attention_mask": (positions < len(ids))[None],
        "vip_mask": (positions < 1 + len(question))[None],
        "question_positions": np.asarray([[1 + keys[0]]]),
    }
    return {name: jnp.asarray(x, jnp.int32) for name, x in batch.items()}
