"""What training carries from step to step, and how it is laid out on the mesh."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from jaxmodels.core import params as params_lib
from jaxmodels.core import partitioning
from jaxmodels.core.task import FROZEN, Task
from train.optimizer import make_optimizer

Tree = Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that a step reads and writes.

    Attributes:
      trainable: nested dict of the parameters that the optimiser moves.
      frozen: nested dict of the others; they have no gradient and no optimiser slot.
      opt_state: the optax state of `trainable`.
      step: int32 []; updates made so far.
      rng: key []; constant: step s draws from `fold_in(rng, s)`.
    """

    trainable: Tree
    frozen: Tree
    opt_state: Tree
    step: jax.Array
    rng: jax.Array

    @property
    def params(self) -> Tree:
        """All parameters in one nested dict, as `Task` takes them."""
        return params_lib.merge(self.trainable, self.frozen)


@dataclasses.dataclass(frozen=True)
class Layout:
    """Shapes, types, placement and groups of a state, before any of it exists.

    Attributes:
      abstract: a TrainState of `jax.ShapeDtypeStruct`s with shardings.
      groups: {path: optimiser group, or "frozen"} of every parameter.
      optimizer: the update rule.
    """

    abstract: TrainState
    groups: dict[str, str]
    optimizer: optax.GradientTransformation

    @property
    def shardings(self) -> TrainState:
        """The sharding of each leaf of the state."""
        return jax.tree.map(lambda leaf: leaf.sharding, self.abstract)


def abstract_params(task: Task, mesh: Mesh) -> Tree:
    """Returns the parameters as shape structs placed on `mesh`; nothing is computed."""
    boxed = jax.eval_shape(task.init, jax.random.key(0))
    shardings = partitioning.param_shardings(boxed, mesh)
    return jax.tree.map(_place, partitioning.unbox(boxed), shardings)


def layout(task: Task, config: ConfigDict, mesh: Mesh) -> Layout:
    """Returns the layout of the state on `mesh`; nothing is computed.

    Raises:
      ValueError: `task.param_groups` does not label each parameter, or labels all of them frozen.
    """
    abstract = abstract_params(task, mesh)
    groups = params_lib.flatten(task.param_groups(abstract))
    _check_labels(groups, params_lib.flatten(abstract))
    trainable, frozen = split(abstract, groups)
    labels = params_lib.unflatten({p: g for p, g in groups.items() if g != FROZEN})
    optimizer = make_optimizer(config, labels)
    repeated = partitioning.replicated(mesh)

    def like_its_parameter(slot: Any, parameter: Any) -> Any:  # factored slots are small: repeated
        return _place(slot, parameter.sharding if slot.shape == parameter.shape else repeated)

    opt_state = optax.tree_utils.tree_map_params(
        optimizer,
        like_its_parameter,
        jax.eval_shape(optimizer.init, trainable),
        trainable,
        transform_non_params=lambda slot: _place(slot, repeated),
    )
    key = jax.eval_shape(lambda: jax.random.key(0))
    step = jax.ShapeDtypeStruct((), jnp.int32)
    state = TrainState(trainable, frozen, opt_state, _place(step, repeated), _place(key, repeated))
    return Layout(state, groups, optimizer)


def create(task: Task, config: ConfigDict, mesh: Mesh, plan: Layout | None = None) -> TrainState:
    """Returns the state of step 0, made in place on `mesh`: no device ever holds a whole copy.

    Args:
      task: gives the parameters and their groups.
      config: gives the seed and the optimiser.
      mesh: from `make_mesh`.
      plan: `layout(task, config, mesh)`, where the caller has it already.
    """
    plan = plan or layout(task, config, mesh)

    def init(key: jax.Array) -> TrainState:
        params_key, train_key = jax.random.split(key)
        params = partitioning.unbox(task.init(params_key))
        trainable, frozen = split(params, plan.groups)
        opt_state = plan.optimizer.init(trainable)
        return TrainState(trainable, frozen, opt_state, jnp.zeros((), jnp.int32), train_key)

    return jax.jit(init, out_shardings=plan.shardings)(jax.random.key(config.seed))


def split(params: Tree, groups: dict[str, str]) -> tuple[Tree, Tree]:
    """Returns (trainable, frozen) parts of `params`, each a nested dict."""
    return params_lib.split(params, lambda path: groups[path] != FROZEN)


def _place(leaf: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _check_labels(groups: dict[str, str], params: dict[str, Any]) -> None:
    if groups.keys() != params.keys():
        differ = sorted(groups.keys() ^ params.keys())
        raise ValueError(
            f"param_groups: {len(differ)} paths lack a label or a parameter: {differ[:5]}."
        )
    if all(group == FROZEN for group in groups.values()):
        raise ValueError("param_groups: every parameter is frozen; there is nothing to train.")
