"""The trunks to plan memory for: their steps are whole, and names that do not exist are refused."""

import dataclasses

import jax
import numpy as np
import pytest

from benchmarks import trunk_config, trunk_task
from jaxmodels.core import params as params_lib
from jaxmodels.core import partitioning
from jaxmodels.trunks import clip, t5


def task_of(preset: str, **overrides):
    config = trunk_config.get_config(preset)
    config.update_from_flattened_dict(overrides)
    return trunk_task.make_task(config)


@pytest.mark.parametrize(("preset", "parameters"), [("t5_3b", 2_851_598_336), ("vit_l14", None)])
def test_every_parameter_of_the_published_trunk_is_trained(preset, parameters):
    task = task_of(preset)
    shapes = partitioning.unbox(jax.eval_shape(task.init, jax.random.key(0)))
    if parameters is None:  # the tower without its projection, and the head
        tower = 303_966_208 - 1024 * 768
        parameters = tower + 1024 * 1000 + 1000
    assert params_lib.count(shapes) == parameters
    assert set(params_lib.flatten(task.param_groups(shapes)).values()) == {"decay", "no_decay"}


@pytest.mark.parametrize("trunk", ["t5", "vit"])
def test_the_loss_of_a_small_one_is_that_of_chance(trunk, monkeypatch):
    if trunk == "t5":
        small = t5.T5Config(50, 16, 2, 2, 2, 8, 32, dropout_rate=0.0)
        monkeypatch.setitem(t5.SIZES, "t5_base", small)
        task = task_of("t5_base", batch_size=2, **{"data.length": 6, "data.target_length": 4})
    else:
        sizes = clip.SIZES["vit_l14"]
        vision = dataclasses.replace(
            sizes.vision, d_model=32, num_layers=2, num_heads=2, d_ff=48, image_size=28
        )
        small = dataclasses.replace(sizes, vision=vision)
        monkeypatch.setattr(clip, "SIZES", {"vit_l14": small})
        task = task_of("vit_l14", batch_size=2, **{"data.num_classes": 50})
    params = partitioning.unbox(task.init(jax.random.key(0)))
    batch = next(iter(task.datasets("train")))
    assert {n: (a.shape, a.dtype) for n, a in batch.items()} == {
        n: (s.shape, s.dtype) for n, s in task.datasets("train").batch_shapes[0][1].items()
    }
    loss, metrics = jax.jit(task.loss)(params, batch, jax.random.key(1))
    assert np.isfinite(loss) and metrics["loss"][1] == batch["labels"].size
    if trunk == "vit":
        assert float(loss) == pytest.approx(np.log(50), abs=1.0)


def test_a_trunk_that_does_not_exist_is_refused_with_those_that_do():
    with pytest.raises(ValueError, match="'t5_huge': use one of t5_small, .*vit_l14"):
        task_of("t5_base", **{"model.size": "t5_huge"})
    with pytest.raises(ValueError, match="'rn50': use one of"):
        task_of("t5_base", **{"model.size": "rn50"})
