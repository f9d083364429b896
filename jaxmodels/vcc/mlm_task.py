"""Masked-language-model pre-training on the user's own text; the masked tokens are the VIPs."""

import functools
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxmodels.core import params as param_tree
from jaxmodels.core.task import Batch, Evaluator, Labels, Metrics, Params, Task
from jaxmodels.data import cache_folder, checks, folders, pipeline, text_lines, tokenizer
from jaxmodels.trunks import bert
from jaxmodels.vcc import initialization, losses, settings
from jaxmodels.vcc.inputs import check_inputs
from jaxmodels.vcc.model import gather_tokens
from jaxmodels.vcc.packed_text import PackedText
from jaxmodels.vcc.permuted_mlm import MaskedLM, masked_lm_example

TOP = 5  # predictions a mask that `predict` returns


class MaskedLMTask(Task):
    """Trains a trunk and an MLM head (untied) to fill in masked tokens."""

    def __init__(self, config: Any):
        """Checks the settings and that the text files exist.

        Args:
          config: see `configs/vcc.py`.

        Raises:
          ValueError: settings that cannot work together, or no text.
        """
        self.config = config
        self.trunk = settings.trunk_config(config.model)
        self.vcc = settings.encoder_config(config.model)
        self.module = settings.make_trunk(self.trunk, self.vcc)
        self.head = bert.MLMHead(self.trunk.vocab_size, self.trunk.norm_eps, self.trunk.dtype)
        data, slots = config.data, settings.num_slots(self.vcc)
        if slots is not None and data.num_masked > slots:
            raise ValueError(
                f"data.num_masked={data.num_masked} exceeds model.num_vip={slots}: "
                "masked tokens are the VIP tokens; raise num_vip or mask fewer."
            )
        if data.length > self.trunk.max_positions:
            raise ValueError(
                f"data.length={data.length} exceeds model.max_positions="
                f"{self.trunk.max_positions}; shorten the sequences or raise it."
            )
        if config.model.positions != "text":
            raise ValueError("model.positions=segment is for pydoc_facts; text_lines needs 'text'.")
        if not data.files:
            raise ValueError(
                "data.files is empty; name your text with --config.data.files=corpus/*.txt"
            )
        for files in (data.files, data.validation_files):
            if files:
                text_lines.find_files(list(files))
        wanted = self.objective(data.objective, mask_id=4)  # checks the sizes
        if wanted.permuted and self.trunk.num_token_types < wanted.segments[1]:
            raise ValueError(
                f"model.num_token_types={self.trunk.num_token_types}: {data.objective} cuts the "
                f"text into up to {wanted.segments[1]} segments, each with a token type; raise it "
                "or choose data.objective=plain."
            )
        if data.tokenizer:
            self.bpe  # noqa: B018  opens and checks it

    def objective(self, name: str, mask_id: int) -> MaskedLM:
        """Returns the masking settings of an objective by name."""
        data = self.config.data
        return MaskedLM(
            vocab_size=self.trunk.vocab_size,
            mask_id=mask_id,
            max_length=data.length,
            num_masked=data.num_masked,
            clustered=name in ("clustered", "cluster_permuted"),
            permuted=name in ("permuted", "cluster_permuted"),
            max_segments=max(self.trunk.num_token_types, MaskedLM.segments[1]),
        )

    @functools.cached_property
    def tokenizer_path(self) -> Path:
        """The tokenizer given, or a BPE trained once on the training files."""
        data = self.config.data
        if data.tokenizer:
            return Path(data.tokenizer).expanduser()
        path = text_lines.train_tokenizer(
            self._train_documents,
            data_dir=folders.data_dir(data.dir),
            vocab_size=self.trunk.vocab_size,
        )
        return Path(path)

    @functools.cached_property
    def bpe(self) -> Any:
        """The tokenizer.

        Raises:
          ValueError: it has more ids than the model's word table has rows.
        """
        bpe = tokenizer.load(self.tokenizer_path)
        if bpe.get_vocab_size() > self.trunk.vocab_size:
            raise ValueError(
                f"{self.tokenizer_path} has {bpe.get_vocab_size()} ids, model.vocab_size is "
                f"{self.trunk.vocab_size}; set model.vocab_size to at least that."
            )
        return bpe

    @functools.cached_property
    def _train_documents(self) -> text_lines.TextDocuments:
        return self._documents(self.config.data.files)

    def _documents(self, files: Any) -> text_lines.TextDocuments:
        data = self.config.data
        return text_lines.TextDocuments(
            list(files), data.field, "paragraph", max_bad_records=data.max_bad_records
        )

    def init(self, rng: jax.Array) -> Params:
        """See `Task.init`."""
        rng_trunk, rng_head, rng_copy = jax.random.split(rng, 3)
        trunk = settings.init(self.module, rng_trunk)
        if self.config.model.init == "copying":
            kinds = settings.kinds(self.config.model)
            trunk = initialization.copying_params(rng_copy, trunk, kinds, self.trunk)
        states = np.zeros((1, 1, self.trunk.d_model), np.float32)
        return {"trunk": trunk, "mlm_head": self.head.init(rng_head, states)["params"]}

    def param_groups(self, params: Params) -> Labels:
        """See `Task.param_groups`."""
        return param_tree.weight_decay_groups(params)

    def logits(self, params: Params, batch: Batch, rng: jax.Array | None = None) -> jax.Array:
        """Returns logits [B, q, vocab_size] at the masked positions alone."""
        hidden, _ = settings.encode(self.module, params["trunk"], batch, rng)
        states = gather_tokens(hidden, batch["masked_positions"])
        return self.head.apply({"params": params["mlm_head"]}, states)

    def loss(self, params: Params, batch: Batch, rng: jax.Array) -> tuple[jax.Array, Metrics]:
        """Cross-entropy at the masked positions; see `Task.loss`."""
        metrics = losses.cross_entropy(self.logits(params, batch, rng), batch["masked_labels"])
        return losses.mean(metrics["loss"]), metrics

    def metrics(self, params: Params, batch: Batch) -> Metrics:
        """Loss and accuracy of an evaluation batch."""
        labels = batch["masked_labels"]
        weight = batch["weight"][:, None] * (labels != losses.IGNORE)
        return losses.cross_entropy(self.logits(params, batch), labels, weight)

    def datasets(self, split: str) -> Any:
        """See `Task.datasets`."""
        data = self.config.data
        train = split == "train"
        documents = self._train_documents if train else self._documents(data.validation_files)
        # A word is more than one token, so as many words as tokens always fill a sequence.
        source = PackedText(documents, data.length)
        options = pipeline.options_from(data)
        batch_size = self.config.batch_size
        if train:
            stage = pipeline.Stage(source, self._example(), batch_size)
            return pipeline.train_batches([stage], seed=self.config.seed, options=options)
        return pipeline.eval_batches(source, self._example(), batch_size, options=options)

    def _example(self) -> "MaskedExample":
        mask_id = self.bpe.token_to_id("<mask>")
        objective = self.objective(self.config.data.objective, mask_id)
        num_vip = settings.num_slots(self.vcc) or self.config.data.num_masked
        return MaskedExample(str(self.tokenizer_path), objective, num_vip)

    def evaluators(self) -> dict[str, Evaluator]:
        """Loss and accuracy on `data.validation_files`, where there are any."""
        if not self.config.data.validation_files:
            return {}
        # One data set for all evaluations: its files are checked, and a bad record logged, once.
        return {"validation": Evaluator(lambda: self._validation, self.metrics)}

    @functools.cached_property
    def _validation(self) -> Any:
        return self.datasets("validation")

    def predict(self, params: Params, inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Fills in masks.

        Args:
          params: of the trained model.
          inputs: rows with `text` that holds `<mask>` at least once.

        Returns:
          rows with `masks`: for each one, the five likeliest tokens with their probabilities.

        Raises:
          ValueError: a row without text or mask, or with too many tokens or masks.
        """
        rows = [self._predict_row(number, row) for number, row in enumerate(inputs, start=1)]
        run = jax.jit(self.logits)
        outputs = []
        for batch, count in rows:
            chances = jax.nn.softmax(run(params, batch)[0, :count])
            best, ids = jax.lax.top_k(chances, TOP)
            outputs.append({"masks": [self._tokens(*pair) for pair in zip(ids, best, strict=True)]})
        return outputs

    def _tokens(self, ids: jax.Array, chances: jax.Array) -> list[dict[str, Any]]:
        return [
            {"token": self.bpe.decode([int(i)]), "probability": round(float(p), 6)}
            for i, p in zip(ids, chances, strict=True)
        ]

    def _predict_row(self, number: int, row: dict[str, Any]) -> tuple[Batch, int]:
        """Encodes a row into a batch of one of the static shapes of training."""
        text = row.get("text")
        if not isinstance(text, str) or "<mask>" not in text:
            raise ValueError(f"row {number}: a field 'text' that holds <mask> is needed.")
        sizes = self.objective("plain", self.bpe.token_to_id("<mask>"))
        encoded = self.bpe.encode(text, add_special_tokens=False).ids
        ids = [sizes.cls_id, *encoded, sizes.sep_id]
        masks = [i for i, token in enumerate(ids) if token == sizes.mask_id]
        if len(ids) > sizes.max_length or len(masks) > sizes.num_masked:
            raise ValueError(
                f"row {number}: {len(ids)} tokens with {len(masks)} masks; at most "
                f"{sizes.max_length} tokens and {sizes.num_masked} masks fit the model."
            )
        padding = sizes.max_length - len(ids)
        vip = np.zeros(sizes.max_length, np.int32)
        vip[masks] = 1
        batch = {
            "input_ids": np.pad(ids, (0, padding), constant_values=sizes.pad_id),
            "attention_mask": np.pad(np.ones(len(ids), np.int32), (0, padding)),
            "vip_mask": vip,
            "position_ids": np.pad(np.arange(len(ids)), (0, padding)),
            "masked_positions": np.pad(masks, (0, sizes.num_masked - len(masks))),
        }
        return {name: np.asarray(x, np.int32)[None] for name, x in batch.items()}, len(masks)


class MaskedExample:
    """The random transform of a packed text into one training example; travels to workers."""

    def __init__(self, tokenizer_path: str, objective: MaskedLM, num_vip: int):
        """Keeps the settings; the tokenizer is opened on first use, in the worker itself."""
        self.tokenizer_path, self.objective, self.num_vip = tokenizer_path, objective, num_vip
        self._bpe: Any = None

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What decides the examples, as JSON values."""
        return {
            "objective": str(self.objective),
            "tokenizer_sha256": cache_folder.sha256(self.tokenizer_path),
        }

    def __getstate__(self) -> dict[str, Any]:
        """Leaves the opened tokenizer behind."""
        return self.__dict__ | {"_bpe": None}

    def __call__(self, record: dict[str, str], rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Returns the arrays of one example, all int32."""
        if self._bpe is None:
            self._bpe = tokenizer.load(self.tokenizer_path)

        def encode(sentence: str) -> list[int]:
            return self._bpe.encode(sentence, add_special_tokens=False).ids

        text = checks.check_text(record, "text")
        made = masked_lm_example(rng, text, encode, self.objective)
        mask, vip = check_inputs(made["attention_mask"], made["importance_mask"], self.num_vip)
        chosen = made["masked_token_indices"]
        return {
            "input_ids": made["input_ids"],
            "attention_mask": mask,
            "vip_mask": vip,
            "position_ids": made["position_ids"],
            "token_type_ids": made["token_type_ids"],
            "masked_positions": chosen,
            "masked_labels": made["labels"][chosen],
        }
