"""`pydoc_facts` as questions and generated answers, for sequence-to-sequence models.

The encoder reads the questions (VIP) and the document, the decoder writes the asked values in the
order of the questions. Nothing has to be downloaded.
"""

from typing import Any

import numpy as np

from jaxmodels.core.losses import IGNORE
from jaxmodels.data import checks, facts_text, tokenizer
from jaxmodels.vcc.facts_data import FactsData
from jaxmodels.vcc.inputs import check_inputs

MASKS = ("attention_mask", "vip_mask")


class FactsAnswers:
    """Batches as `seq2seq_task` wants them."""

    def __init__(self, config: Any):
        """Checks the sizes.

        Args:
          config: see `configs/vcc_t5.py`.

        Raises:
          ValueError: settings that cannot work together.
        """
        self.facts, data = FactsData(config), config.data
        if data.target_length <= data.questions:
            raise ValueError(
                f"data.target_length={data.target_length}: {data.questions} answers and the end "
                f"take {data.questions + 1} tokens; raise it to at least that."
            )
        num_vip = self.facts.documents(data.length, data.fact_groups).layout.num_vip
        if num_vip > config.model.num_vip:
            raise ValueError(
                f"data.questions={data.questions} makes {num_vip} VIP tokens, but model.num_vip="
                f"{config.model.num_vip}; raise num_vip or ask fewer questions."
            )
        self.example = FactsExample(self.facts, config)

    def train_batches(self, batch_size: int, *, seed: int, options: Any = None) -> Any:
        """Returns batches through the curriculum, then at full length without end."""
        del batch_size, seed, options  # they stand in the config
        return self.facts.train_batches(self.example)

    def eval_batches(self, split: str, batch_size: int, *, options: Any = None) -> Any:
        """Returns the held-out documents once."""
        del split, batch_size, options
        return self.facts.eval_batches(self.example)


class FactsExample:
    """The transform of a document into an example, and back from ids to words."""

    def __init__(self, facts: FactsData, config: Any):
        """Keeps the settings."""
        self.facts, self.length = facts, config.data.length
        self.target_length, self.model = config.data.target_length, config.model

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What decides the examples beside the documents, as JSON values."""
        return {"target_length": self.target_length, "num_vip": self.model.num_vip}

    def __call__(self, record: dict[str, Any], rng: Any = None) -> dict[str, np.ndarray]:
        """Returns the arrays of one example, all int32."""
        del rng
        top = {"input_ids": self.model.vocab_size - 1, "answers": len(facts_text.VALUES) - 1}
        kept = {
            name: checks.check_field(record, name, kinds="biu", low=0, high=top.get(name, 1))
            for name in ("input_ids", "answers", *MASKS)
        }
        words = self.facts.vocabulary
        ids = [words.value_ids[answer] for answer in kept.pop("answers")] + [words.sep_id]
        pad = (0, self.target_length - len(ids))
        kept["labels"] = np.pad(np.asarray(ids), pad, constant_values=IGNORE)
        masks = check_inputs(*(kept[name] for name in MASKS), self.model.num_vip)
        return {
            k: v.astype(np.int32) for k, v in (kept | dict(zip(MASKS, masks, strict=True))).items()
        }

    def encode(self, query: str, context: str) -> dict[str, np.ndarray]:
        """Returns `input_ids` and both masks [n] of questions and a document.

        Raises:
          ValueError: they are too long.
        """
        bpe = tokenizer.load(self.facts.vocabulary.tokenizer_path)
        parts = [bpe.encode(" " + text, add_special_tokens=False).ids for text in (query, context)]
        ids, marked = [tokenizer.CLS_ID, *parts[0], *parts[1]], 1 + len(parts[0])
        if len(ids) > self.length or marked > self.model.num_vip:
            raise ValueError(
                f"{len(ids)} tokens, {marked} of them in the query; the model takes {self.length} "
                f"tokens and queries of {self.model.num_vip - 1}."
            )
        places = np.arange(self.length)
        padded = np.pad(ids, (0, self.length - len(ids)), constant_values=tokenizer.PAD_ID)
        arrays = {"input_ids": padded, "attention_mask": places < len(ids)}
        return {k: v.astype(np.int32) for k, v in (arrays | {"vip_mask": places < marked}).items()}

    def decode(self, ids: Any) -> str:
        """Returns the text of generated ids, up to end-of-sequence."""
        kept = np.asarray(ids).tolist()
        if tokenizer.SEP_ID in kept:
            kept = kept[: kept.index(tokenizer.SEP_ID)]
        bpe = tokenizer.load(self.facts.vocabulary.tokenizer_path)
        return bpe.decode(kept).strip()
