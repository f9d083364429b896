"""T5's relative bias: buckets by their definition, and the spread over diagonals with gradients."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodels.core.relative_bias import RelativeBias, bucket_table


def bucket(relative: int, num_buckets: int, max_distance: int, bidirectional: bool) -> int:
    """The definition, in float64 with Python's own logarithm."""
    base = 0
    if bidirectional:
        num_buckets //= 2
        base, n = (num_buckets, relative) if relative > 0 else (0, -relative)
    else:
        n = max(-relative, 0)
    exact = num_buckets // 2
    if n < exact:
        return base + n
    grown = math.log(n / exact) / math.log(max_distance / exact) * (num_buckets - exact)
    return base + min(num_buckets - 1, exact + math.floor(grown + 1e-9))


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("buckets", "distance"), [(32, 128), (8, 20), (4, 3), (16, 1000)])
def test_every_distance_is_in_the_bucket_of_the_definition(
    buckets: int, distance: int, bidirectional: bool
) -> None:
    module = RelativeBias(1, buckets, distance, bidirectional)
    relative = np.arange(-2 * distance, 2 * distance + 1)
    table = {"params": {"embedding": jnp.zeros((buckets, 1))}}
    found = module.apply(table, jnp.asarray(relative), method="buckets")
    expected = [bucket(int(r), buckets, distance, bidirectional) for r in relative]
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(("queries", "keys"), [(5, 5), (3, 7), (7, 2), (1, 4)])
def test_the_spread_over_diagonals_is_the_lookup_of_each_pair_with_gradients(
    queries: int, keys: int
) -> None:
    module = RelativeBias(3, 8, 6)
    table = jax.random.normal(jax.random.key(0), (8, 3))
    weights = jax.random.normal(jax.random.key(1), (1, 3, queries, keys))

    def spread(table: jax.Array) -> jax.Array:
        return module.apply({"params": {"embedding": table}}, queries, keys)

    def each(table: jax.Array) -> jax.Array:
        positions = jnp.arange(queries)[None], jnp.arange(keys)[None]
        return module.apply({"params": {"embedding": table}}, *positions, method="at")

    np.testing.assert_array_equal(spread(table), each(table))
    bars = [jax.grad(lambda t, f=f: (f(t) * weights).sum())(table) for f in (spread, each)]
    np.testing.assert_allclose(*bars, rtol=1e-5, atol=1e-5)


def test_too_few_buckets_are_refused() -> None:
    with pytest.raises(ValueError, match="num_buckets=2, max_distance=128: wanted at least 4"):
        bucket_table(2, 128, True)
    with pytest.raises(ValueError, match="a distance above 8"):
        bucket_table(32, 8, True)
