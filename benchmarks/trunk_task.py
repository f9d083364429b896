"""Fine-tuning of a whole published trunk on made batches: what `train.compile` plans memory for.

    python -m train.compile --config=benchmarks/trunk_config.py:t5_3b --topology=v5e:4x4

T5 sizes learn a sequence from another; CLIP's ViT sizes classify images. The data are random: the
task answers how large a step is, not how well a model learns.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from ml_collections import ConfigDict

from jaxmodels.core import layers, losses
from jaxmodels.core import params as params_lib
from jaxmodels.core.task import Batch, Labels, Metrics, Params, Task
from jaxmodels.trunks import clip, t5, vit


class Classifier(nn.Module):
    """CLIP's image tower with a linear head on its class token.

    Attributes:
      config: of the tower.
      num_classes: of the head.
    """

    config: vit.VitConfig
    num_classes: int

    @nn.compact
    def __call__(self, images: jax.Array, deterministic: bool = True) -> jax.Array:
        """Returns logits [batch, num_classes] float32 of images [batch, height, width, 3]."""
        tower = vit.VitModel(self.config, name="trunk")
        features = tower(images, deterministic).pooled
        return layers.Dense(self.num_classes, ("embed", "vocab"), name="head")(features)


@dataclasses.dataclass(frozen=True)
class Batches:
    """The same random batch for ever; `batch_shapes` says what `train.compile` asks."""

    rows: int
    shapes: dict[str, tuple[tuple[int, ...], Any, int]]  # name -> shape of a row, dtype, values

    @property
    def batch_shapes(self) -> list[tuple[int | None, dict[str, jax.ShapeDtypeStruct]]]:
        """One stage: shape structs of the global batch."""
        arrays = {
            name: jax.ShapeDtypeStruct((self.rows, *shape), dtype)
            for name, (shape, dtype, _) in self.shapes.items()
        }
        return [(None, arrays)]

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        rng = np.random.default_rng(0)
        rows = self.rows // jax.process_count()
        batch = {
            name: rng.integers(0, values, (rows, *shape)).astype(dtype)
            for name, (shape, dtype, values) in self.shapes.items()
        }
        while True:
            yield batch


@dataclasses.dataclass(frozen=True)
class TrunkTask(Task):
    """Cross-entropy of one trunk; all its parameters are trained.

    Attributes:
      model: the module.
      inputs: name -> (shape of a row, dtype, values below), all that the model is given.
      batch_size: rows of a global batch.
    """

    model: Any
    inputs: dict[str, tuple[tuple[int, ...], Any, int]]
    batch_size: int

    def init(self, rng: jax.Array) -> Params:
        """See `Task.init`."""
        first = next(name for name in self.inputs if name != "labels")
        shape, dtype, _ = self.inputs[first]
        return self.model.init(rng, jnp.zeros((1, *shape), dtype))["params"]

    def param_groups(self, params: Params) -> Labels:
        """See `Task.param_groups`."""
        return params_lib.weight_decay_groups(params)

    def loss(self, params: Params, batch: Batch, rng: jax.Array) -> tuple[jax.Array, Metrics]:
        """See `Task.loss`."""
        given, labels = dict(batch), batch["labels"]
        del given["labels"]
        if isinstance(self.model, t5.T5):
            given["decoder_input_ids"] = t5.shift_right(labels)
        rngs = {"dropout": rng}
        logits = self.model.apply({"params": params}, **given, deterministic=False, rngs=rngs)
        metrics = losses.cross_entropy(logits, labels)
        return metrics["loss"][0] / metrics["loss"][1], metrics

    def datasets(self, split: str) -> Batches:
        """See `Task.datasets`."""
        return Batches(self.batch_size, self.inputs)


def make_task(config: ConfigDict) -> TrunkTask:
    """Returns the task of `config.model.size`, a key of `t5.SIZES` or `clip.SIZES`.

    Raises:
      ValueError: no trunk of that name, or one without a Vision Transformer.
    """
    chosen, data = config.model, config.data
    compute = {"dtype": jnp.dtype(chosen.dtype), "remat": chosen.remat}
    if chosen.size in t5.SIZES:
        sizes = dataclasses.replace(t5.SIZES[chosen.size], **compute)
        ids = (np.int32, sizes.vocab_size)
        inputs = {
            "input_ids": ((data.length,), *ids),
            "attention_mask": ((data.length,), np.int32, 2),
            "labels": ((data.target_length,), *ids),
        }
        return TrunkTask(t5.T5(sizes), inputs, config.batch_size)
    tower = clip.SIZES[chosen.size].vision if chosen.size in clip.SIZES else None
    if not isinstance(tower, vit.VitConfig):
        known = [*t5.SIZES, *(n for n in clip.SIZES if n.startswith("vit"))]
        raise ValueError(f"model.size={chosen.size!r}: use one of {', '.join(known)}.")
    tower = dataclasses.replace(tower, projection_dim=None, **compute)
    image = (tower.image_size, tower.image_size, 3)
    inputs = {"images": (image, np.float32, 2), "labels": ((), np.int32, data.num_classes)}
    return TrunkTask(Classifier(tower, data.num_classes), inputs, config.batch_size)
