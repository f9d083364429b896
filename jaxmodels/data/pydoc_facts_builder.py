"""The TFDS builder of `pydoc_facts`; it needs TFDS, so `pydoc_facts.py` imports it in functions."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from jaxmodels.data import facts_documents, facts_text, tokenizer


@dataclasses.dataclass
class PydocFactsConfig(tfds.core.BuilderConfig):
    """Settings of one build, as `jaxmodels.data.pydoc_facts.FactsConfig` describes them.

    Attributes:
      layout: sizes of a document.
      records: documents of each split.
      seed: seed of the documents.
      tokenizer_path: the BPE in which every word of the facts is one token.
    """

    layout: facts_documents.FactsLayout = facts_documents.FactsLayout()
    records: dict[str, int] = dataclasses.field(default_factory=dict)
    seed: int = 0
    tokenizer_path: str = ""


class PydocFacts(tfds.core.GeneratorBasedBuilder):
    """Windows of Python's documentation in which facts to look up are planted."""

    name = "pydoc_facts"
    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First release."}
    BUILDER_CONFIGS: list[PydocFactsConfig] = []

    def _info(self) -> tfds.core.DatasetInfo:
        layout = self.builder_config.layout
        stream_dtype = np.uint16 if self._bpe().get_vocab_size() <= 2**16 else np.int32

        def integers(size: int) -> tfds.features.Tensor:
            return tfds.features.Tensor(shape=(size,), dtype=np.int32)

        features = {
            # Raw bytes: read back as fast as memory, where a list of int64 takes four times the
            # space.
            "input_ids": tfds.features.Tensor(
                shape=(layout.length,), dtype=stream_dtype, encoding="bytes"
            ),
            "num_vip": tfds.features.Scalar(dtype=np.int32),
            "question_positions": integers(layout.questions),
            "answers": integers(layout.questions),
            "answer_positions": integers(layout.questions),
            "fact_positions": integers(layout.num_facts),
        }
        return tfds.core.DatasetInfo(
            builder=self,
            description=facts_documents.__doc__,
            features=tfds.features.FeaturesDict(features),
            homepage="https://docs.python.org/3/",
            license="PSF-2.0 (the text is Python's documentation)",
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        del dl_manager  # the text ships with Python
        texts = facts_text.split_topics(facts_text.topics())
        return {
            split: self._generate_examples(number, split, texts[split])
            for number, split in enumerate(texts)
            if self.builder_config.records.get(split, 0)
        }

    def _generate_examples(
        self, number: int, split: str, texts: dict[str, str]
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        bpe = self._bpe()
        documents = facts_documents.generate(
            self.builder_config.layout,
            bpe,
            facts_documents.token_stream(bpe, texts),
            count=self.builder_config.records[split],
            seed=self.builder_config.seed,
            split=number,
        )
        yield from enumerate(documents)

    def _bpe(self) -> Any:
        return tokenizer.load(self.builder_config.tokenizer_path)
