"""Batches of `pydoc_facts` documents: short ones first where the config has a curriculum."""

import dataclasses
import functools
from typing import Any

from jaxmodels.data import folders, pipeline, pydoc_facts


class FactsData:
    """The documents that a config asks for.

    Attributes:
      config: see `configs/vcc.py`.
      stages: (length, fact groups, documents, batch size, steps) of each stage of training.
    """

    def __init__(self, config: Any):
        """Checks the sizes.

        Args:
          config: its group `data` and `model.vocab_size`.

        Raises:
          ValueError: settings that cannot work together.
        """
        self.config = config
        self.stages = curriculum(config)
        for length, groups, *_ in self.stages:
            self.documents(length, groups)

    @functools.cached_property
    def vocabulary(self) -> pydoc_facts.FactsVocabulary:
        """Token ids of keys and values; reads or trains the tokenizer."""
        return pydoc_facts.vocabulary(
            folders.data_dir(self.config.data.dir), self.config.model.vocab_size
        )

    def source(self, split: str, length: int, groups: int, documents: int) -> Any:
        """Returns the documents of a split, built on first use."""
        train, validation = (documents, 0) if split == "train" else (0, documents)
        wanted = dataclasses.replace(
            self.documents(length, groups),
            train_documents=train,
            validation_documents=validation,
        )
        return pydoc_facts.load(folders.data_dir(self.config.data.dir), split, wanted)

    def documents(self, length: int, groups: int) -> pydoc_facts.FactsConfig:
        """Settings of the documents of one length.

        Raises:
          ValueError: the facts do not fit into that length.
        """
        data = self.config.data
        try:
            return pydoc_facts.FactsConfig(
                length=length,
                questions=data.questions,
                fact_groups=groups,
                facts_per_group=data.facts_per_group,
                slot=data.slot,
                vocab_size=self.config.model.vocab_size,
                seed=data.seed,
            )
        except ValueError as error:
            raise ValueError(f"data.length, data.fact_groups or data.questions: {error}") from error

    def train_batches(self, example: Any) -> Any:
        """Returns batches through the curriculum, then at full length without end.

        Args:
          example: record -> arrays, see `pipeline.Stage`.
        """
        stages = [
            pipeline.Stage(self.source("train", length, groups, documents), example, batch, steps)
            for length, groups, documents, batch, steps in self.stages
        ]
        options = pipeline.options_from(self.config.data)
        return pipeline.train_batches(stages, seed=self.config.seed, options=options)

    def eval_batches(self, example: Any) -> Any:
        """Returns the held-out documents once; `example` as for `train_batches`."""
        data = self.config.data
        source = self.source("validation", data.length, data.fact_groups, data.validation_documents)
        options = pipeline.options_from(data)
        return pipeline.eval_batches(source, example, self.config.batch_size, options=options)


def curriculum(config: Any) -> list[tuple[int, int, int, int, int | None]]:
    """Returns (length, fact groups, documents, batch size, steps) of each stage.

    Raises:
      ValueError: lists of different lengths, or more curriculum steps than steps in all.
    """
    data = config.data
    lists = {
        name: tuple(data[f"curriculum_{name}"])
        for name in ("lengths", "groups", "batches", "steps")
    }
    sizes = {name: len(values) for name, values in lists.items()}
    if len(set(sizes.values())) > 1:
        raise ValueError(f"data.curriculum_* name different numbers of stages: {sizes}.")
    for batch in lists["batches"]:
        if batch % config.micro_batches:
            raise ValueError(
                f"data.curriculum_batches holds {batch}, which micro_batches="
                f"{config.micro_batches} does not divide; choose multiples of it."
            )
    spent = sum(lists["steps"])
    if spent >= config.total_steps and spent:
        raise ValueError(
            f"data.curriculum_steps takes {spent} steps of total_steps={config.total_steps}; "
            "raise total_steps, so that training reaches data.length."
        )
    early = [
        (length, groups, batch * steps, batch, steps)
        for length, groups, batch, steps in zip(*lists.values(), strict=True)
    ]
    last = (data.length, data.fact_groups, data.train_documents, config.batch_size, None)
    return [*early, last]
