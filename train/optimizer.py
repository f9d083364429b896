"""The optax optimiser that a config describes: schedule, clipping, groups."""

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

Tree = Any


def make_schedule(config: ConfigDict) -> optax.Schedule:
    """Returns step -> learning rate: linear warm-up, then constant, linear or cosine decay.

    Warm-up gives step s (from 0) the share (s + 1) / warmup_steps of the peak, so that no step is
    spent on a rate of 0; the decay reaches `end_ratio` of the peak at `total_steps`.

    Args:
      config: the whole config; reads `optimizer.*` and `total_steps`.
    """
    o = config.optimizer
    peak, end, warmup, kind = o.learning_rate, o.end_ratio, o.warmup_steps, o.schedule
    span = max(config.total_steps - warmup, 1)

    def schedule(step: jax.Array) -> jax.Array:
        step = jnp.asarray(step, jnp.float32)
        done = jnp.clip((step - warmup) / span, 0.0, 1.0)
        decay = {
            "constant": jnp.ones_like(done),
            "linear": 1 - (1 - end) * done,
            "cosine": end + (1 - end) * 0.5 * (1 + jnp.cos(jnp.pi * done)),
        }[kind]
        return peak * decay * jnp.minimum((step + 1) / max(warmup, 1), 1.0)

    return schedule


def make_optimizer(config: ConfigDict, labels: Tree) -> optax.GradientTransformation:
    """Returns the update rule for the trainable parameters.

    Groups: weight decay spares the groups named `no_decay` or `*_no_decay`, and
    `optimizer.multiplier.<group>`, where a method has that field, scales a group's learning rate.
    All groups share one state, so that the checkpoint has one slot a parameter whatever the groups.

    Args:
      config: the whole config; reads `optimizer.*` and `total_steps`.
      labels: the group of each trainable leaf.

    Raises:
      ValueError: a multiplier for a group that no parameter is in.
    """
    o = config.optimizer
    multipliers = dict(o.get("multiplier", {}))
    _check_groups(multipliers, jax.tree.leaves(labels))
    decays = jax.tree.map(lambda group: not group.endswith("no_decay"), labels)
    scales = jax.tree.map(lambda group: multipliers.get(group, 1.0), labels)
    parts = [optax.clip_by_global_norm(o.clip_norm)] if o.clip_norm else []
    parts.append(_rule(o))
    if o.name != "adam" and o.weight_decay:
        parts.append(optax.add_decayed_weights(o.weight_decay, mask=decays))
    if any(scale != 1.0 for scale in multipliers.values()):
        parts.append(_scale_leaves(scales))
    parts.append(optax.scale_by_learning_rate(make_schedule(config)))
    return optax.chain(*parts)


def _rule(o: ConfigDict) -> optax.GradientTransformation:
    """The direction of a step, before weight decay and learning rate."""
    if o.name in ("adamw", "adam"):
        return optax.scale_by_adam(b1=o.b1, b2=o.b2, eps=o.eps)
    if o.name == "adafactor":
        return optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0))
    return optax.trace(decay=o.b1) if o.b1 else optax.identity()


def _scale_leaves(scales: Tree) -> optax.GradientTransformation:
    """Multiplies each update by its own constant."""
    return optax.stateless(lambda updates, _: jax.tree.map(jnp.multiply, updates, scales))


def _check_groups(multipliers: Mapping[str, float], groups: Iterable[str]) -> None:
    groups = sorted(set(groups))
    absent = sorted(multipliers.keys() - set(groups))
    if absent:
        raise ValueError(f"optimizer.multiplier.{absent[0]}: no such group; groups are {groups}.")
