"""Rows as wide as a vocabulary: their largest entries, and draws from them, without wide sorts.

`jax.lax.top_k` over a vocabulary costs a TPU twice as much, and a backend with an operation of its
own for it, such as the CPU's, first gathers rows that are split over devices onto each of them.
`jax.random.categorical` draws a number for each entry: ten times the cost on a CPU.
"""

import math

import jax
import jax.numpy as jnp

MIN_SIZE = 1024  # rows shorter than this are not worth two stages


def top_k(x: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """The k largest of each row, largest first, those of lower index first among equals.

    In long rows, the k largest lie within the k groups of neighbours with the largest maxima: any
    other group has k maxima before it. So only those groups are compared element by element.

    Args:
      x: [N, V] float, free of NaN.
      k: how many, at most V.

    Returns:
      values [N, k] and indices [N, k] int32, equal to those of `jax.lax.top_k`.
    """
    width = _width(x.shape[1] / k)  # balances the two stages
    if x.shape[1] < MIN_SIZE or x.shape[1] <= 2 * k * width:
        return jax.lax.top_k(x, k)
    groups = _groups(x, width)
    chosen = jax.lax.top_k(jnp.max(groups, axis=-1), k)[1]
    chosen = jnp.sort(chosen, axis=-1)  # so that equal values stay in the order of their index
    within = jnp.take_along_axis(groups, chosen[:, :, None], axis=1).reshape(len(x), k * width)
    values, place = jax.lax.top_k(within, k)
    return values, jnp.take_along_axis(chosen, place // width, axis=-1) * width + place % width


def draw(rng: jax.Array, logits: jax.Array) -> jax.Array:
    """Draws an index [N] for each row of logits [N, V], with the probabilities of its softmax.

    In long rows first a group of neighbours by its total probability, then an entry of the group.
    """
    if logits.shape[1] < MIN_SIZE:
        return jax.random.categorical(rng, logits)
    width = _width(logits.shape[1])
    groups = _groups(logits, width)
    by_group, by_entry = jax.random.split(rng)
    group = jax.random.categorical(by_group, jax.nn.logsumexp(groups, axis=-1))
    within = jnp.take_along_axis(groups, group[:, None, None], axis=1)[:, 0]
    return group * width + jax.random.categorical(by_entry, within)


def mass_threshold(x: jax.Array, mass: jax.Array, limit: float) -> tuple[jax.Array, jax.Array]:
    """The largest value of each row below which no more than `limit` of its mass lies.

    Found bit by bit, in 32 sums over the row instead of a sort.

    Args:
      x: [N, V] float32, free of NaN.
      mass: [N, V] float32, not negative, in all more than `limit`.
      limit: the mass that may lie below.

    Returns:
      the value, one of the row's, and the mass below it, both [N, 1].
    """
    x = jnp.where(x == 0, 0.0, x)  # the two zeros have different bits
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    sign = jnp.uint32(1 << 31)
    order = jnp.where(bits & sign, ~bits, bits | sign)  # unsigned integers ordered as the floats

    def below(bound: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(order < bound, mass, 0.0), axis=-1, keepdims=True)

    def refine(i: jax.Array, bound: jax.Array) -> jax.Array:
        higher = bound | (sign >> i.astype(jnp.uint32))
        return jnp.where(below(higher) <= limit, higher, bound)

    start = jnp.zeros_like(order[:, :1])
    bound = jax.lax.fori_loop(0, 32, refine, start)
    value = jnp.where(bound & sign, bound ^ sign, ~bound)
    return jax.lax.bitcast_convert_type(value, jnp.float32), below(bound)


def _width(size: float) -> int:
    """The power of two nearest to the square root."""
    return 2 ** round(math.log2(max(size, 1)) / 2)


def _groups(x: jax.Array, width: int) -> jax.Array:
    """[N, V] as [N, groups, width], filled up with -inf."""
    room = ((0, 0), (0, -x.shape[1] % width))
    return jnp.pad(x, room, constant_values=-jnp.inf).reshape(len(x), -1, width)
