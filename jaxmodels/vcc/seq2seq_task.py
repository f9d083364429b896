"""Sequence-to-sequence training of T5-VCC on any data set that keeps this contract.

A batch, all int32:

    input_ids       [B, n]   query and context, padding behind
    attention_mask  [B, n]   1 on real tokens
    vip_mask        [B, n]   1 on VIP tokens: at most model.num_vip of them, none on padding
    labels          [B, T]   the answer, closed by end-of-sequence; -100 where nothing counts

and, in evaluations, `weight` [B] float32: 0 on rows that only fill the last batch. Decoder inputs
are made of the labels (`t5.shift_right`). A data set is an object with

    train_batches(batch_size, seed=..., options=...)   a grain data set without end
    eval_batches(split, batch_size, options=...)       every record once
    example.encode(query, context)                     one row without labels, for predictions
    example.decode(ids)                                the text of generated ids
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxmodels import decoding
from jaxmodels.core import params as param_tree
from jaxmodels.core.losses import IGNORE, cross_entropy
from jaxmodels.core.task import Batch, Evaluator, Labels, Metrics, Params, Task
from jaxmodels.data import pipeline
from jaxmodels.trunks import t5
from jaxmodels.vcc import seq2seq_predict, settings
from jaxmodels.vcc.seq2seq_choices import open_data


class Seq2SeqTask(Task):
    """Trains T5 or T5-VCC to generate the answers of a data set.

    Attributes:
      config: see `configs/vcc_t5.py`.
      trunk: sizes of T5.
      vcc: how its encoder compresses, or the `SparsePattern` that it has instead.
      model: `VccT5`, `SparseT5`, or `t5.T5` where every layer is dense; one tree of parameters.
      data: what `config.data.name` asks for.
      ends: ids of end-of-sequence and padding.
    """

    def __init__(self, config: Any):
        """Checks the settings; no data is read yet.

        Raises:
          ValueError: settings that cannot work together.
        """
        self.config = config
        self.trunk = settings.t5_config(config.model)
        self.vcc = settings.encoder_config(config.model)
        self.model = settings.make_t5(self.trunk, self.vcc)
        self.data, self.ends = open_data(config)

    def init(self, rng: jax.Array) -> Params:
        """See `Task.init`."""
        return settings.init(self.model, rng)

    def param_groups(self, params: Params) -> Labels:
        """See `Task.param_groups`."""
        return param_tree.weight_decay_groups(params)

    def logits(self, params: Params, batch: Batch, rng: jax.Array | None = None) -> jax.Array:
        """Returns the logits [B, T, vocab_size] of the labels, each from those before it."""
        inputs = t5.shift_right(batch["labels"], self.trunk.start_id, self.ends[1])
        rngs = None if rng is None else {"dropout": rng}
        return self.model.apply(
            {"params": params},
            batch["input_ids"],
            batch["attention_mask"],
            inputs,
            deterministic=rng is None,
            rngs=rngs,
            **settings.vips(self.model, batch),
        )

    def loss(self, params: Params, batch: Batch, rng: jax.Array) -> tuple[jax.Array, Metrics]:
        """Mean cross-entropy of the labels that count; see `Task.loss`."""
        metrics = cross_entropy(self.logits(params, batch, rng), batch["labels"])
        total, weight = metrics["loss"]
        return total / jnp.maximum(weight, 1.0), metrics

    def metrics(self, params: Params, batch: Batch) -> Metrics:
        """Loss and accuracy of the next token, and the share of answers generated exactly."""
        labels, weight = batch["labels"], batch["weight"]
        found = cross_entropy(self.logits(params, batch), labels, weight[:, None])
        if self.config.decode.in_evaluation:
            right = exactly(self.generate(params, batch).sequences[:, 1:], labels, self.ends)
            found["exact_match"] = ((right * weight).sum(), weight.sum())
        return found

    @functools.cached_property
    def generator(self) -> decoding.Generator:
        """Greedy or beam search as `config.decode` says."""
        decode, (eos, pad) = self.config.decode, self.ends
        wanted = decoding.GenerationSettings(
            max_new_tokens=self.config.data.target_length,
            num_beams=decode.num_beams,
            length_penalty=decode.length_penalty,
            eos_token_id=eos,
            pad_token_id=pad,
        )
        return decoding.Generator(self.model, wanted)

    def generate(self, params: Params, batch: Batch) -> decoding.Generated:
        """Returns generated ids: `sequences` [B, 1 + T], the start token first."""
        return self.generator(
            params,
            batch["input_ids"],
            batch["attention_mask"],
            **settings.vips(self.model, batch),
        )

    def datasets(self, split: str) -> Any:
        """See `Task.datasets`."""
        config, options = self.config, pipeline.options_from(self.config.data)
        if split == "train":
            return self.data.train_batches(config.batch_size, seed=config.seed, options=options)
        return self.data.eval_batches(split, config.batch_size, options=options)

    def evaluators(self) -> dict[str, Evaluator]:
        """Numbers on the validation split, where the data set has one."""
        if self.config.data.name == "span_corruption" and not self.data.has_validation():
            return {}
        # One data set for all evaluations: its files are checked, and a bad record logged, once.
        return {"validation": Evaluator(lambda: self._validation, self.metrics)}

    @functools.cached_property
    def _validation(self) -> Any:
        return self.datasets("validation")

    def predict(self, params: Params, inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Generates an answer for every row.

        Args:
          params: of the trained model.
          inputs: rows with `query` and `context` (text).

        Returns:
          rows with `answer` and, of a compressed model, `opened_blocks`: for each VCC layer the
          (first token, last token) ranges it opened, best first.

        Raises:
          ValueError: a row without these fields, or a query that does not fit the model.
        """
        return seq2seq_predict.answer(self, params, inputs)


def exactly(tokens: jax.Array, labels: jax.Array, ends: tuple[int, int]) -> jax.Array:
    """Returns 1.0 where generated tokens [B, T] are the labels [B, T], [B] float32.

    Args:
      tokens: padded behind the end-of-sequence.
      labels: -100 where nothing counts.
      ends: (end-of-sequence id, padding id).
    """
    wanted = jnp.where(labels == IGNORE, ends[1], labels)
    return (tokens == wanted).all(axis=-1).astype(jnp.float32)
