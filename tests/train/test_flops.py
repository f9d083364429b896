"""The FLOP count behind MFU, against hand counts and XLA's own."""

import jax
import jax.numpy as jnp
import pytest

from train.flops import count_flops, peak_flops

X, W = jnp.ones((32, 64)), jnp.ones((64, 64))
PRODUCT = 2 * 32 * 64 * 64


def counted(function, *arguments):
    return count_flops(jax.make_jaxpr(function)(*arguments))


def test_a_product_and_its_gradients():
    assert counted(jnp.dot, X, W) == PRODUCT
    assert counted(jax.grad(lambda w, x: (x @ w).sum()), W, X) == 2 * PRODUCT
    assert counted(jax.grad(lambda w, x: (x @ w).sum(), argnums=(0, 1)), W, X) == 3 * PRODUCT


def test_a_batched_product():
    q = jnp.ones((2, 4, 16, 8))
    assert (
        counted(lambda a, b: jnp.einsum("bhqd,bhkd->bhqk", a, b), q, q) == 2 * 2 * 4 * 16 * 16 * 8
    )


def test_a_loop_counts_its_body_every_time():
    def layers(w, x):
        return jax.lax.scan(lambda c, _: (jnp.tanh(c @ w), None), x, None, length=8)[0].sum()

    assert counted(jax.jit(layers), W, X) == 8 * PRODUCT
    assert counted(jax.grad(layers), W, X) == 3 * 8 * PRODUCT


def test_branches_count_the_dearest_and_custom_rules_the_body():
    def either(p, w, x):
        return jax.lax.cond(p, lambda: x @ w, lambda: x)

    assert counted(either, True, W, X) == PRODUCT

    @jax.custom_vjp
    def square(w):
        return w @ w

    square.defvjp(lambda w: (w @ w, w), lambda w, g: (g @ w.T + w.T @ g,))
    assert counted(square, W) == 2 * 64**3
    assert counted(jax.grad(lambda w: square(w).sum()), W) == 3 * 2 * 64**3


def test_remat_counts_what_is_computed_again():
    plain = counted(jax.grad(lambda w: jnp.sin(jnp.sin(X @ w) @ w).sum()), W)
    again = counted(jax.grad(jax.checkpoint(lambda w: jnp.sin(jnp.sin(X @ w) @ w).sum())), W)
    assert again > plain


def test_a_convolution_equals_xlas_count():
    x, k = jnp.ones((2, 8, 8, 3)), jnp.ones((3, 3, 3, 5))

    def conv(x, k):
        return jax.lax.conv_general_dilated(
            x, k, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    assert counted(conv, x, k) == 2 * (2 * 6 * 6 * 5) * (3 * 3 * 3)
    assert counted(conv, x, k) == jax.jit(conv).lower(x, k).compile().cost_analysis()["flops"]


def test_a_loopless_network_is_near_xlas_count():
    def loss(w, x):
        return jnp.square(jax.nn.relu(x @ w) @ w).sum()

    compiled = jax.jit(jax.grad(loss)).lower(W, X).compile()
    assert counted(jax.grad(loss), W, X) == pytest.approx(
        compiled.cost_analysis()["flops"], rel=0.05
    )


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("TPU v4", 275e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5p", 459e12),
        ("TPU v5", 459e12),
        ("TPU v6 lite", 918e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("cpu", None),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_peaks_are_of_the_longest_name_that_fits(kind, peak):
    assert peak_flops(kind) == peak
