"""A method small enough to check the trainer with: a masked-mean classifier of token sequences."""

import dataclasses
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from ml_collections import ConfigDict

from jaxmodels.core import params as params_lib
from jaxmodels.core.task import Batch, Evaluator, Labels, Metrics, Params, Task

VOCAB, CLASSES = 64, 4


def examples(count: int, length: int, seed: int) -> list[dict[str, np.ndarray]]:
    """Sequences whose first token decides the class, of unequal lengths and weights."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        used = int(rng.integers(2, length + 1))
        mask = np.arange(length) < used
        ids = np.where(mask, rng.integers(1, VOCAB, length), 0).astype(np.uint16)
        rows.append(
            {
                "input_ids": ids,
                "attention_mask": mask,
                "label": np.int64(ids[0] % CLASSES),
                "weight": np.float64(rng.choice([0.25, 1.0, 3.0])),
            }
        )
    return rows


class _Grow(grain.MapDataset):
    """Cuts the sequences of the first `steps` batches to half their length."""

    def __init__(self, parent: Any, steps: int):
        super().__init__(parent)
        self._steps = steps

    def __len__(self) -> int:
        return len(self._parent)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        batch = self._parent[index]
        if index >= self._steps:
            return batch
        half = batch["input_ids"].shape[1] // 2
        return batch | {k: batch[k][:, :half] for k in ("input_ids", "attention_mask")}


def _own_share(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """This process's rows of a global batch: the processes lie one after the other in it."""
    rows = len(batch["label"]) // jax.process_count()
    start = rows * jax.process_index()
    return {name: value[start : start + rows] for name, value in batch.items()}


class _Share(grain.MapDataset):
    """This process's rows of each batch."""

    def __len__(self) -> int:
        return len(self._parent)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return _own_share(self._parent[index])


class _Poison(grain.MapDataset):
    """Spoils the training batch of one step, in the way that `kind` names."""

    def __init__(self, parent: Any, kind: str, step: int):
        super().__init__(parent)
        self._kind, self._step = kind, step

    def __len__(self) -> int:
        return len(self._parent)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        batch = self._parent[index]
        rows = len(batch["label"])
        scale, slope = np.ones(rows, np.float32), np.ones(rows, np.float32)
        if index + 1 == self._step:
            value = 3000.0 if self._kind == "spike" else np.inf if self._kind == "inf" else np.nan
            # micro: one of two parts; device: the last of eight; leaf: the loss stays as it was
            part = {"micro": slice(1, None, 2), "device": slice(rows - rows // 8, None)}
            (slope if self._kind == "leaf" else scale)[part.get(self._kind, slice(None))] = value
        return batch | {"scale": scale, "slope": slope}


@jax.custom_vjp
def _spoiled(x: jax.Array, slope: jax.Array) -> jax.Array:
    """Returns x; its gradient is multiplied by the mean of `slope`."""
    return x


_spoiled.defvjp(
    lambda x, slope: (x, slope), lambda slope, g: (g * slope.mean(), jnp.zeros_like(slope))
)


@dataclasses.dataclass(frozen=True)
class ToyTask(Task):
    """The classifier; `config.model` holds its sizes and what each test wants of it."""

    config: ConfigDict

    def init(self, rng: jax.Array) -> Params:
        width = self.config.model.width
        keys = jax.random.split(rng, 3)

        def box(key: Any, shape: tuple[int, ...], names: tuple[str, ...]) -> Any:
            return nn.LogicallyPartitioned(0.1 * jax.random.normal(key, shape), names=names)

        return {
            "embedding": {"table": box(keys[0], (VOCAB, width), ("vocab", "embed"))},
            "hidden": {
                "kernel": box(keys[1], (width, width), ("embed", "mlp")),
                "bias": jnp.zeros((width,)),
            },
            "out": {
                "kernel": 0.1 * jax.random.normal(keys[2], (width, CLASSES)),
                "bias": jnp.zeros((CLASSES,)),
            },
        }

    def param_groups(self, params: Params) -> Labels:
        frozen = self.config.model.frozen

        def rule(path: str, leaf: Any) -> str:
            if frozen and path.startswith(frozen):
                return "frozen"
            return "head" if path == "out/kernel" else "decay" if leaf.ndim > 1 else "no_decay"

        return params_lib.label(params, rule)

    def logits(self, params: Params, batch: Batch, rng: jax.Array | None = None) -> jax.Array:
        """Returns [batch, CLASSES]; with `rng`, dropout is on."""
        mask = batch["attention_mask"][..., None].astype(jnp.float32)
        x = params["embedding"]["table"][batch["input_ids"]] * mask
        x = x[:, 0] + x.sum(1) / mask.sum(1)
        if rng is not None and self.config.model.dropout:
            keep = jax.random.bernoulli(rng, 1 - self.config.model.dropout, x.shape)
            x = jnp.where(keep, x / (1 - self.config.model.dropout), 0)
        x = jax.nn.relu(x @ params["hidden"]["kernel"] + params["hidden"]["bias"])
        bias = params["out"]["bias"]
        if "slope" in batch:
            bias = _spoiled(bias, batch["slope"])
        return x @ params["out"]["kernel"] + bias

    def metrics(self, params: Params, batch: Batch, rng: jax.Array | None = None) -> Metrics:
        """Weighted sums of the loss and of the hits."""
        log_p = jax.nn.log_softmax(self.logits(params, batch, rng))
        loss = -jnp.take_along_axis(log_p, batch["label"][:, None], 1)[:, 0]
        loss = loss * batch.get("scale", 1.0)
        hit = log_p.argmax(-1) == batch["label"]
        weight = batch["weight"]
        return {
            "loss": ((loss * weight).sum(), weight.sum()),
            "accuracy": ((hit * weight).sum(), weight.sum()),
        }

    def loss(self, params: Params, batch: Batch, rng: jax.Array) -> tuple[jax.Array, Metrics]:
        metrics = self.metrics(params, batch, rng)
        return metrics["loss"][0] / metrics["loss"][1], metrics

    def datasets(self, split: str) -> Any:
        data, seed = self.config.data, self.config.seed
        rows = grain.MapDataset.source(examples(data.examples, data.length, seed))
        if split != "train":
            return rows.batch(self.config.batch_size).to_iter_dataset()
        rows = rows.seed(seed).shuffle()
        rows = rows if data.repeat == 0 else rows.repeat(data.repeat)
        rows = _Grow(rows.batch(self.config.batch_size, drop_remainder=True), data.half_steps)
        if self.config.model.poison:
            rows = _Poison(rows, self.config.model.poison, self.config.model.poison_step)
        return _Share(rows).to_iter_dataset()

    def evaluators(self) -> dict[str, Evaluator]:
        def batches() -> Any:
            rows, size = examples(27, self.config.data.length, 99), self.config.batch_size
            rows += [rows[0] | {"weight": np.float64(0)}] * (-len(rows) % size)  # padding
            for i in range(0, len(rows), size):
                batch = {k: np.stack([row[k] for row in rows[i : i + size]]) for k in rows[0]}
                yield _own_share(batch)

        return {"valid": Evaluator(batches, self.metrics)}

    def predict(self, params: Params, inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        missing = [i for i, row in enumerate(inputs, 1) if "input_ids" not in row]
        if missing:
            raise ValueError(f"row {missing[0]} has no input_ids")
        outputs = []
        for row in inputs:
            ids = jnp.asarray(row["input_ids"])[None]
            logits = self.logits(params, {"input_ids": ids, "attention_mask": ids > 0})
            outputs.append({"label": int(logits.argmax())})
        return outputs


def make_task(config: ConfigDict) -> ToyTask:
    """Returns the task; a width of 13 stands for settings that cannot work."""
    if config.model.width == 13:
        raise ValueError("model.width=13 is not a multiple of 2;\nchoose 12 or 14")
    return ToyTask(config)
