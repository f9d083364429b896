"""Attention: implementations agree, masks and caches mean what they say, errors say why."""

import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from jaxmodels.core import attention
from jaxmodels.core.kv_cache import KVCache

B, Q, K, H, D = 2, 70, 50, 3, 4  # Q is no multiple of the chunk


def heads(seed: int, length: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), (B, length, H, D))


QUERY, KEY, VALUE = heads(0, Q), heads(1, K), heads(2, K)
BIASES = {
    "none": None,
    "keys": (B, 1, 1, K),
    "heads": (1, H, 1, K),
    "queries": (1, 1, Q, K),
    "heads and queries": (1, H, Q, K),
    "all": (B, H, Q, K),
}


def bias_of(name: str) -> jax.Array | None:
    shape = BIASES[name]
    return None if shape is None else 2 * jax.random.normal(jax.random.key(3), shape)


def reference(query: jax.Array, key: jax.Array, value: jax.Array, bias: jax.Array) -> np.ndarray:
    """Numpy in float64, query by query."""
    q, k, v, b = (np.asarray(x, np.float64) for x in (query, key, value, bias))
    b = np.broadcast_to(b, (B, H, Q, K))
    out = np.zeros((B, Q, H, D))
    for i, j, h in np.ndindex(B, Q, H):
        scores = k[i, :, h] @ q[i, j, h] * 0.5 + b[i, h, j]
        weights = np.exp(scores - scores.max())
        out[i, j, h] = weights @ v[i, :, h] / weights.sum()
    return out


@pytest.mark.parametrize("implementation", ["xla", "chunked"])
@pytest.mark.parametrize("name", BIASES)
def test_attention_is_the_textbook_formula_under_any_bias(name: str, implementation: str) -> None:
    bias = bias_of(name)
    found = jax.jit(attention.dot_product_attention, static_argnames=("scale", "implementation"))(
        QUERY, KEY, VALUE, bias, scale=0.5, implementation=implementation
    )
    expected = reference(QUERY, KEY, VALUE, np.zeros(()) if bias is None else bias)
    np.testing.assert_allclose(found, expected, atol=2e-6)


@pytest.mark.parametrize("name", BIASES)
def test_gradients_of_chunked_attention_equal_plain(name: str) -> None:
    bias = bias_of(name)
    given = (QUERY, KEY, VALUE) if bias is None else (QUERY, KEY, VALUE, bias)
    plain, chunked = (
        jax.jit(jax.grad(
            lambda *a, i=i: jnp.sin(
                attention.dot_product_attention(*a, scale=0.5, implementation=i)
            ).sum(),
            argnums=tuple(range(len(given))),
        ))(*given)
        for i in ("xla", "chunked")
    )  # fmt: skip
    chex.assert_trees_all_close(plain, chunked, atol=2e-5)


@pytest.mark.parametrize("implementation", ["xla", "chunked"])
def test_rows_with_every_key_masked_stay_finite_with_gradients(implementation: str) -> None:
    bias = attention.key_mask_bias(jnp.zeros((B, K)))[:, None, None, :]

    def total(query: jax.Array) -> jax.Array:
        mixed = attention.dot_product_attention(
            query, KEY, VALUE, bias, implementation=implementation
        )
        return mixed.sum()

    value, bar = jax.value_and_grad(total)(QUERY)
    assert jnp.isfinite(value) and jnp.isfinite(bar).all()


@pytest.mark.parametrize("offset", [0, 3])
def test_causal_bias_hides_later_keys_alone(offset: int) -> None:
    allowed = np.asarray(attention.causal_bias(4, 7, offset))[0, 0] == 0
    np.testing.assert_array_equal(allowed, np.tril(np.ones((4, 7), bool), offset))


def test_masked_keys_have_no_influence() -> None:
    bias = attention.key_mask_bias(jnp.arange(K)[None] < 20)[:, None, None, :]
    shown = attention.dot_product_attention(QUERY, KEY, VALUE, bias)
    cut = attention.dot_product_attention(QUERY, KEY[:, :20], VALUE[:, :20])
    chex.assert_trees_all_close(shown, cut, atol=1e-6)


@pytest.mark.parametrize("steps", [(1,) * 6, (4, 1, 1), (6,)])
def test_decoding_with_a_cache_equals_one_causal_pass(steps: tuple[int, ...]) -> None:
    module = attention.MultiHeadAttention(num_heads=2, d_model=8)
    x = jax.random.normal(jax.random.key(0), (3, 6, 8))
    variables = jax.tree.map(lambda w: 20 * w, meta.unbox(module.init(jax.random.key(1), x)))
    whole = module.apply(variables, x, attention.causal_bias(6, 6))
    cache, parts, first = KVCache.empty((3, 2, 9, 4)), [], 0
    decode = jax.jit(lambda x, cache: module.apply(variables, x, cache, method="decode"))
    for count in steps:
        out, cache = decode(x[:, first : first + count], cache)
        parts, first = [*parts, out], first + count
    assert int(cache.length) == 6
    chex.assert_trees_all_close(jnp.concatenate(parts, axis=1), whole, atol=2e-6)


@pytest.mark.slow
def test_cross_attention_reads_the_context_and_not_itself() -> None:
    module = attention.MultiHeadAttention(num_heads=2, d_model=8, head_dim=3, use_bias=False)
    rng = np.random.default_rng(0)
    x, context = (rng.normal(size=(1, n, 8)).astype(np.float32) for n in (2, 5))
    params = jax.tree.map(
        lambda w: 9 * np.asarray(w), meta.unbox(jax.jit(module.init)(jax.random.key(2), x))
    )
    w = {name: leaf["kernel"] for name, leaf in params["params"].items()}
    assert w["query"].shape == (8, 6) and set(params["params"]["query"]) == {"kernel"}
    mixed = []
    for h in (slice(0, 3), slice(3, 6)):
        q, k, v = x @ w["query"][:, h], context @ w["key"][:, h], context @ w["value"][:, h]
        scores = np.exp(q @ k.mT * 3**-0.5)
        mixed.append(scores / scores.sum(-1, keepdims=True) @ v)
    expected = np.concatenate(mixed, -1) @ w["out"]
    found = jax.jit(module.apply)(params, x, context=context)
    chex.assert_trees_all_close(found, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"implementation": "flash"}, "'flash'"),
        ({"implementation": "cudnn", "dropout": lambda w: w}, "no dropout"),
        ({"implementation": "chunked", "dropout": lambda w: w}, "no dropout"),
    ],
)
def test_requests_that_no_implementation_serves_are_refused(given: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        attention.dot_product_attention(QUERY, KEY, VALUE, **given)


def test_heads_that_do_not_divide_the_width_are_refused() -> None:
    module = attention.MultiHeadAttention(num_heads=3, d_model=8)
    with pytest.raises(ValueError, match=re.escape("num_heads=3 does not divide d_model=8")):
        module.init(jax.random.key(0), jnp.zeros((1, 2, 8)))


def test_dropout_of_weights_keeps_their_mean_and_needs_training() -> None:
    module = attention.MultiHeadAttention(num_heads=1, d_model=8, dropout_rate=0.5)
    x = jnp.ones((1, 400, 8))
    params = meta.unbox(module.init(jax.random.key(0), x))
    quiet = module.apply(params, x)
    loud = module.apply(params, x, deterministic=False, rngs={"dropout": jax.random.key(1)})
    assert float(jnp.abs(loud - quiet).max()) > 0
    np.testing.assert_allclose(loud.mean(1), quiet.mean(1), rtol=0.05, atol=1e-5)
