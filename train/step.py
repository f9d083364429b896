"""The one jitted training step, and the jitted evaluation step."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from jaxmodels.core import params as params_lib
from jaxmodels.core import partitioning
from jaxmodels.core.task import Batch, Evaluator, Metrics, Task
from train import state as state_lib
from train.optimizer import make_schedule
from train.state import Layout, TrainState

Tree = Any
StepFunction = Callable[[TrainState, Batch], tuple[TrainState, Metrics, jax.Array]]


def make_train_step(
    task: Task, config: ConfigDict, mesh: Mesh, plan: Layout | None = None
) -> StepFunction:
    """Returns the jitted step (state, batch) -> (state, metrics, health); the state is donated.

    The batch is computed in `config.micro_batches` parts. Each part's gradient counts by the
    weight of its `loss` metric, so that the sum equals one big batch exactly. The metrics are
    (weighted sum, weight) in float32: the task's own, `grad_norm` (before clipping) and
    `learning_rate`. `health` [2 + leaves] float32 holds the mean loss, 1 where the update was
    skipped, and the squared norm of the gradient of each trainable leaf, in the order of
    `trainable_paths`. With `config.on_nonfinite` "skip" an update with a loss or gradient that is
    not finite, and with `config.skip_grad_norm` one with a larger gradient, changes nothing but
    the step number. The function also lowers from shape structs alone, for compilation without
    the hardware. Call it under `jax.set_mesh(mesh)`.

    Args:
      task: gives the loss.
      config: gives `micro_batches`, the optimiser and what is skipped.
      mesh: where state and batch lie.
      plan: `state.layout(task, config, mesh)`, where the caller has it already.
    """
    plan = plan or state_lib.layout(task, config, mesh)
    schedule = make_schedule(config)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics, jax.Array]:
        rng = jax.random.fold_in(state.rng, state.step)
        parts = _split_batch(batch, config.micro_batches, mesh)
        grads, metrics = _accumulate(task, state, parts, rng, plan)
        with jax.named_scope("optimizer"):
            updates, opt_state = plan.optimizer.update(grads, state.opt_state, state.trainable)
            trainable = optax.apply_updates(state.trainable, updates)
        squares = [jnp.square(g.astype(jnp.float32)).sum() for g in _leaves(grads)]
        grad_norm = jnp.sqrt(sum(squares))
        own = {"grad_norm": grad_norm, "learning_rate": schedule(state.step)}
        metrics = _as_float32(metrics | {name: (value, 1.0) for name, value in own.items()})
        total, weight = metrics["loss"]
        loss = total / jnp.where(weight == 0, 1.0, weight)
        skipped = _is_skipped(config, loss, grad_norm)
        if skipped is None:
            skipped = jnp.zeros((), bool)
        else:
            trainable, opt_state = jax.tree.map(
                lambda old, new: jnp.where(skipped, old, new),
                (state.trainable, state.opt_state),
                (trainable, opt_state),
            )
        new = TrainState(trainable, state.frozen, opt_state, state.step + 1, state.rng)
        health = jnp.stack([loss, skipped.astype(jnp.float32), *squares])
        return new, metrics, health

    repeated = partitioning.replicated(mesh)
    shardings = (plan.shardings, repeated, repeated)
    return jax.jit(train_step, donate_argnums=0, out_shardings=shardings)


def trainable_paths(plan: Layout) -> list[str]:
    """Returns the paths of the trainable leaves in the order of a step's `health`."""
    return sorted(params_lib.flatten(plan.abstract.trainable))


def make_eval_step(evaluator: Evaluator, mesh: Mesh) -> Callable[[Tree, Batch], Metrics]:
    """Returns the jitted (params, batch) -> {name: (sum, weight)} of one evaluation."""

    def eval_step(params: Tree, batch: Batch) -> Metrics:
        return _as_float32(evaluator.metrics(params, batch))

    return jax.jit(eval_step, out_shardings=partitioning.replicated(mesh))


def _leaves(grads: Tree) -> list[jax.Array]:
    """The leaves in the order of `trainable_paths`."""
    return [leaf for _, leaf in sorted(params_lib.flatten(grads).items())]


def _is_skipped(config: ConfigDict, loss: jax.Array, grad_norm: jax.Array) -> jax.Array | None:
    """Whether to leave out this update, bool []; None where the config never asks for that."""
    skipped = None
    if config.on_nonfinite == "skip":
        skipped = ~(jnp.isfinite(loss) & jnp.isfinite(grad_norm))
    if config.skip_grad_norm:
        large = grad_norm > config.skip_grad_norm
        skipped = large if skipped is None else skipped | large
    return skipped


def _split_batch(batch: Batch, parts: int, mesh: Mesh) -> Batch:
    """Returns [parts, rows / parts, ...] arrays; row r goes to part r mod parts.

    A device's rows stay on it: parts are strided through the batch, not cut off it in blocks.
    """

    rows = jax.tree.leaves(batch)[0].shape[0]
    if rows % (parts * mesh.size):
        raise ValueError(
            f"a batch of {rows} rows does not split into micro_batches={parts} x "
            f"{mesh.size} devices; every batch size of the run must."
        )

    def one(x: jax.Array) -> jax.Array:
        x = x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1)
        spec = NamedSharding(mesh, PartitionSpec(None, partitioning.AXES))
        return jax.lax.with_sharding_constraint(x, spec)

    return jax.tree.map(one, batch)


def _accumulate(
    task: Task, state: TrainState, parts: Batch, rng: jax.Array, plan: Layout
) -> tuple[Tree, Metrics]:
    """Returns the gradient of the whole batch and its summed metrics."""
    count = jax.tree.leaves(parts)[0].shape[0]

    def gradient(index: jax.Array, batch: Batch) -> tuple[Tree, Metrics]:
        def objective(trainable: Tree) -> tuple[jax.Array, Metrics]:
            params = params_lib.merge(trainable, state.frozen)
            with jax.named_scope("loss"):
                mean, metrics = task.loss(params, batch, jax.random.fold_in(rng, index))
            weight = jax.lax.stop_gradient(jnp.asarray(metrics["loss"][1], jnp.float32))
            return mean * weight, _as_float32(metrics)

        grads, metrics = jax.grad(objective, has_aux=True)(state.trainable)
        # Laid out like its parameter from the start: a device never holds a whole gradient.
        return jax.lax.with_sharding_constraint(grads, plan.shardings.trainable), metrics

    if count == 1:
        grads, metrics = gradient(0, jax.tree.map(lambda x: x[0], parts))
    else:
        shapes = jax.eval_shape(gradient, 0, jax.tree.map(lambda x: x[0], parts))
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, _sum_dtype(leaf.dtype)), shapes)

        def add(total: Tree, indexed: tuple[jax.Array, Batch]) -> tuple[Tree, None]:
            return jax.tree.map(jnp.add, total, gradient(*indexed)), None

        (grads, metrics), _ = jax.lax.scan(add, zeros, (jnp.arange(count), parts))
    weight = metrics["loss"][1]
    scale = 1.0 / jnp.where(weight == 0, 1.0, weight)  # a batch of padding alone moves nothing
    return jax.tree.map(lambda g, p: (g * scale).astype(p.dtype), grads, state.trainable), metrics


def _sum_dtype(dtype: Any) -> Any:
    """Sums of bfloat16 gradients lose their small terms: they are kept in float32."""
    return jnp.promote_types(dtype, jnp.float32)


def _as_float32(metrics: Metrics) -> Metrics:
    return jax.tree.map(lambda value: jnp.asarray(value, jnp.float32), metrics)
