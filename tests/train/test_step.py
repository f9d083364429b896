"""The jitted step: exact weighting, frozen leaves, donation, one compile, no hidden transfer."""

import dataclasses
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodels.core import params as params_lib
from jaxmodels.core import partitioning
from tests.train import runs, toy
from train import state as state_lib
from train.compiled import PerShape
from train.input import place
from train.step import make_train_step
from train.table import bytes_per_device, parameter_table


@pytest.fixture(autouse=True)
def mesh():
    mesh = partitioning.make_mesh(devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        yield mesh


def setting(mesh, **overrides):
    """(task, config, layout, fresh state, jitted step)."""
    config = runs.config(**overrides)
    task = toy.make_task(config)
    plan = state_lib.layout(task, config, mesh)
    state = state_lib.create(task, config, mesh, plan)
    return task, config, plan, state, make_train_step(task, config, mesh, plan)


def batch_of(mesh, rows=16, length=8, seed=5):
    drawn = toy.examples(rows, length, seed)
    return place({key: np.stack([row[key] for row in drawn]) for key in drawn[0]}, mesh).batch


def values(metrics):
    return {name: float(total) / float(weight) for name, (total, weight) in metrics.items()}


@pytest.mark.parametrize("parts", [2, 8])
def test_micro_batches_of_unequal_weight_equal_one_big_batch(mesh, parts):
    batch = batch_of(mesh)
    assert len(np.unique([batch["weight"][i::parts].sum() for i in range(parts)])) > 1
    ends = {}
    for count in (1, parts):
        *_, state, step = setting(
            mesh, micro_batches=count, model__dropout=0.0, optimizer__name="sgd"
        )
        ends[count] = step(state, batch)
    (one, first, _), (many, second, _) = ends[1], ends[parts]
    for path, leaf in params_lib.flatten(one.params).items():
        np.testing.assert_allclose(
            params_lib.flatten(many.params)[path], leaf, rtol=1e-6, atol=1e-7, err_msg=path
        )
    for name, value in values(first).items():
        assert values(second)[name] == pytest.approx(value, rel=1e-6)
    assert float(first["loss"][1]) == float(second["loss"][1]) == float(batch["weight"].sum())


def test_a_batch_of_padding_moves_nothing_and_makes_no_nan(mesh):
    *_, state, step = setting(
        mesh, micro_batches=2, optimizer__weight_decay=0.0, model__dropout=0.0
    )
    batch = batch_of(mesh)
    batch["weight"] = jnp.zeros_like(batch["weight"])
    before = jax.device_get(state.params)

    class Padded(toy.ToyTask):
        def loss(self, params, batch, rng):
            metrics = self.metrics(params, batch, rng)
            return metrics["loss"][0] / jnp.maximum(metrics["loss"][1], 1), metrics

    task = Padded(runs.config(model__dropout=0.0))
    config = runs.config(micro_batches=2, optimizer__weight_decay=0.0)
    after, metrics, _ = make_train_step(task, config, mesh)(state, batch)
    jax.tree.map(np.testing.assert_array_equal, before, jax.device_get(after.params))
    assert float(metrics["grad_norm"][0]) == 0.0


def test_the_gradient_is_that_of_the_whole_batch(mesh):
    task, _, _, state, step = setting(mesh, model__dropout=0.0)
    batch = batch_of(mesh)
    grads = jax.grad(lambda p: task.loss(p, batch, state.rng)[0])(state.params)
    wanted = float(jnp.sqrt(sum(jnp.sum(jnp.square(g)) for g in jax.tree.leaves(grads))))
    _, metrics, _ = step(state, batch)
    assert values(metrics)["grad_norm"] == pytest.approx(wanted, rel=1e-6)
    assert values(metrics)["learning_rate"] == pytest.approx(0.01 / 4)


def test_frozen_leaves_stay_and_have_no_optimiser_slot(mesh):
    _, _, plan, state, step = setting(mesh, model__frozen="embedding")
    assert list(params_lib.flatten(state.frozen)) == ["embedding/table"]
    frozen = np.asarray(state.frozen["embedding"]["table"])
    trained = np.asarray(state.trainable["hidden"]["kernel"])
    slots = sum(leaf.size for leaf in jax.tree.leaves(state.opt_state))
    assert slots == 2 * params_lib.count(state.trainable) + 2  # two moments, two step counters
    *_, whole, trains_all = setting(mesh)
    batch = batch_of(mesh)
    scatters = [
        str(f.trace(s, batch).jaxpr).count("scatter-add[")
        for f, s in ((step, state), (trains_all, whole))
    ]
    assert scatters[0] == scatters[1] - 1  # the gradient of the embedding is not even computed
    for _ in range(2):
        state, *_ = step(state, batch_of(mesh))
    np.testing.assert_array_equal(state.frozen["embedding"]["table"], frozen)
    assert (np.asarray(state.trainable["hidden"]["kernel"]) != trained).any()
    assert plan.groups["embedding/table"] == "frozen"


def test_the_state_is_donated_and_every_buffer_of_it_used(mesh):
    *_, state, step = setting(mesh, micro_batches=2)
    old = [leaf for leaf in jax.tree.leaves(state) if leaf is not state.rng]
    size = bytes_per_device(dataclasses.replace(state, rng=jax.random.key_data(state.rng)))
    batch = batch_of(mesh)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compiled = step.trace(state, batch).lower().compile()
        compiled(state, batch)
    assert all(leaf.is_deleted() for leaf in old)
    assert not any(leaf.is_deleted() for leaf in batch.values())
    assert compiled.memory_analysis().alias_size_in_bytes >= size - 16


def test_the_step_compiles_once_a_shape_and_moves_nothing_by_itself(mesh):
    *_, state, step = setting(mesh)
    steps = PerShape(step)
    lengths = (8, 8, 4, 8, 4)
    batches = [batch_of(mesh, length=length, seed=i) for i, length in enumerate(lengths)]
    with jax.transfer_guard("disallow"):
        for batch in batches:
            state, metrics, _ = steps(state, batch)
    assert steps.compilations == 2
    assert steps.flops(batches[0]) > 0
    assert int(state.step) == 5 and np.isfinite(values(metrics)["loss"])


def test_the_guard_would_catch_a_hidden_transfer(mesh):
    *_, state, step = setting(mesh)
    batch = batch_of(mesh) | {"weight": np.ones(16, np.float32)}
    with jax.transfer_guard("disallow"), pytest.raises(Exception, match="[Dd]isallow"):
        step(state, batch)


def test_random_numbers_differ_by_step_and_repeat_by_seed(mesh):
    task, config, plan, _, step = setting(mesh, model__dropout=0.5, optimizer__learning_rate=1e-12)
    batch = batch_of(mesh)

    def losses():
        state, found = state_lib.create(task, config, mesh, plan), []
        for _ in range(3):
            state, metrics, _ = step(state, batch)
            found.append(values(metrics)["loss"])
        return found

    first = losses()
    assert len(set(first)) == 3 and losses() == first


def test_the_step_lowers_from_shapes_alone(mesh):
    task, config, plan, state, step = setting(mesh)
    batch = batch_of(mesh)
    shapes = {
        k: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=v.sharding) for k, v in batch.items()
    }
    from_shapes = step.lower(plan.abstract, shapes).as_text()
    assert from_shapes == make_train_step(task, config, mesh).lower(state, batch).as_text()


def test_the_layout_is_that_of_the_state(mesh):
    _, _, plan, state, _ = setting(mesh, optimizer__name="adafactor")

    def describe(tree):
        return jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding.spec), tree)

    assert describe(plan.abstract) == describe(state)


@pytest.mark.parametrize(
    ("frozen", "said"), [("", "lack a label"), ("all", "every parameter is frozen")]
)
def test_labels_that_cannot_be_used_are_refused(mesh, frozen, said):
    class Mislabelled(toy.ToyTask):
        def param_groups(self, params):
            if frozen:
                return params_lib.label(params, lambda path, leaf: "frozen")
            return {"out": {"bias": "decay"}}

    config = runs.config()
    with pytest.raises(ValueError, match=said):
        state_lib.layout(Mislabelled(config), config, mesh)


def test_the_parameter_table_adds_up(mesh):
    _, _, plan, state, _ = setting(mesh, model__frozen="embedding")
    text = parameter_table(plan)
    total = params_lib.count(state.params)
    assert (
        f"parameters: {total:,} = {total - 4096:,} trainable (decay, head, no_decay) + 4,096 frozen"
        in text
    )
    rows = {line.split()[0]: line.split() for line in text.splitlines()}
    assert rows["embedding/table"][1:3] == ["64x64", "float32"]
    assert rows["embedding/table"][-2:] == ["4,096", "frozen"]
    assert rows["out/bias"][1:] == ["4", "float32", "repeated", "4", "no_decay"]
    assert rows["bytes"][3] == f"{4 * total / 1024:.4g}"
