"""The stack: dense where every block is open, equal in both layouts, learning through selection."""

import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodels.core import attention
from jaxmodels.core import params as param_tree
from jaxmodels.trunks import bert
from jaxmodels.vcc import VccConfig, VccEncoder, encoder, rows
from tests.vcc import small


@functools.partial(jax.jit, static_argnums=(0, 1))
def encode(
    config: bert.BertConfig, settings: VccConfig, params: Any, x: Any, mask: Any, vip: Any,
    rng: jax.Array | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:  # fmt: skip
    norm = {"scale": jnp.ones(config.d_model), "bias": jnp.zeros(config.d_model)}
    variables = {"params": {"layers": params, "final_norm": norm}}
    rngs = None if rng is None else {"dropout": rng}
    return VccEncoder(config, settings).apply(variables, x, mask, vip, rng is None, rngs=rngs)


@functools.partial(jax.jit, static_argnums=0)
def dense(config: bert.BertConfig, params: Any, x: jax.Array, mask: jax.Array) -> jax.Array:
    norm = {"scale": jnp.ones(config.d_model), "bias": jnp.zeros(config.d_model)}
    variables = {"params": {"layers": params, "final_norm": norm}}
    bias = attention.key_mask_bias(mask)[:, None, None, :]
    return config.make_stack().apply(variables, x, bias)


# Compiled without optimisation, which halves the time of this file and changes no number.
@functools.partial(
    jax.jit, static_argnums=(0, 1), compiler_options={"xla_backend_optimization_level": 0}
)
def gradients(
    config: bert.BertConfig, settings: VccConfig, params: Any, x: Any, mask: Any, vip: Any
) -> tuple[Any, Any]:
    """What `encode` returns, and the gradient of a loss on VIP tokens by parameters and inputs."""

    def loss(params: Any, x: jax.Array) -> tuple[jax.Array, Any]:
        y, opened = encode(config, settings, params, x, mask, vip)
        return (jnp.sin(3 * y) * vip[..., None]).sum(), (y, opened)

    (_, outputs), grads = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(params, x)
    return outputs, grads


def relative(found: Any, expected: Any) -> float:
    return float(jnp.abs(found - expected).max() / jnp.abs(expected).max())


def worst(found: Any, expected: Any) -> float:
    """Largest relative error of a leaf; key biases have a gradient of zero and stay out."""
    pairs = zip(*(param_tree.flatten(t[0]).items() for t in (found, expected)), strict=True)
    errors = [relative(a, b) for (path, a), (_, b) in pairs if path != "attention/key/bias"]
    return max([*errors, relative(found[1], expected[1])])


@pytest.mark.slow
@pytest.mark.parametrize(("n", "real"), [(36, 29), (256, 256), (2048, 1900)])
@pytest.mark.parametrize("kinds", [("vcc",) * 3, ("local", "vcc", "vcc")])
def test_all_blocks_open_is_dense_attention(n: int, real: int, kinds: tuple[str, ...]) -> None:
    config = small.trunk()
    x, mask, vip = small.states(1, n, real)
    params = small.layer_params(config, gain=6.0)
    settings = small.vcc(kinds, num_fine_blocks=n, segment_length=n, block_size=16)
    found, opened = encode(config, settings, params, x, mask, vip)
    assert opened["fine_blocks"].shape[-1] == -(-(n - 4) // 16)  # k > m opens all m
    expected = dense(config, params, x, mask)
    assert relative(found[:, :real], expected[:, :real]) <= 1e-5


@pytest.mark.long
def test_block_sizes_agree_where_all_blocks_are_open() -> None:
    config = small.trunk()
    x, mask, vip = small.states(1, 260, 250)
    params = small.layer_params(config, gain=6.0)
    found = [
        encode(config, small.vcc(num_fine_blocks=64, block_size=b), params, x, mask, vip)[0]
        for b in (4, 16, 64)
    ]
    for other in found[1:]:
        assert relative(other[:, :250], found[0][:, :250]) <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fine", "real"), [(0, 28), (2, 28), (2, 19), (6, 28), (2, 7)],
    ids=["none open", "some", "padded", "all open", "fewer real blocks than k"],
)  # fmt: skip
def test_static_layout_equals_gather_layout_with_gradients(fine: int, real: int) -> None:
    config = small.trunk()
    given = (small.layer_params(config), *small.states(real=real))
    pair = [small.vcc(num_fine_blocks=fine, layout=name) for name in ("static", "gather")]
    (one, one_bar), (other, other_bar) = (gradients(config, s, *given) for s in pair)
    chex.assert_trees_all_equal(one[1]["fine_blocks"], other[1]["fine_blocks"])
    assert relative(one[0], other[0]) <= 2e-5 and worst(one_bar, other_bar) < 1e-4


@pytest.mark.slow
def test_opened_padding_changes_nothing_for_real_tokens() -> None:
    config = small.trunk()
    params, (x, mask, vip) = small.layer_params(config), small.states(real=12)
    found = [
        encode(config, small.vcc(num_fine_blocks=k), params, x, mask, vip)[0] for k in (2, 3, 6)
    ]
    for more in found[1:]:  # two blocks are real: k beyond them opens padding
        assert relative(more[:, :12], found[0][:, :12]) <= 1e-5


def test_selection_learns_through_the_gates_alone() -> None:
    config = small.trunk()
    given = (small.layer_params(config), *small.states())
    learns, blind = (
        gradients(config, small.vcc(straight_through=switch), *given) for switch in (True, False)
    )
    for name in ("query", "key"):
        a, b = (bar[0]["attention"][name]["kernel"] for _, bar in (learns, blind))
        assert relative(a, b) > 0.01, name
    assert relative(learns[0][0], blind[0][0]) < 1e-5  # forward, the gates are 1


def test_gates_scale_what_a_layer_adds_to_each_row() -> None:
    config = small.trunk(num_layers=1)
    layer = config.make_layer(encoder.VccLayer, vcc=small.vcc(("vcc",)))
    params = jax.tree.map(lambda leaf: leaf[0], small.layer_params(config))
    x = jax.random.normal(jax.random.key(0), (2, 9, 16))
    gate = jax.random.uniform(jax.random.key(1), (2, 9))
    run = jax.jit(lambda given: layer.apply({"params": params}, given, method="encode"))
    full = run(rows.Rows(x, jnp.ones((2, 9)), jnp.zeros((2, 9))))
    found = run(rows.Rows(x, gate, jnp.zeros((2, 9))))
    chex.assert_trees_all_close(found, x + gate[..., None] * (full - x), atol=1e-5)
    assert relative(full, x) > 0.1


@pytest.mark.slow
def test_random_selection_ignores_scores_and_takes_padding_last() -> None:
    config = small.trunk(num_layers=6)
    params, (x, mask, vip) = small.layer_params(config), small.states(4, 44, 24)
    settings = small.vcc(("vcc",) * 6, selector="random", num_fine_blocks=6)
    _, opened = encode(config, settings, params, x, mask, vip, jax.random.key(3))
    fine = np.asarray(opened["fine_blocks"]).reshape(-1, 6)
    assert (np.sort(fine[:, :5]) == np.arange(5)).all() and (fine[:, 5] >= 5).all()
    assert len({tuple(row) for row in fine.tolist()}) > 12  # 24 draws of 5! orders times 5
    quiet, other = (encode(config, settings, params, x, mask, vip)[1] for _ in range(2))
    chex.assert_trees_all_equal(quiet, other)


@pytest.mark.long
def test_exploration_needs_an_rng_and_leaves_the_others_alone() -> None:
    config = small.trunk(num_layers=1)
    params, (x, mask, vip) = small.layer_params(config), small.states(32, 84)
    explored, always, never = (
        small.vcc(("vcc",), num_fine_blocks=5, explore_prob=p) for p in (0.5, 1.0, 0.0)
    )
    rng = jax.random.key(1)
    ranked = encode(config, never, params, x, mask, vip)[1]["fine_blocks"][0]
    found = {
        share: encode(config, s, params, x, mask, vip, rng)[1]["fine_blocks"][0]
        for share, s in ((0.5, explored), (1.0, always), (0.0, never))
    }
    chex.assert_trees_all_equal(found[0.0], ranked)
    follows = {share: (fine == ranked).all(-1).tolist() for share, fine in found.items()}
    assert sum(follows[1.0]) == 0 and 8 <= sum(follows[0.5]) <= 24
    for kept, row, noise in zip(follows[0.5], found[0.5], found[1.0], strict=True):
        assert kept or (row == noise).all()  # same rng, same random order


def residual_bytes(policy: str, depth: int, n: int) -> int:
    """Bytes that the backward pass of a VCC stack keeps, parameters and inputs aside."""
    config = small.trunk(num_layers=depth, d_model=64, remat=policy)
    params = small.layer_params(config, gain=1.0)
    settings = small.vcc(("vcc",) * depth, block_size=32)
    x, mask, vip = small.states(1, n, width=64)

    def kept(params: Any, x: jax.Array) -> Any:
        return jax.vjp(lambda p, x: encode(config, settings, p, x, mask, vip)[0], params, x)[1]

    leaves = jax.tree.leaves(jax.eval_shape(kept, params, x))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)


@pytest.mark.slow
def test_full_remat_keeps_no_bank_a_layer_and_changes_no_number() -> None:
    n = 4 + 32 * 64
    bank = (n - 4) * 64 * 4
    weights = (4 * 64 * 64 + 2 * 64 * 32 + 9 * 64 + 32) * 4
    grows = (residual_bytes("full", 6, n) - residual_bytes("full", 2, n)) / 4
    assert grows - weights < bank / 2  # rows of the layer alone; whole-layer remat keeps > a bank
    given = (small.layer_params(small.trunk()), *small.states())
    plain, again = (gradients(small.trunk(remat=p), small.vcc(), *given) for p in ("none", "full"))
    assert relative(again[0][0], plain[0][0]) < 1e-6 and worst(again[1], plain[1]) < 1e-5


def equations(jaxpr: Any) -> int:
    inner = [v for e in jaxpr.eqns for v in jax.tree.leaves(list(e.params.values()))]
    nested = (getattr(v, "jaxpr", v) for v in inner)
    return len(jaxpr.eqns) + sum(equations(j) for j in nested if hasattr(j, "eqns"))


@pytest.mark.parametrize("kind", ["vcc", "local", "dense"])
def test_program_does_not_grow_with_depth(kind: str) -> None:
    sizes = []
    for depth in (2, 12):
        config = small.trunk(num_layers=depth)
        given = (small.layer_params(config), *small.states())
        traced = jax.make_jaxpr(
            lambda *a, c=config, d=depth: gradients.__wrapped__(c, small.vcc((kind,) * d), *a)
        )(*given)
        sizes.append(equations(traced.jaxpr))
    assert sizes[0] == sizes[1] > 100


@pytest.mark.long
def test_mixed_arrangements_run_each_layer_as_its_kind_says() -> None:
    config = small.trunk(num_layers=5)
    params, (x, mask, vip) = small.layer_params(config), small.states(real=25)
    kinds = ("dense", "vcc", "dense", "vcc", "vcc")
    found, opened = encode(config, small.vcc(kinds), params, x, mask, vip)
    assert opened["fine_blocks"].shape == (3, 2, 2)
    y, fine = x, []
    for i, (first, last) in enumerate([(0, 1), (1, 2), (2, 3), (3, 5)]):
        part = jax.tree.map(lambda leaf, a=first, b=last: leaf[a:b], params)
        if i % 2 == 0:
            y = bert.run_dense_layers(config, part, y, mask)
            continue
        state, layout = small.enter(y, mask, vip, 4, 4)
        state, chosen = small.run_layers(config, small.vcc(), part, state, layout)
        y, fine = small.leave(state, layout), [*fine, chosen.fine]
    chex.assert_trees_all_equal(opened["fine_blocks"], jnp.concatenate(fine))
    centred = y - y.mean(-1, keepdims=True)
    expected = centred / jnp.sqrt(jnp.square(centred).mean(-1, keepdims=True) + 1e-5)
    assert relative(found[:, :25], expected[:, :25]) <= 1e-5


@pytest.mark.slow
def test_local_layers_stay_within_their_segment() -> None:
    config = small.trunk()
    params, (x, mask, vip) = small.layer_params(config), small.states(n=27)
    settings = small.vcc(("local",) * 3)
    found = encode(config, settings, params, x, mask, vip)[0]
    segments = [dense(config, params, x[:, i : i + 8], mask[:, i : i + 8]) for i in (0, 8, 16, 24)]
    assert relative(found, jnp.concatenate(segments, axis=1)) <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("n", [5, 23, 30])
def test_lengths_that_fit_no_block_are_padded_and_cut_back(n: int) -> None:
    config = small.trunk()
    params, (x, mask, vip) = small.layer_params(config), small.states(n=n)
    settings = small.vcc(("local", "vcc", "vcc"))
    found = encode(config, settings, params, x, mask, vip)[0]
    padded = (jnp.pad(a, ((0, 0), (0, 32 - n)) + ((0, 0),) * (a.ndim - 2)) for a in (x, mask, vip))
    assert found.shape == x.shape
    assert relative(found, encode(config, settings, params, *padded)[0][:, :n]) <= 1e-5


@pytest.mark.slow
def test_dropout_needs_an_rng_and_follows_it() -> None:
    config = small.trunk(dropout_rate=0.3, attention_dropout_rate=0.3)
    params, given = small.layer_params(config), small.states()
    settings = small.vcc(explore_prob=0.0)
    quiet = encode(config, settings, params, *given)[0]
    chex.assert_trees_all_equal(quiet, encode(small.trunk(), settings, params, *given)[0])
    one, again, other = (
        encode(config, settings, params, *given, jax.random.key(s))[0] for s in (0, 0, 1)
    )
    chex.assert_trees_all_equal(one, again)
    assert relative(one, quiet) > 0.05 and relative(one, other) > 0.05
    module = VccEncoder(config, settings)
    variables = small.drawn(module.init, *given, size=0.1)
    with pytest.raises(Exception, match="dropout"):
        module.apply(variables, *given, False)


@pytest.mark.long
def test_bfloat16_products_keep_a_float32_residual_stream() -> None:
    half, full = small.trunk(dtype=jnp.bfloat16), small.trunk()
    given = (small.layer_params(full, gain=3.0), *small.states())
    found = encode(half, small.vcc(num_fine_blocks=6), *given)[0]
    assert found.dtype == jnp.float32
    assert 1e-5 < relative(found, encode(full, small.vcc(num_fine_blocks=6), *given)[0]) < 0.03
    state, layout = small.enter(*given[1:], 4, 4)
    after, _ = small.run_layers(half, small.vcc(), given[0], state, layout)
    assert {leaf.dtype for leaf in jax.tree.leaves(after)} == {jnp.dtype("float32")}
