"""Transformer layers against numpy; the scan over layers; growing a position table."""

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from jaxmodels.core import blocks, layers
from jaxmodels.core.embeddings import TokenEmbeddings, grow_position_table
from tests.vcc import small

Arrays = dict[str, np.ndarray]
erf = np.vectorize(math.erf)


def norm(x: np.ndarray, p: Arrays, eps: float = 1e-5) -> np.ndarray:
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * p["scale"] + p["bias"]


def linear(x: np.ndarray, p: Arrays) -> np.ndarray:
    return x @ p["kernel"] + p["bias"]


def attend(x: np.ndarray, p: dict[str, Arrays], keep: np.ndarray, num_heads: int) -> np.ndarray:
    split = [
        linear(x, p[n]).reshape(*x.shape[:2], num_heads, -1) for n in ("query", "key", "value")
    ]
    scores = np.einsum("bqhd,bkhd->bhqk", split[0], split[1]) / np.sqrt(split[0].shape[-1])
    weights = np.exp(scores) * keep[:, None, None, :]
    weights = weights / weights.sum(-1, keepdims=True)
    return linear(np.einsum("bhqk,bkhd->bqhd", weights, split[2]).reshape(x.shape), p["out"])


def feed_forward(x: np.ndarray, p: dict[str, Arrays]) -> np.ndarray:
    inner = linear(x, p["wi"])
    return linear(inner * 0.5 * (1 + erf(inner / np.sqrt(2))), p["wo"])


@pytest.mark.parametrize("order", ["pre", "post"])
def test_transformer_layer_is_its_formula(order: str) -> None:
    layer = blocks.TransformerLayer(num_heads=2, d_model=8, d_ff=12, norm_order=order)
    x = jax.random.normal(jax.random.key(0), (2, 5, 8))
    keep = np.array([[1, 1, 1, 1, 1], [1, 1, 0, 1, 0]])
    bias = jnp.where(keep == 1, 0.0, -1e9)[:, None, None, :]
    params = small.drawn(layer.init, x, size=0.3, spread=True)
    p, y = jax.tree.map(lambda a: np.asarray(a, np.float64), params["params"]), np.asarray(x)
    if order == "pre":
        y = y + attend(norm(y, p["attention_norm"]), p["attention"], keep, 2)
        y = y + feed_forward(norm(y, p["ffn_norm"]), p["ffn"])
    else:
        y = norm(y + attend(y, p["attention"], keep, 2), p["attention_norm"])
        y = norm(y + feed_forward(y, p["ffn"]), p["ffn_norm"])
    np.testing.assert_allclose(layer.apply(params, x, bias), y, atol=2e-5)


def test_an_unknown_norm_order_is_refused() -> None:
    layer = blocks.TransformerLayer(num_heads=1, d_model=4, d_ff=4, norm_order="middle")
    with pytest.raises(ValueError, match="'middle': use 'pre' or 'post'"):
        layer.init(jax.random.key(0), jnp.zeros((1, 1, 4)))


@pytest.mark.parametrize("policy", sorted(blocks.REMAT_POLICIES))
def test_scan_equals_a_loop_under_every_remat_policy(policy: str) -> None:
    weights = jax.random.normal(jax.random.key(0), (4, 3, 3))

    def body(w: jax.Array, x: jax.Array, key: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        return jnp.tanh(x @ w), x.sum()

    def scanned(w: jax.Array) -> jax.Array:
        return blocks.scan_layers(body, w, jnp.ones((2, 3)), policy=policy)[0].sum()

    def looped(w: jax.Array) -> jax.Array:
        x = jnp.ones((2, 3))
        for one in w:
            x, _ = body(one, x, None)
        return x.sum()

    chex.assert_trees_all_close(
        jax.value_and_grad(scanned)(weights), jax.value_and_grad(looped)(weights), rtol=1e-5
    )
    sums = blocks.scan_layers(body, weights, jnp.ones((2, 3)))[1]
    assert sums.shape == (4,) and float(sums[0]) == 6


def test_each_layer_of_a_scan_draws_from_its_own_rng() -> None:
    def body(w: jax.Array, x: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        return x, jax.random.uniform(key)

    drawn = blocks.scan_layers(body, jnp.zeros(5), jnp.zeros(()), jax.random.key(0))[1]
    assert len(set(drawn.tolist())) == 5


def test_an_unknown_remat_policy_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="'some'.*dots.*full.*none"):
        blocks.remat(lambda x: x, "some")


def test_stacked_layers_start_differently_and_carry_their_axis_names() -> None:
    layer = blocks.TransformerLayer(num_heads=1, d_model=4, d_ff=8)
    boxed = blocks.stacked_init(layer, 3, 4)(jax.random.key(0))
    kernel = boxed["ffn"]["wi"]["kernel"]
    assert kernel.names == ("layers", "embed", "mlp") and kernel.value.shape == (3, 4, 8)
    assert float(jnp.abs(kernel.value[0] - kernel.value[1]).max()) > 0
    cut = blocks.layer_slice(meta.unbox(boxed), 1, 3)
    chex.assert_trees_all_equal(cut["ffn"]["wi"]["kernel"], kernel.value[1:])


@pytest.mark.parametrize(
    ("old", "rows", "offset"), [(6, 15, 2), (6, 6, 2), (5, 12, 0), (514, 4098, 2)]
)
def test_position_table_grows_by_repeating_the_rows_behind_its_offset(
    old: int, rows: int, offset: int
) -> None:
    table = np.arange(old * 2.0).reshape(old, 2)
    grown = np.asarray(grow_position_table(table, rows, offset))
    assert grown.shape == (rows, 2)
    for row in range(rows):
        source = row if row < offset else offset + (row - offset) % (old - offset)
        np.testing.assert_array_equal(grown[row], table[source])


def test_a_position_table_does_not_shrink() -> None:
    with pytest.raises(ValueError, match="of 6 rows to 5 rows"):
        grow_position_table(np.zeros((6, 2)), 5)


def test_embeddings_add_word_shifted_position_and_type() -> None:
    module = TokenEmbeddings(9, 4, position_rows=7, num_token_types=2, position_offset=2)
    ids, positions, types = jnp.array([[8, 3]]), jnp.array([[0, 4]]), jnp.array([[1, 0]])
    params = meta.unbox(module.init(jax.random.key(0), ids, positions, types))
    p = jax.tree.map(np.asarray, params["params"])
    tables = (p[name]["embedding"] for name in ("word", "position", "token_type"))
    total = sum(t[i] for t, i in zip(tables, ([8, 3], [2, 6], [1, 0]), strict=True))
    found = module.apply(params, ids, positions, types)[0]
    np.testing.assert_allclose(found, norm(total, p["norm"]), atol=1e-5)


def test_rms_norm_divides_by_the_root_mean_square_in_float32() -> None:
    x = jnp.array([[3e4, -4e4, 0.0, 1e2]], jnp.float16)  # squares overflow float16
    module = layers.RMSNorm(dtype=jnp.float32)
    found = module.apply(meta.unbox(module.init(jax.random.key(0), x)), x)
    full = np.asarray(x, np.float64)
    np.testing.assert_allclose(found, full / np.sqrt((full**2).mean()), rtol=1e-5)
