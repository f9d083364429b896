"""Masked-language-model pre-training of a mixture of experts, for the trainer."""

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxmodels.core import params as param_tree
from jaxmodels.core.losses import cross_entropy
from jaxmodels.core.task import Batch, Evaluator, Labels, Metrics, Params, Task
from jaxmodels.data import c4, folders, pipeline, pydoc_text, text_lines, tokenizer
from jaxmodels.smile import moe
from jaxmodels.smile.grid import Grid, check_nodes, placement
from jaxmodels.smile.masking import DocumentExample, MaskedExample
from jaxmodels.smile.model import SmileBert, SmileConfig
from jaxmodels.smile.settings import MoeConfig
from jaxmodels.trunks import bert

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
TOP = 5  # predictions a mask that `predict` returns


def make_task(config: Any) -> Task:
    """Returns the task.

    Args:
      config: see `configs/smile.py`.

    Raises:
      ValueError: settings that cannot work, before anything is compiled or read.
    """
    return MaskedLMTask(config)


def model_config(config: Any) -> SmileConfig:
    """Returns the sizes of the model from a run's config.

    Raises:
      ValueError: sizes that do not fit together.
    """
    model, experts = config.model, config.moe
    same = (
        "vocab_size",
        "d_model",
        "num_layers",
        "num_heads",
        "d_ff",
        "max_positions",
        "num_token_types",
        "norm_order",
        "norm_eps",
        "dropout_rate",
        "attention_dropout_rate",
        "remat",
    )
    dtype = DTYPES[model.dtype]
    trunk = bert.BertConfig(**{name: model[name] for name in same}, position_offset=0, dtype=dtype)
    if not experts.num_experts:
        return SmileConfig(trunk)
    chosen = (
        "num_experts",
        "routing",
        "transport",
        "capacity_factor",
        "eval_capacity_factor",
        "capacity_factor_intra",
        "buffer_factor",
        "intra_router",
        "jitter",
        "stats",
        "alpha",
        "beta",
        "z_coef",
    )
    layer = MoeConfig(
        d_ff=model.d_ff,
        grid=Grid(experts.nodes, experts.devices),
        expert_std=0.02,
        dtype=dtype,
        **{name: experts[name] for name in chosen},
    )
    return SmileConfig(trunk, layer)


class MaskedLMTask(Task):
    """Trains `SmileBert` to fill in masked tokens; balance losses are added to the objective."""

    def __init__(self, config: Any):
        """Checks the settings and that the text files exist.

        Args:
          config: see `configs/smile.py`.

        Raises:
          ValueError: settings that cannot work together, or no text.
        """
        self.config, data = config, config.data
        self.sizes = model_config(config)
        self.module = SmileBert(self.sizes)
        if data.length > config.model.max_positions:
            raise ValueError(
                f"data.length={data.length} exceeds model.max_positions="
                f"{config.model.max_positions}; shorten the windows or raise it."
            )
        if data.name == "c4" and not data.tokenizer:
            raise ValueError("data.name=c4 needs --config.data.tokenizer=tokenizer.json.")
        if data.name == "text_lines":
            if not data.files:
                raise ValueError(
                    "data.files is empty; name your text with --config.data.files=corpus/*.txt"
                )
            for files in (data.files, data.validation_files):
                if files:
                    text_lines.find_files(list(files))

    def init(self, rng: jax.Array) -> Params:
        """See `Task.init`."""
        ids = jnp.zeros((1, 2), jnp.int32)
        return self.module.init(rng, ids, ids + 1)["params"]

    def param_groups(self, params: Params) -> Labels:
        """Weight decay on matrices alone: not on biases (the experts' have two axes) and norms."""
        labels = param_tree.flatten(param_tree.weight_decay_groups(params))
        exempt = ("/bi", "/bo")
        return param_tree.unflatten(
            {path: "no_decay" if path.endswith(exempt) else label for path, label in labels.items()}
        )

    def check_mesh(self, mesh: Mesh) -> list[str]:
        """Returns a line on the transport; see `Task.check_mesh`.

        Raises:
          ValueError: the mesh does not divide the grid, or one of its nodes mixes slices or hosts
            though tokens are exchanged inside nodes.
        """
        layer = self.sizes.experts
        if layer is None:
            return []
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            placement(layer.grid)
            transport, why = layer.explained_transport()
        if layer.routing == "bi_level" or transport == "two_hop":
            check_nodes(mesh, self.config.moe.allow_mixed_nodes)
        grid = f"{layer.grid.nodes} nodes x {layer.grid.devices} devices"
        return [f"{layer.routing} routing on {grid}, transport {transport} ({why})"]

    def logits(
        self, params: Params, batch: Batch, rng: jax.Array | None = None
    ) -> tuple[jax.Array, moe.Report | None]:
        """Returns logits [B, M, vocab_size] at the masked positions, and the layers' reports."""
        variables = {"params": params}
        rngs = None if rng is None else {"dropout": rng}
        given = (batch["input_ids"], batch["attention_mask"], rng is None)
        hidden, reports = self.module.apply(variables, *given, rngs=rngs)
        states = jnp.take_along_axis(hidden, batch["masked_positions"][..., None], axis=1)
        return self.module.apply(variables, states, method="logits"), reports

    def loss(self, params: Params, batch: Batch, rng: jax.Array) -> tuple[jax.Array, Metrics]:
        """Cross-entropy at the masked positions plus the routers' losses; see `Task.loss`."""
        logits, reports = self.logits(params, batch, rng)
        metrics = cross_entropy(logits, batch["masked_labels"])
        total, weight = metrics["loss"]
        objective = total / jnp.maximum(weight, 1)
        if reports is not None:
            objective = objective + self._auxiliary(reports)
            metrics |= self._routing(reports)
        return objective, metrics

    def _auxiliary(self, reports: moe.Report) -> jax.Array:
        layer = self.sizes.experts
        return jax.vmap(lambda report: moe.auxiliary_loss(report, layer))(reports).sum()

    def _routing(self, reports: moe.Report) -> Metrics:
        """Means over the MoE layers: balance and drops by level, and how even the experts' load."""
        found = jax.vmap(functools.partial(moe.summary, stats=self.sizes.experts.stats))(reports)
        return {name: (values.mean(), jnp.float32(1)) for name, values in found.items()}

    def metrics(self, params: Params, batch: Batch) -> Metrics:
        """Loss and accuracy of an evaluation batch, and its routing."""
        logits, reports = self.logits(params, batch)
        labels = batch["masked_labels"]
        weight = jnp.broadcast_to(batch["weight"][:, None], labels.shape)
        found = cross_entropy(logits, labels, weight)
        return found if reports is None else found | self._routing(reports)

    def _windows(self, split: str) -> text_lines.TextWindows:
        data, size = self.config.data, self.config.model.vocab_size
        root = folders.data_dir(data.dir)
        if data.name == "pydoc_text":
            return pydoc_text.load_windows(root, split, data.length, size)
        files = data.files if split == "train" else data.validation_files
        # Validation is encoded by the tokenizer of the training text.
        path = data.tokenizer if split == "train" else self._train.tokenizer_path
        return text_lines.load_windows(
            list(files),
            data.length,
            data_dir=root,
            field=data.field,
            document="paragraph",
            tokenizer_path=path,
            vocab_size=size,
        )

    @functools.cached_property
    def _train(self) -> text_lines.TextWindows:
        return self._windows("train")

    @functools.cached_property
    def tokenizer_path(self) -> str:
        """The tokenizer given, or the one trained on the text."""
        if self.config.data.name == "c4":
            return str(Path(self.config.data.tokenizer).expanduser())
        return self._train.tokenizer_path

    def _example(self) -> MaskedExample:
        bpe = tokenizer.load(self.tokenizer_path)
        size = bpe.get_vocab_size()
        if size > self.config.model.vocab_size:
            raise ValueError(
                f"{self.tokenizer_path} has {size} ids, model.vocab_size is "
                f"{self.config.model.vocab_size}; set model.vocab_size to at least that."
            )
        data = self.config.data
        return MaskedExample(size, data.length, data.mask_rate, bpe.token_to_id("<mask>"))

    def datasets(self, split: str) -> Any:
        """See `Task.datasets`."""
        options = pipeline.options_from(self.config.data)
        source, example = self._source(split)
        batch_size = self.config.batch_size
        if split == "train":
            stage = pipeline.Stage(source, example, batch_size)
            return pipeline.train_batches([stage], seed=self.config.seed, options=options)
        return pipeline.eval_batches(source, example, batch_size, options=options)

    def _source(self, split: str) -> tuple[Any, Any]:
        """Returns the records of a split, and what makes an example of one."""
        masked = self._example()
        if self.config.data.name == "c4":
            documents = c4.load(folders.data_dir(self.config.data.dir), split)
            return documents, DocumentExample(self.tokenizer_path, masked)
        return self._train if split == "train" else self._windows(split), masked

    def evaluators(self) -> dict[str, Evaluator]:
        """Loss, accuracy and routing on the validation text, where there is any."""
        data = self.config.data
        if data.name == "text_lines" and not data.validation_files:
            return {}
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
          ValueError: a row without text or mask, or with too many tokens.
        """
        bpe = tokenizer.load(self.tokenizer_path)
        rows = [self._predict_row(bpe, number, row) for number, row in enumerate(inputs, start=1)]

        @jax.jit
        def likeliest(params: Params, batch: Batch) -> list[jax.Array]:
            return jax.lax.top_k(jax.nn.softmax(self.logits(params, batch)[0][0]), TOP)

        outputs = []
        for batch, count in rows:
            best, ids = jax.device_get(likeliest(params, batch))
            masks = [
                [
                    {"token": bpe.decode([int(i)]), "probability": round(float(p), 6)}
                    for i, p in zip(*pair, strict=True)
                ]
                for pair in zip(ids[:count], best[:count], strict=True)
            ]
            outputs.append({"masks": masks})
        return outputs

    def _predict_row(self, bpe: Any, number: int, row: dict[str, Any]) -> tuple[Batch, int]:
        text, length = row.get("text"), self.config.data.length
        if not isinstance(text, str) or "<mask>" not in text:
            raise ValueError(f"row {number}: a field 'text' that holds <mask> is needed.")
        inner = bpe.encode(text, add_special_tokens=False).ids
        ids = [tokenizer.CLS_ID, *inner, tokenizer.SEP_ID]
        if len(ids) > length:
            raise ValueError(f"row {number}: {len(ids)} tokens; at most {length} fit the model.")
        padded = np.pad(ids, (0, length - len(ids)), constant_values=tokenizer.PAD_ID)
        masks = np.flatnonzero(padded == bpe.token_to_id("<mask>"))
        batch = {
            "input_ids": padded,
            "attention_mask": np.arange(length) < len(ids),
            "masked_positions": np.pad(masks, (0, length - len(masks))),
        }
        return {name: np.asarray(x, np.int32)[None] for name, x in batch.items()}, len(masks)
