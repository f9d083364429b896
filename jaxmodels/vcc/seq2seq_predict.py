"""Generated answers of a trained sequence-to-sequence model to a user's own rows."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmodels.core.task import Params
from jaxmodels.vcc.opened import block_ranges
from jaxmodels.vcc.t5_model import VccT5


def answer(task: Any, params: Params, inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Answers every row; see `Seq2SeqTask.predict`.

    Args:
      task: the `Seq2SeqTask`.
      params: of the trained model.
      inputs: rows with `query` and `context`.
    """
    encoded = [_encode(task, number, row) for number, row in enumerate(inputs, start=1)]
    model = task.model

    @jax.jit
    def traced(params: Params, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
        args = (batch["input_ids"], batch["attention_mask"])
        bound = model.bind({"params": params})
        return bound.encode_traced(*args, vip_mask=batch["vip_mask"])[1]

    outputs = []
    for example in encoded:
        batch = {name: jnp.asarray(x)[None] for name, x in example.items()}
        ids = np.asarray(task.generate(params, batch).sequences)[0, 1:]
        row: dict[str, Any] = {"answer": task.data.example.decode(ids)}
        if isinstance(model, VccT5):
            row["opened_blocks"] = block_ranges(traced(params, batch), task.vcc)
        outputs.append(row)
    return outputs


def _encode(task: Any, number: int, row: dict[str, Any]) -> dict[str, np.ndarray]:
    texts = [row.get(name) for name in ("query", "context")]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(
            f"row {number}: the text fields 'query' and 'context' are needed, found {sorted(row)}."
        )
    encode = getattr(task.data.example, "encode", None)
    if encode is None:
        raise ValueError(f"data.name={task.config.data.name!r} has no questions to answer.")
    try:
        return encode(*texts)
    except ValueError as error:
        raise ValueError(f"row {number}: {error}") from error
