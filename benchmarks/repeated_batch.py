"""A method for `train.main` whose training data are one batch, again and again; the rest is VCC.

The side without input work in `trainer_overhead`: --config.method=benchmarks.repeated_batch.
"""

import itertools
from typing import Any

from ml_collections import ConfigDict

from jaxmodels.vcc import task


def make_task(config: ConfigDict) -> Any:
    """Returns VCC's task of these settings, with its first training batch repeated without end."""
    made = task.make_task(config)
    plain = made.datasets
    made.datasets = lambda split: Repeated(plain(split)) if split == "train" else plain(split)
    return made


class Repeated:
    """The first batch of a data set, for ever."""

    def __init__(self, dataset: Any):
        """Takes an iterable of numpy batches; one is read, once iteration begins."""
        self._dataset = dataset

    def __iter__(self) -> Any:
        return itertools.repeat(next(iter(self._dataset)))
