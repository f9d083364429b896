"""Question answering with RoBERTa: WikiHop and QuALITY by choice, HotpotQA by span (section 6)."""

import functools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmodels.core import params as param_tree
from jaxmodels.core.losses import IGNORE
from jaxmodels.core.task import Batch, Evaluator, Labels, Metrics, Params, Task
from jaxmodels.data import cache_folder, folders, pipeline, tokenizer
from jaxmodels.vcc import choice_example, heads, hotpotqa_example, losses, qa_sources, settings
from jaxmodels.vcc.model import gather_tokens

_TOKENIZER_RECORDS = 2000  # enough text for a tokenizer of a small model


class RobertaQATask(Task):
    """Trains a trunk and a head to answer the questions of a data set.

    Attributes:
      config: see `configs/vcc.py`.
      trunk, vcc: sizes, and how the encoder compresses (a `SparsePattern` where it does not).
      module: the trunk.
      head: of the data set; its parameters are beside the trunk's.
    """

    head_name = ""

    def __init__(self, config: Any):
        """Checks the settings; no data is read yet.

        Raises:
          ValueError: settings that cannot work together.
        """
        self.config = config
        self.trunk = settings.trunk_config(config.model)
        self.vcc = settings.encoder_config(config.model)
        self.module = settings.make_trunk(self.trunk, self.vcc)
        self.head = self.make_head()
        if config.data.length > self.trunk.max_positions:
            raise ValueError(
                f"data.length={config.data.length} exceeds model.max_positions="
                f"{self.trunk.max_positions}; shorten the sequences or raise it."
            )

        if config.model.positions != "text":
            raise ValueError(
                f"model.positions=segment is for pydoc_facts; {config.data.name} needs 'text'."
            )

    def make_head(self) -> Any:
        """Returns the head's module."""
        raise NotImplementedError

    def make_example(self, tokenizer_path: str) -> Any:
        """Returns the transform of a record."""
        raise NotImplementedError

    def init(self, rng: jax.Array) -> Params:
        """See `Task.init`."""
        rng_trunk, rng_head = jax.random.split(rng)
        states = np.zeros((1, 1, self.trunk.d_model), np.float32)
        head = self.head.init(rng_head, states)["params"]
        return {"trunk": settings.init(self.module, rng_trunk), self.head_name: head}

    def param_groups(self, params: Params) -> Labels:
        """See `Task.param_groups`."""
        return param_tree.weight_decay_groups(params)

    def source(self, split: str) -> Any:
        """Returns the records of a split, opened once."""
        if split not in self._sources:
            data = self.config.data
            self._sources[split] = qa_sources.open_split(
                data.name, split, data_dir=folders.data_dir(data.dir), path=data.path
            )
        return self._sources[split]

    @functools.cached_property
    def _sources(self) -> dict[str, Any]:
        return {}

    @functools.cached_property
    def example(self) -> Any:
        """The transform, with a tokenizer that fits the word table.

        Raises:
          ValueError: the tokenizer has more ids, with the marks, than the model has rows.
        """
        data = self.config.data
        path = str(Path(data.tokenizer).expanduser()) if data.tokenizer else self._train_tokenizer()
        example = self.make_example(path)
        ids = example.tokenizer.get_vocab_size()
        if ids > self.trunk.vocab_size:
            raise ValueError(
                f"{path} has {ids} ids with the marks of {data.name}, model.vocab_size is "
                f"{self.trunk.vocab_size}; raise it to at least {ids}."
            )
        return example

    def _train_tokenizer(self) -> str:
        source = self.source("train")
        kept = self.trunk.vocab_size - 8  # the marks follow
        described = dict(source.fingerprint) | {"vocab_size": kept}
        root = folders.data_dir(self.config.data.dir) / "roberta_tokenizer"
        folder = root / cache_folder.digest(described)[:16]

        def build(work: Path) -> dict[str, Any]:
            tokenizer.train_bpe(_texts(source), kept, (), work / "tokenizer.json")
            return {}

        cache_folder.ensure(folder, described, build, f"training a tokenizer on {source!r}")
        return str(folder / "tokenizer.json")

    def datasets(self, split: str) -> Any:
        """See `Task.datasets`."""
        options, batch_size = pipeline.options_from(self.config.data), self.config.batch_size
        source = self.source(split)
        if split != "train":
            return pipeline.eval_batches(source, self.example, batch_size, options=options)
        stage = pipeline.Stage(source, self.example, batch_size)
        return pipeline.train_batches([stage], seed=self.config.seed, options=options)

    def evaluators(self) -> dict[str, Evaluator]:
        """Numbers on the validation split."""
        # One data set for all evaluations: its files are checked, and a bad record logged, once.
        return {"validation": Evaluator(lambda: self._validation, self.metrics)}

    @functools.cached_property
    def _validation(self) -> Any:
        return self.datasets("validation")

    def metrics(self, params: Params, batch: Batch) -> Metrics:
        """Returns the numbers of an evaluation batch; rows of weight 0 do not count."""
        raise NotImplementedError

    @property
    def slots(self) -> int | None:
        """VIP slots of the model; None where no layer compresses."""
        return settings.num_slots(self.vcc)


class ChoiceTask(RobertaQATask):
    """WikiHop and QuALITY: the candidate whose opening token scores highest."""

    head_name = "classifier"

    def make_head(self) -> heads.MultipleChoiceHead:
        """See `RobertaQATask`."""
        return heads.MultipleChoiceHead()

    def make_example(self, tokenizer_path: str) -> choice_example.ChoiceExample:
        """See `RobertaQATask`."""
        data = self.config.data
        wanted = choice_example.ChoiceSettings(
            length=data.length,
            num_vip=self.slots,
            max_choices=data.max_choices,
            num_types=self.trunk.num_token_types if data.part_types else None,
            overflow=self.config.model.overflow,
            shuffle=data.shuffle,
        )
        return choice_example.ChoiceExample(data.name, wanted, tokenizer_path)

    def scores(self, params: Params, batch: Batch, rng: jax.Array | None = None) -> jax.Array:
        """Returns the scores [B, c] of the candidates, before invalid ones are lowered."""
        hidden, _ = settings.encode(self.module, params["trunk"], batch, rng)
        states = gather_tokens(hidden, batch["candidate_positions"])
        return self.head.apply({"params": params["classifier"]}, states)

    def loss(self, params: Params, batch: Batch, rng: jax.Array) -> tuple[jax.Array, Metrics]:
        """Cross-entropy over the candidates; see `Task.loss`."""
        scores = self.scores(params, batch, rng)
        found = losses.multiple_choice(scores, batch["candidate_mask"], batch["answer"])
        return losses.mean(found["loss"]), found

    def metrics(self, params: Params, batch: Batch) -> Metrics:
        """Loss and accuracy of an evaluation batch."""
        answers = jnp.where(batch["weight"] > 0, batch["answer"], IGNORE)
        return losses.multiple_choice(self.scores(params, batch), batch["candidate_mask"], answers)

    def predict(self, params: Params, inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Chooses a candidate for every row.

        Args:
          params: of the trained model.
          inputs: rows with `question` (text), `candidates` and `supports` (lists of texts).

        Returns:
          rows with `answer` and `probabilities`, a number for each candidate.

        Raises:
          ValueError: a row without these fields, or one that does not fit the model.
        """
        run, outputs = jax.jit(self.scores), []
        for number, row in enumerate(inputs, start=1):
            try:
                texts = row["question"], row["candidates"], row["supports"]
                batch = self.example.encode(*texts)
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(
                    f"row {number}: 'question', 'candidates' and 'supports' that fit the model are "
                    f"needed ({type(error).__name__}: {error})"
                ) from error
            scores = run(params, {name: array[None] for name, array in batch.items()})
            chances = np.asarray(jax.nn.softmax(scores[0, : len(row["candidates"])]))
            best = row["candidates"][int(chances.argmax())]
            outputs.append({"answer": best, "probabilities": chances.round(6).tolist()})
        return outputs


class HotpotQATask(RobertaQATask):
    """HotpotQA: yes, no or a span, with the paragraphs and sentences that support it."""

    head_name = "hotpotqa"

    def make_head(self) -> heads.HotpotQAHead:
        """See `RobertaQATask`."""
        return heads.HotpotQAHead()

    def make_example(self, tokenizer_path: str) -> hotpotqa_example.HotpotQAExample:
        """See `RobertaQATask`."""
        data = self.config.data
        wanted = hotpotqa_example.HotpotQASettings(
            length=data.length,
            num_vip=self.slots,
            num_types=self.trunk.num_token_types if data.part_types else None,
            mark_context=data.mark_context,
            overflow=self.config.model.overflow,
            shuffle=data.shuffle,
        )
        return hotpotqa_example.HotpotQAExample(wanted, tokenizer_path)

    def logits(
        self, params: Params, batch: Batch, rng: jax.Array | None = None
    ) -> heads.HotpotQALogits:
        """Returns the logits of all heads."""
        hidden, _ = settings.encode(self.module, params["trunk"], batch, rng)
        return self.head.apply({"params": params["hotpotqa"]}, hidden)

    def loss(self, params: Params, batch: Batch, rng: jax.Array) -> tuple[jax.Array, Metrics]:
        """(start + end) / 2 + type + sentence + paragraph; see `Task.loss`."""
        logits = self.logits(params, batch, rng)
        loss, found = losses.hotpotqa(logits, batch["attention_mask"], batch)
        rows = jnp.float32(batch["input_ids"].shape[0])
        return loss, found | {"loss": (loss * rows, rows)}

    def metrics(self, params: Params, batch: Batch) -> Metrics:
        """Losses and accuracies of every head, and the share of answers that are right.

        An answer is right where its type is and, for a span, both ends are those of its first
        occurrence.
        """
        counts = batch["weight"] > 0
        logits = self.logits(params, batch)
        kept = dict(batch)
        for name in ("paragraph_labels", "sentence_labels", "start", "end"):
            kept[name] = jnp.where(counts[:, None], batch[name], IGNORE)
        kept["answer_type"] = jnp.where(counts, batch["answer_type"], IGNORE)
        _, found = losses.hotpotqa(logits, batch["attention_mask"], kept)
        kind, first, last = self.answers(logits, batch["attention_mask"])
        spans = hotpotqa_example.ANSWER_TYPES.index("span")
        same = (first == batch["start"][:, 0]) & (last == batch["end"][:, 0])
        right = (kind == batch["answer_type"]) & ((kind != spans) | same)
        return found | {"answer_accuracy": ((right & counts).sum(), counts.sum())}

    def answers(
        self, logits: heads.HotpotQALogits, mask: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Returns the likeliest type, first and last token, [B] each."""
        first, last = losses.best_span(*losses.span_logits(logits, mask))
        return logits.answer_type.argmax(axis=-1), first, last

    def predict(self, params: Params, inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Answers the question of every row.

        Args:
          params: of the trained model.
          inputs: rows with `question` (text) and `paragraphs`, a list of [title, [sentence, ...]].

        Returns:
          rows with `answer`.

        Raises:
          ValueError: a row without these fields, or one that does not fit the model.
        """

        @jax.jit
        def run(params: Params, batch: Batch) -> tuple[jax.Array, jax.Array, jax.Array]:
            return self.answers(self.logits(params, batch), batch["attention_mask"])

        outputs = []
        for number, row in enumerate(inputs, start=1):
            try:
                batch, _ = self.example.encode(row["question"], row["paragraphs"])
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(
                    f"row {number}: 'question' and 'paragraphs' that fit the model are needed "
                    f"({type(error).__name__}: {error})"
                ) from error
            found = run(params, {name: array[None] for name, array in batch.items()})
            numbers = [int(x[0]) for x in found]
            outputs.append({"answer": self.example.decode(batch["input_ids"], *numbers)})
        return outputs


def _texts(source: Any) -> Iterable[str]:
    """Every text of the first records, wherever it stands in them."""

    def inside(value: Any) -> Iterable[str]:
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict):
            for item in value.values():
                yield from inside(item)
        elif isinstance(value, list):
            for item in value:
                yield from inside(item)

    for index in range(min(len(source), _TOKENIZER_RECORDS)):
        try:
            yield from inside(source[index])
        except ValueError:
            continue  # a bad record is told when a batch needs it


TASKS: dict[str, type[RobertaQATask]] = {
    "wikihop": ChoiceTask,
    "quality_articles": ChoiceTask,
    "hotpotqa": HotpotQATask,
}
