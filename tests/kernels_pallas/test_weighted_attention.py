"""Weighted attention: every implementation against the plain one, and the TPU kernels compiled."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.weighted_attention import RelativeBias, gpu, reference, tiles, tpu
from kernels_pallas.weighted_attention import weighted_attention as attention
from kernels_pallas.weighted_attention.relative import bucket, thresholds

FLOAT32, BFLOAT16 = 3e-5, 2e-2  # error over the array's maximum


def example(batch=2, length=300, heads=2, width=64, dtype=jnp.float32, far=8, seed=0):
    """Inputs in no order of position, positions repeated, some keys hidden; and a cotangent."""
    rng = np.random.default_rng(seed)
    shape = (batch, length, heads, width)
    query, key, value, g = (
        jnp.asarray(rng.normal(size=shape) * scale, dtype) for scale in (0.3, 0.5, 1, 1)
    )
    bias = np.log(rng.integers(1, 17, (batch, length))) - 1000.0 * (rng.random(shape[:2]) < 0.1)
    bias[:, 3:4] = -1e9
    positions = rng.integers(0, length * far, (batch, length))
    positions[:, 5:40] = positions[:, 5:6]
    table = jnp.asarray(rng.normal(size=(32, heads)), jnp.float32)
    relative = RelativeBias(jnp.asarray(positions, jnp.int32), table)
    return (query, key, value, jnp.asarray(bias, jnp.float32)), relative, g


def values_and_gradients(function, inputs, relative, g):
    """Output, and gradients by query, key, value, key bias and (if there is one) the table."""
    table = None if relative is None else relative.table

    @jax.jit
    def run(inputs, table):
        def at(*inputs_and_table):
            *inputs, table = inputs_and_table
            if table is None:
                return function(*inputs, None)
            return function(*inputs, dataclasses.replace(relative, table=table))

        out, pull = jax.vjp(at, *inputs, table)
        return out, *(x for x in pull(g) if x is not None)

    names = ["output", "query", "key", "value", "key bias", "table"]
    return dict(zip(names, run(inputs, table), strict=False))


def wide(tree):
    return jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, tree)


def assert_close(got, wanted, tolerance):
    assert got.keys() == wanted.keys()
    for name, want in wanted.items():
        have, want = np.asarray(got[name], np.float32), np.asarray(want, np.float32)
        assert np.isfinite(have).all(), name
        error = np.abs(have - want).max() / np.abs(want).max()
        assert error < tolerance, f"{name}: {error:.1e}"


def shifted(function, **options):
    """An implementation's own function, given the bias as it wants it."""

    def run(query, key, value, key_bias, relative):
        return function(query, key, value, reference.shifted(key_bias), relative, **options)

    return run


def check(function, inputs, relative, g, tolerance):
    got = values_and_gradients(function, inputs, relative, g)
    exact = (wide(inputs), relative, wide(g))
    assert_close(got, values_and_gradients(reference.weighted_attention, *exact), tolerance)
    assert got["output"].dtype == got["query"].dtype == inputs[0].dtype
    assert got["key bias"].dtype == jnp.float32


def test_thresholds_are_those_of_the_published_t5():
    published = [*range(1, 9), 12, 16, 23, 32, 46, 64, 91]
    np.testing.assert_array_equal(thresholds(32, 128), published)


@pytest.mark.parametrize(("num_buckets", "max_distance"), [(32, 128), (32, 256), (8, 20), (16, 5)])
def test_buckets_are_those_of_the_t5_trunk(num_buckets, max_distance):
    from jaxmodels.core.relative_bias import bucket_table

    distance = jnp.arange(-max_distance, max_distance + 1)
    rows = bucket(distance, num_buckets, max_distance)
    np.testing.assert_array_equal(rows, bucket_table(num_buckets, max_distance, True))


@pytest.mark.parametrize(
    "resident_bytes", [pytest.param(tiles.RESIDENT_BYTES, marks=pytest.mark.slow), 1]
)
def test_tpu_kernels_with_relative_bias_equal_the_reference(resident_bytes, monkeypatch):
    """1: one tile of the other side on chip at a time, so that sums go over steps of the grid."""
    monkeypatch.setattr(tiles, "RESIDENT_BYTES", resident_bytes)
    inputs, relative, g = example()
    kernels = shifted(tpu.weighted_attention, tile=128, interpret=True)
    check(kernels, inputs, relative, g, FLOAT32)


def test_tpu_kernels_in_bfloat16_equal_the_reference():
    inputs, _, g = example(batch=1, length=200, dtype=jnp.bfloat16)
    check(functools.partial(attention, implementation="interpret"), inputs, None, g, BFLOAT16)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("length", "width", "far", "dtype"),
    [(700, 128, 1, jnp.bfloat16), (513, 64, 100, jnp.float32), (1, 64, 1, jnp.float32)],
)
def test_tpu_kernels_equal_the_reference_at_more_sizes(length, width, far, dtype):
    inputs, relative, g = example(batch=1, length=length, width=width, far=far, dtype=dtype)
    tolerance = FLOAT32 if dtype == jnp.float32 else BFLOAT16
    kernels = functools.partial(attention, implementation="interpret")
    if length == 1:  # a single weight is 1, and only the values have a gradient
        got = values_and_gradients(kernels, inputs, relative, g)
        np.testing.assert_array_equal(got["output"], inputs[2])
        np.testing.assert_array_equal(got["value"], g)
        return
    check(kernels, inputs, relative, g, tolerance)
    check(kernels, inputs, None, g, tolerance)


@pytest.mark.slow
@pytest.mark.parametrize(("num_buckets", "max_distance"), [(8, 20)])
def test_tpu_kernels_know_other_buckets(num_buckets, max_distance):
    """A last threshold from 128 on is not looked up in lanes but counted."""
    inputs, relative, g = example(length=260, far=20)
    table = jnp.tile(relative.table, (num_buckets // 8, 1))[:num_buckets]
    relative = RelativeBias(relative.positions, table, max_distance)
    check(functools.partial(attention, implementation="interpret"), inputs, relative, g, FLOAT32)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("with_relative", [True, False])
def test_chunks_equal_the_reference(with_relative, dtype):
    inputs, relative, g = example(length=150, dtype=dtype)
    tolerance = FLOAT32 if dtype == jnp.float32 else BFLOAT16
    chunked = functools.partial(attention, implementation="chunked")
    check(chunked, inputs, relative if with_relative else None, g, tolerance)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_two_more_features_are_the_key_bias(dtype):
    """What cuDNN is given, run by the plain attention of jax."""

    def plain(query, key, value, key_bias, _):
        heads = gpu.with_extra_features(query, key, value, reference.shifted(key_bias))
        out = jax.nn.dot_product_attention(*wide(heads), scale=1.0, implementation="xla")
        return out[..., : -gpu.EXTRA].astype(dtype)

    inputs, _, g = example(length=60, dtype=dtype)
    check(plain, inputs, None, g, FLOAT32 if dtype == jnp.float32 else BFLOAT16)


@pytest.mark.slow
def test_a_lie_about_the_order_costs_time_and_no_accuracy():
    inputs, relative, g = example(batch=1, length=150, heads=1)
    lie = dataclasses.replace(relative, ordered=True)
    check(shifted(tpu.weighted_attention, tile=128, interpret=True), inputs, lie, g, FLOAT32)


def test_far_tiles_are_found():
    """Tokens in order 100 apart: only the diagonal is near."""
    positions = jnp.arange(512).reshape(1, 4, 1, 128) * 100
    np.testing.assert_array_equal(
        tiles.near_runs(positions, 91)[0], [[0, 1], [1, 2], [2, 3], [3, 4]]
    )
    near = tiles.near_runs(jnp.arange(512).reshape(1, 4, 1, 128), 91)[0]
    np.testing.assert_array_equal(near, [[0, 2], [0, 3], [1, 4], [2, 4]])


@pytest.mark.parametrize("hidden", [-1e9, -jnp.inf])
@pytest.mark.parametrize("implementation", ["chunked", "reference"])
def test_an_example_with_every_key_hidden_stays_finite(implementation, hidden):
    inputs, _, g = example(batch=1, length=20, heads=1)
    function = functools.partial(attention, implementation=implementation)
    got = values_and_gradients(function, (*inputs[:3], jnp.full((1, 20), hidden)), None, g)
    wanted = values_and_gradients(function, (*inputs[:3], jnp.zeros((1, 20))), None, g)
    if hidden == -jnp.inf:  # has no gradient by itself
        wanted["key bias"] = jnp.ones((1, 20))
        got["key bias"] = got["key bias"] + 1
    assert_close(got, wanted, FLOAT32)


def test_hidden_keys_change_nothing():
    (query, key, value, bias), relative, _ = example(length=40)
    hide = jnp.zeros_like(bias).at[:, 30:].set(-jnp.inf)
    out = attention(query, key, value, hide, relative, implementation="chunked")
    kept = RelativeBias(relative.positions[:, :30], relative.table)
    short = attention(*(x[:, :30] for x in (query, key, value, hide)), kept)
    np.testing.assert_allclose(out[:, :30], short, atol=1e-5)


def test_memory_of_chunks_is_linear_in_length():
    """Twice the tokens: about twice the memory, where all scores would take four times."""

    def temporaries(length):
        inputs, relative, g = jax.eval_shape(lambda: example(batch=1, length=length))
        run = functools.partial(
            jax.value_and_grad(lambda *x: attention(*x).sum(), argnums=(0, 1, 2, 3)),
        )
        return jax.jit(run).lower(*inputs, relative).compile().memory_analysis().temp_size_in_bytes

    assert temporaries(4096) < 2.3 * temporaries(2048)


BAD = {
    "one shape": lambda q, k, v, b, r: (q, k[:, :5], v, b, r),
    r"key_bias \(2, 5\)": lambda q, k, v, b, r: (q, k, v, b[:, :5], r),
    "wanted float32": lambda q, k, v, b, r: (q, k, v, b.astype(jnp.bfloat16), r),
    "all bfloat16": lambda q, k, v, b, r: (q, k, v.astype(jnp.bfloat16), b, r),
    "'float16'": lambda q, k, v, b, r: (*(x.astype(jnp.float16) for x in (q, k, v)), b, r),
    "int32": lambda q, k, v, b, r: (q, k, v, b, RelativeBias(b, r.table)),
    "h = 2": lambda q, k, v, b, r: (q, k, v, b, RelativeBias(r.positions, r.table[:, :1])),
    "even number": lambda q, k, v, b, r: (q, k, v, b, RelativeBias(r.positions, r.table[:31])),
    "at least 1": lambda q, k, v, b, r: (q[:, :0], k[:, :0], v[:, :0], b[:, :0], None),
}


@pytest.mark.parametrize("message", BAD)
def test_inputs_that_do_not_fit_are_refused(message):
    inputs, relative, _ = example(length=10)
    with pytest.raises(ValueError, match=message):
        attention(*BAD[message](*inputs, relative))


def test_an_unknown_implementation_is_refused():
    inputs, _, _ = example(length=10)
    with pytest.raises(ValueError, match="'flash'.*'chunked'"):
        attention(*inputs, implementation="flash")
