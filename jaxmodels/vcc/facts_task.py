"""Look-up of planted facts in long real documents: the task that shows selection at work.

The question in front of the document is VIP; the answer, one of 16 values, is read at the
question's key token, as logits tied to the value embeddings. Nothing but the trunk is trained.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmodels.core import params as param_tree
from jaxmodels.core.task import Batch, Evaluator, Labels, Metrics, Params, Task
from jaxmodels.data import checks, pydoc_facts
from jaxmodels.data.facts_text import VALUES
from jaxmodels.vcc import initialization, losses, settings
from jaxmodels.vcc.facts_data import FactsData
from jaxmodels.vcc.inputs import check_inputs
from jaxmodels.vcc.model import gather_tokens

QUESTION_TOKENS = 7  # "what is the code of KEY ?"
FIELDS = (
    "input_ids",
    "attention_mask",
    "vip_mask",
    "question_positions",
    "answers",
    "answer_positions",
)


class FactsTask(Task):
    """Trains a trunk to answer questions about `pydoc_facts` documents."""

    def __init__(self, config: Any):
        """Checks the settings.

        Args:
          config: see `configs/vcc.py`.

        Raises:
          ValueError: settings that cannot work together.
        """
        self.config = config
        self.trunk = settings.trunk_config(config.model)
        self.vcc = settings.encoder_config(config.model)
        self.module = settings.make_trunk(self.trunk, self.vcc)
        self.data = FactsData(config)
        self.stages = self.data.stages
        vips, slots = 1 + QUESTION_TOKENS * config.data.questions, settings.num_slots(self.vcc)
        if slots is not None and vips > slots:
            raise ValueError(
                f"data.questions={config.data.questions} makes {vips} VIP tokens, but "
                f"model.num_vip={slots}; raise num_vip or ask fewer questions."
            )
        positions = config.data.length if self.restart is None else self.restart
        if positions > self.trunk.max_positions:
            named = "data.length" if self.restart is None else "model.segment_length"
            raise ValueError(
                f"{named}={positions} exceeds model.max_positions={self.trunk.max_positions}; "
                "raise it, or restart positions in every segment with model.positions=segment."
            )

    @property
    def restart(self) -> int | None:
        """Tokens after which positions restart; None where they run through the text."""
        model = self.config.model
        return model.segment_length if model.positions == "segment" else None

    @property
    def vocabulary(self) -> pydoc_facts.FactsVocabulary:
        """Token ids of keys and values; reads or trains the tokenizer."""
        return self.data.vocabulary

    def init(self, rng: jax.Array) -> Params:
        """See `Task.init`; a "copying" start is written over the random one."""
        rng_init, rng_copy = jax.random.split(rng)
        boxed = settings.init(self.module, rng_init)
        if self.config.model.init == "copying":
            kinds = settings.kinds(self.config.model)
            boxed = initialization.copying_params(rng_copy, boxed, kinds, self.trunk)
        return {"trunk": boxed}

    def param_groups(self, params: Params) -> Labels:
        """See `Task.param_groups`."""
        return param_tree.weight_decay_groups(params)

    def logits(
        self, params: Params, batch: Batch, rng: jax.Array | None = None
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Returns logits over the values [B, Q, 16], and what the VCC layers opened."""
        if self.restart is not None:
            positions = jnp.arange(batch["input_ids"].shape[1]) % self.restart
            positions = jnp.broadcast_to(positions, batch["input_ids"].shape)
            batch = dict(batch) | {"position_ids": positions}
        hidden, opened = settings.encode(self.module, params["trunk"], batch, rng)
        states = gather_tokens(hidden, batch["question_positions"])
        table = params["trunk"]["embeddings"]["word"]["embedding"]
        values = table[jnp.asarray(self.vocabulary.value_ids)]
        # Scaled like attention, so that the start is not saturated.
        return states @ values.T * self.trunk.d_model**-0.5, opened

    def loss(self, params: Params, batch: Batch, rng: jax.Array) -> tuple[jax.Array, Metrics]:
        """Cross-entropy over the values, a question each; see `Task.loss`."""
        logits, _ = self.logits(params, batch, rng)
        metrics = losses.cross_entropy(logits, batch["answers"])
        return metrics["loss"][0] / metrics["loss"][1], metrics

    def metrics(self, params: Params, batch: Batch) -> Metrics:
        """Loss, accuracy, and how often each VCC layer opened the block of the answer."""
        logits, opened = self.logits(params, batch)
        weight = jnp.broadcast_to(batch["weight"][:, None], batch["answers"].shape)
        found = losses.cross_entropy(logits, batch["answers"], weight)
        if opened:
            hits = self.answer_opened(batch, opened)
            for layer, hit in enumerate(hits):
                found[f"recall_vcc{layer + 1}"] = ((hit * weight).sum(), weight.sum())
        return found

    def answer_opened(self, batch: Batch, opened: dict[str, jax.Array]) -> jax.Array:
        """Returns [VCC layers, B, Q] float32: 1 where the block of the answer was opened."""
        rows = jnp.argsort(opened["order"], axis=-1)  # row of each token
        row = jnp.take_along_axis(rows, batch["answer_positions"], axis=1)
        block = (row - self.vcc.num_vip) // self.vcc.block_size
        fine = opened["fine_blocks"][:, :, None, :]
        return (fine == block[None, :, :, None]).any(axis=-1).astype(jnp.float32)

    def source(self, split: str, length: int, groups: int, documents: int) -> Any:
        """Returns the documents of a split, built on first use."""
        return self.data.source(split, length, groups, documents)

    def datasets(self, split: str) -> Any:
        """See `Task.datasets`: "train" runs through the curriculum, then stays at full length."""
        if split == "train":
            return self.data.train_batches(self._example)
        return self.data.eval_batches(self._example)

    def _example(self, record: dict[str, Any], rng: Any) -> dict[str, np.ndarray]:
        """Picks and checks the fields of a document."""
        del rng
        length = len(checks.check_field(record, "input_ids", shape=(None,)))
        highest = {"input_ids": self.trunk.vocab_size - 1, "answers": len(VALUES) - 1}
        kept = {
            name: checks.check_field(
                record, name, kinds="biu", low=0, high=highest.get(name, length - 1)
            ).astype(np.int32)
            for name in FIELDS
        }
        model = self.config.model
        mask, vip = check_inputs(
            kept["attention_mask"], kept["vip_mask"], model.num_vip, model.overflow
        )
        return kept | {"attention_mask": mask, "vip_mask": vip}

    def evaluators(self) -> dict[str, Evaluator]:
        """Accuracy on held-out topics, and recall of the answer's block by layer."""
        # One data set for all evaluations: its files are checked, and a bad record logged, once.
        return {"validation": Evaluator(lambda: self._validation, self.metrics)}

    @functools.cached_property
    def _validation(self) -> Any:
        return self.datasets("validation")

    def predict(self, params: Params, inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Answers questions about documents.

        Args:
          params: of the trained model.
          inputs: rows with `question` ("what is the code of KEY ?") and `document` (text).

        Returns:
          rows with `answer` (a value), `probability`, and `opened_blocks`: for each VCC layer,
          the (first token, last token) ranges it opened, best first.

        Raises:
          ValueError: a row without these fields, a question without a known key, or a document
            longer than data.length.
        """
        from jaxmodels.vcc import facts_predict

        return facts_predict.answer(self, params, inputs)
