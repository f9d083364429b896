"""Attention baselines: each against plain dense formulas, and its refusal of bad settings."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from jaxmodels.vcc.baseline_attentions import (
    LinformerAttention,
    LongformerAttention,
    MultiHeadBaseline,
    NystromformerAttention,
    PreNormAttention,
    SoftAttention,
    build_attention,
    import_attention,
)
from jaxmodels.vcc.baseline_attentions.nystromformer import pseudo_inverse
from jaxmodels.vcc.baseline_attentions.soft import gaussian_kernel, newton_inverse


def random(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


def applied(module: MultiHeadBaseline | PreNormAttention, x: jax.Array, mask: jax.Array):
    """Output of the module with fresh parameters scaled up so that attention is not uniform."""
    params = jax.jit(module.init)(jax.random.key(1), x, mask)
    params = jax.tree.map(lambda leaf: 10.0 * leaf, meta.unbox(params))
    return jax.jit(module.apply)(params, x, mask), params["params"]


def test_pseudo_inverse_inverts_stochastic_matrices() -> None:
    matrix = jax.nn.softmax(3.0 * random(0, 2, 3, 6, 6) + 4.0 * jnp.eye(6), axis=-1)
    inverse = pseudo_inverse(matrix, iterations=12)
    np.testing.assert_allclose(inverse @ matrix, jnp.broadcast_to(jnp.eye(6), (2, 3, 6, 6)),
                               atol=1e-4)  # fmt: skip


def test_newton_inverse_inverts_gaussian_kernels() -> None:
    points = 2.0 * random(0, 2, 3, 6, 8)
    kernel = gaussian_kernel(points, points)
    product = newton_inverse(kernel, iterations=20) @ kernel
    np.testing.assert_allclose(product, jnp.broadcast_to(jnp.eye(6), product.shape), atol=1e-4)


def test_newton_inverse_stays_finite_on_a_singular_matrix() -> None:
    inverse = newton_inverse(jnp.ones((1, 4, 4)), iterations=60)
    assert jnp.isfinite(inverse).all() and jnp.abs(inverse).max() <= 1e4


def test_longformer_with_a_window_over_everything_is_dense_attention() -> None:
    x, mask = random(0, 1, 10, 12), jnp.ones((1, 10), jnp.int32)
    wide, params = applied(LongformerAttention(num_heads=3, window=40, num_global=2), x, mask)
    module = NystromformerAttention(num_heads=3, num_landmarks=10)
    dense = module.apply({"params": params}, x, mask)
    np.testing.assert_allclose(wide, dense, atol=1e-5)


def test_identity_projection_makes_linformer_dense() -> None:
    x, mask = random(0, 2, 8, 12), jnp.ones((2, 8), jnp.int32)
    module = LinformerAttention(num_heads=3, projected_length=8, max_length=8)
    _, params = applied(module, x, mask)
    params = params | {"E": jnp.broadcast_to(jnp.eye(8), (3, 8, 8))}
    dense = {name: params[name] for name in ("query", "key", "value")}
    wanted = NystromformerAttention(num_heads=3, num_landmarks=8).apply({"params": dense}, x, mask)
    np.testing.assert_allclose(module.apply({"params": params}, x, mask), wanted, atol=1e-5)


MODULES = [
    LinformerAttention(num_heads=3, projected_length=4, max_length=16),
    NystromformerAttention(num_heads=3, num_landmarks=4, conv_kernel_size=3),
    SoftAttention(num_heads=3, num_landmarks=4),
    LongformerAttention(num_heads=3, window=8, num_global=2),
]


@pytest.mark.parametrize("module", MODULES, ids=lambda m: type(m).__name__)
def test_padding_does_not_reach_real_tokens(module: MultiHeadBaseline) -> None:
    x = random(0, 1, 16, 12)
    mask = jnp.arange(16)[None, :] < 11
    first, params = applied(module, x, mask)
    other = module.apply({"params": params}, x.at[:, 11:].add(5.0), mask)
    np.testing.assert_allclose(first[:, :11], other[:, :11], atol=1e-4)


@pytest.mark.parametrize("module", MODULES, ids=lambda m: type(m).__name__)
def test_gradients_are_finite_and_reach_every_parameter(module: MultiHeadBaseline) -> None:
    x, mask = random(0, 2, 16, 12), jnp.ones((2, 16), jnp.int32)
    wrapped = PreNormAttention(module.clone(output_projection=True))
    _, params = applied(wrapped, x, mask)

    def loss(params: dict) -> jax.Array:
        return jnp.sum(wrapped.apply({"params": params}, x, mask) * random(7, 2, 16, 12))

    flat = jax.tree_util.tree_leaves_with_path(jax.jit(jax.grad(loss))(params))
    for path, gradient in flat:
        assert jnp.isfinite(gradient).all(), path
        key_bias = "'key'" in str(path) and "bias" in str(path)  # its true gradient is zero
        assert key_bias or jnp.abs(gradient).max() > 0, path


def test_prenorm_tree_is_the_house_tree() -> None:
    module = build_attention("longformer_prenorm", 3, 16, {"window": 8, "num_global": 2})
    x = random(0, 1, 16, 12)
    params = jax.eval_shape(module.init, jax.random.key(0), x, jnp.ones((1, 16)))["params"]
    assert set(params) == {"attention", "attention_norm"}
    assert set(params["attention"]) == {"query", "key", "value", "out"}


def test_unknown_names_options_and_keys_are_refused() -> None:
    with pytest.raises(ValueError, match="cannot build"):
        build_attention("flashformer", 3, 16, {})
    with pytest.raises(ValueError, match="cannot build"):
        build_attention("soft", 3, 16, {"landmarks": 4})
    with pytest.raises(ValueError, match="no baseline"):
        import_attention({"query.weight": np.ones((2, 2)), "gate": np.ones(2)})


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (LinformerAttention(num_heads=3, max_length=32), "32 tokens"),
        (LinformerAttention(num_heads=5, max_length=16), "num_heads=5"),
        (NystromformerAttention(num_heads=3, num_landmarks=5), "num_landmarks=5"),
        (NystromformerAttention(num_heads=3, num_landmarks=4, conv_kernel_size=4), "odd"),
        (SoftAttention(num_heads=3, num_landmarks=0), "num_landmarks=0"),
        (LongformerAttention(num_heads=3, window=7), "even"),
        (LongformerAttention(num_heads=3, window=8, num_global=17), "num_global"),
    ],
)
def test_impossible_settings_are_refused(module: MultiHeadBaseline, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(module.init, jax.random.key(0), jnp.ones((1, 16, 12)), jnp.ones((1, 16)))
