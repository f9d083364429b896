"""Sparse patterns: each against plain attention over all pairs with the mask it stands for."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodels.core import attention
from jaxmodels.vcc.baseline_attentions import BigBird, LongT5, Window
from jaxmodels.vcc.baseline_attentions.bigbird import block_sparse_attention
from jaxmodels.vcc.baseline_attentions.chunks import Keys
from jaxmodels.vcc.baseline_attentions.sparse import Heads, Sequences
from tests.vcc.small_t5 import QUICK

FAR = 5  # of the position bias: beyond it nothing changes


def normal(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def heads(length: int, **more: Any) -> Heads:
    query, key, value = normal(length, 3, 2, length, 3, 4)
    return Heads(query, key, value, **more)


def sequences(length: int, real: int, positions: bool, vips: tuple[int, ...] = ()) -> Sequences:
    """Two rows: one whole, one of `real` tokens."""
    keep = jnp.asarray(np.arange(length) < np.array([[length], [real]]))
    vip = jnp.asarray(np.isin(np.arange(length), vips)[None].repeat(2, 0))
    values = normal(9, 3, 2 * FAR + 1) if positions else None
    side = normal(8, 3, 2 * FAR + 1) if positions else None
    return Sequences(keep, vip, values, side)


def dense(given: Heads, counts: np.ndarray, bias: np.ndarray | None) -> np.ndarray:
    """Attention where key k counts `counts` [B, H or 1, n, K] times for a query."""
    scores = np.einsum("bqhd,bkhd->bhqk", given.query, given.key)
    weights = np.exp(scores if bias is None else scores + bias) * counts
    weights = weights / np.maximum(weights.sum(-1, keepdims=True), 1e-30)
    return np.einsum("bhqk,bkhd->bqhd", weights, given.value)


def position_bias(given: Sequences) -> np.ndarray | None:
    if given.values is None:
        return None
    place = np.arange(given.keep.shape[1])
    return looked_up(given.values, place[None, :] - place[:, None])


def looked_up(values: jax.Array, relative: np.ndarray) -> np.ndarray:
    return np.asarray(values)[:, np.clip(relative, -FAR, FAR) + FAR]


def compare(found: jax.Array, wanted: np.ndarray, given: Sequences) -> None:
    keep = np.asarray(given.keep)
    np.testing.assert_allclose(np.asarray(found)[keep], wanted[keep], atol=2e-5)


def mixed(pattern: Any, given: Heads, inputs: Sequences, layer: int = 0) -> jax.Array:
    def run(given: Heads, inputs: Sequences) -> jax.Array:
        return pattern.mix(given, pattern.prepare(inputs, 3, 2), layer, None)

    return jax.jit(run, compiler_options=QUICK)(given, inputs)


@pytest.mark.parametrize(
    ("length", "window", "num_global", "vips", "positions"),
    [
        (23, 6, 2, None, True),
        (16, 8, 0, None, False),
        (7, 40, 1, None, True),
        (23, 4, 3, (5, 6, 14, 20), True),
        (9, 4, 3, (4,), False),
    ],
)
def test_a_window_is_a_dense_band(
    length: int, window: int, num_global: int, vips: tuple | None, positions: bool
) -> None:
    kind = "first" if vips is None else "vip"
    pattern = Window(window, num_global, kind)
    inputs, given = sequences(length, length - 3, positions, vips or ()), heads(length)
    keep, place = np.asarray(inputs.keep), np.arange(length)
    chosen = np.zeros_like(keep)
    for row in range(2):
        real = [i for i in (vips or place[:num_global]) if keep[row, i]][:num_global]
        chosen[row, np.array(real, int)] = True
    near = np.abs(place[:, None] - place[None, :]) <= window // 2
    seen = (near[None] | chosen[:, None, :] | chosen[:, :, None]) & keep[:, None, :]
    wanted = dense(given, seen[:, None], position_bias(inputs))
    compare(mixed(pattern, given, inputs), wanted, inputs)


@pytest.mark.parametrize(
    ("length", "real", "radius", "block", "positions"),
    [
        (23, 17, 3, 4, True),
        (24, 24, 3, 4, False),
        (23, 14, 2, 4, True),
        (9, 3, 7, 4, True),
        (20, 11, 3, 0, True),
        (3, 3, 3, 4, False),
    ],
)
def test_longt5_is_dense_attention_to_tokens_and_summaries(
    length: int, real: int, radius: int, block: int, positions: bool
) -> None:
    pattern, inputs = LongT5(radius, block), sequences(length, real, positions)
    keep, place = np.asarray(inputs.keep), np.arange(length)
    count = length // block if block else 0
    side = Keys(*normal(4, 2, 2, count, 3, 4)) if block else None
    given = heads(length, side=side)
    whole = keep.sum(1) // block if block else np.zeros(2, int)  # blocks without orphans
    near = (np.abs(place[:, None] - place[None, :]) <= radius)[None] & keep[:, None, :]
    counts, bias = near[:, None].astype(float), np.zeros((2, 3, length, length + count))
    if positions:
        bias[..., :length] = position_bias(inputs)
    joined = given
    if block:
        seen = np.arange(count)[None, :] < whole[:, None]
        seen = np.broadcast_to(seen[:, None, None], (2, 1, length, count))
        counts = np.concatenate([counts, seen], axis=-1)
        own = np.minimum(place // block, whole[:, None] - 1)
        if positions:
            relative = np.arange(count) - own[..., None]
            bias[..., length:] = np.moveaxis(looked_up(inputs.side_values, relative), 0, 1)
        joined = given.replace(
            key=jnp.concatenate([given.key, side.key], 1),
            value=jnp.concatenate([given.value, side.value], 1),
        )
    compare(mixed(pattern, given, inputs), dense(joined, counts, bias), inputs)


def test_longt5_sums_the_tokens_behind_the_last_whole_block_into_it() -> None:
    pattern, inputs, x = LongT5(3, 4), sequences(15, 10, False), normal(0, 2, 15, 6)
    found = pattern.summaries(x, pattern.prepare(inputs, 3, 2))
    first = [x[0, :4].sum(0), x[0, 4:8].sum(0), x[0, 8:15].sum(0)]
    second = [x[1, :4].sum(0), x[1, 4:10].sum(0), jnp.zeros(6)]
    np.testing.assert_allclose(found, jnp.array([first, second]), atol=1e-5)


@pytest.mark.parametrize(
    ("length", "size", "random", "positions"),
    [(30, 4, 1, True), (24, 3, 0, False), (20, 4, 1, True)],
)
def test_bigbird_is_dense_attention_to_its_blocks(
    length: int, size: int, random: int, positions: bool
) -> None:
    pattern, given = BigBird(size, random), heads(length)
    inputs = sequences(length, length - 5, positions)
    count = -(-length // size)
    picks = pattern.random_blocks(2, 3, count)[1]
    blocks = np.zeros((3, count, count))
    for row in range(count):
        blocks[:, row, max(row - 1, 0) : row + 2] = 1
    blocks[:, 0] = blocks[:, -1] = blocks[:, :, 0] = blocks[:, :, -1] = 1
    if pattern.is_dense(length):
        blocks[:] = 1
    else:
        for head, row, pick in np.ndindex(picks.shape):
            blocks[head, row + 1, picks[head, row, pick]] += 1
    assert blocks.max() <= 1  # nothing is read twice
    counts = blocks.repeat(size, 1).repeat(size, 2)[None, :, :length, :length]
    counts = counts * np.asarray(inputs.keep)[:, None, None, :]
    wanted = dense(given, counts, position_bias(inputs))
    compare(mixed(pattern, given, inputs, layer=1), wanted, inputs)


def test_random_blocks_differ_by_layer_head_and_row_and_repeat() -> None:
    picks = BigBird(4, 3).random_blocks(2, 3, 20)
    assert picks.shape == (2, 3, 18, 3)
    assert (picks == BigBird(4, 3).random_blocks(2, 3, 20)).all()
    assert (picks != BigBird(4, 3, seed=1).random_blocks(2, 3, 20)).any()
    assert len(np.unique(picks.reshape(6, -1), axis=0)) == 6
    assert (np.sort(picks, -1)[..., 1:] > np.sort(picks, -1)[..., :-1]).all()


def test_a_random_block_named_twice_counts_twice() -> None:
    inputs, given = sequences(24, 24, False), heads(24)
    state = BigBird(4, 0).prepare(inputs, 3, 1)
    picks = jnp.zeros((3, 4, 1), jnp.int32)
    run = jax.jit(lambda *x: block_sparse_attention(*x, 4), compiler_options=QUICK)
    found = run(given, state, picks)
    counts = np.zeros((6, 6))
    for row in range(6):
        counts[row, max(row - 1, 0) : row + 2] = 1
    counts[0] = counts[-1] = counts[:, -1] = counts[:, 0] = 1
    counts[1:-1, 0] = 2
    counts = counts.repeat(4, 0).repeat(4, 1)[None, None]
    compare(found, dense(given, counts, None), inputs)


PATTERNS = [Window(6, 2, "vip"), LongT5(3, 4), BigBird(3, 1)]


def with_side(pattern: Any, length: int) -> Heads:
    side = Keys(*normal(4, 2, 2, length // 4, 3, 4)) if pattern.summarises else None
    return heads(length, side=side)


@pytest.mark.long
@pytest.mark.parametrize(
    "pattern",
    [pytest.param(p, marks=[pytest.mark.slow] * (not isinstance(p, LongT5))) for p in PATTERNS],
    ids=str,
)
def test_results_and_gradients_do_not_depend_on_the_steps(
    pattern: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Recomputed in a scan, and plain: of heads and position bias; a row is padding alone."""
    inputs, given = sequences(25, 0, True, (3, 20)), with_side(pattern, 25)
    weight = normal(5, 2, 25, 3, 4)

    def loss(given: Heads, values: jax.Array, side: jax.Array) -> jax.Array:
        state = pattern.prepare(inputs.replace(values=values, side_values=side), 3, 2)
        return (pattern.mix(given, state, 0, None) * weight).sum()

    def results() -> Any:
        arguments = (given, inputs.values, inputs.side_values)
        run = jax.value_and_grad(lambda *x: loss(*x), argnums=(0, 1, 2))
        return jax.jit(run, compiler_options=QUICK)(*arguments)

    value, plain = results()
    monkeypatch.setattr(attention, "chunking", lambda: (1, 8))
    other, scanned = results()
    np.testing.assert_allclose(value, other, rtol=1e-5)
    for (path, one), two in zip(
        jax.tree_util.tree_leaves_with_path(plain), jax.tree.leaves(scanned), strict=True
    ):
        np.testing.assert_allclose(one, two, atol=3e-5, err_msg=str(path))
        assert jnp.isfinite(one).all(), path
        unused = path[0] == jax.tree_util.SequenceKey(2) and not pattern.summarises
        assert unused or jnp.abs(one).max() > 0, path


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_nothing_of_the_size_of_all_pairs_is_made(pattern: Any) -> None:
    """Whole rows of scores: the window's global tokens and BigBird's two end blocks have them."""
    length = 96
    inputs, given = sequences(length, 90, True, (3, 20)), with_side(pattern, length)

    def run(given: Heads, inputs: Sequences) -> jax.Array:
        return pattern.mix(given, pattern.prepare(inputs, 3, 1), 0, None)

    sizes = [leaf.size for leaf in _arrays(jax.make_jaxpr(run)(given, inputs).jaxpr)]
    assert max(sizes) < 2 * 3 * length * length / 2


def _arrays(jaxpr: Any) -> list[Any]:
    found = [v.aval for e in jaxpr.eqns for v in e.outvars]
    for equation in jaxpr.eqns:
        for inner in jax.tree.leaves(
            list(equation.params.values()),
            is_leaf=lambda x: hasattr(x, "jaxpr") or hasattr(x, "eqns"),
        ):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                found += _arrays(inner)
    return found


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Window(window=7), "window=7"),
        (lambda: Window(window=0), "window=0"),
        (lambda: Window(num_global=-1), "num_global=-1"),
        (lambda: Window(global_tokens="last"), "'last'"),
        (lambda: LongT5(radius=-1), "radius=-1"),
        (lambda: LongT5(global_block_size=-4), "global_block_size=-4"),
        (lambda: BigBird(block_size=0), "block_size=0"),
        (lambda: BigBird(num_random_blocks=-1), "num_random_blocks=-1"),
    ],
)
def test_sizes_out_of_range_are_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
