"""The paper's text metrics of a trained model: generate a split, judge the decoded answers.

The evaluators of a run count exactly equal tokens, which needs no text; F1 and ROUGE do, so they
are computed here, on the host:

    task, params = ...                                   # a `Seq2SeqTask` and trained parameters
    text_scores(task, params, "validation")              # {"rouge1": 0.41, ..., "count": 972.0}
"""

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np

from jaxmodels.core.task import Params
from jaxmodels.data import pipeline


def text_scores(
    task: Any, params: Params, split: str = "validation", *, batches: int | None = None
) -> dict[str, float]:
    """Returns the exact means of the data set's metrics over a split.

    Args:
      task: a `Seq2SeqTask` on one of the paper's data sets.
      params: of the trained model.
      split: "validation", or "test" where its answers are published.
      batches: judge the first so many batches alone; None: all.

    Returns:
      metrics by name, 0 to 1, and `count`, the records judged.

    Raises:
      ValueError: the task's data set has no answers in text, or the split is empty.
    """
    data = task.data
    if not hasattr(data, "scores"):
        raise ValueError(
            f"data.name={task.config.data.name!r} has no answers in text: use a data set of "
            "questions or summaries"
        )
    options = pipeline.options_from(task.config.data)
    dataset = data.eval_batches(split, task.config.batch_size, options=options)

    def generated() -> Iterator[tuple[Any, np.ndarray]]:
        for batch in itertools.islice(iter(dataset), batches):
            # The first token is the decoder's start.
            yield batch, np.asarray(task.generate(params, batch).sequences)[:, 1:]

    return data.scores(split, generated())
