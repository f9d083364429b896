"""VCC-T5 is T5 where every block is open; what compression keeps and moves; flags of layers."""

import dataclasses
import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodels.core import params as param_tree
from jaxmodels.core import partitioning
from jaxmodels.trunks import t5
from jaxmodels.vcc import VccConfig, VccT5, compression
from tests.vcc import small, small_t5

FAMILIES = pytest.mark.parametrize("config", [small_t5.RELU, small_t5.GATED], ids=["relu", "gated"])


def relative(found: Any, expected: Any) -> float:
    return float(jnp.abs(found - expected).max() / jnp.abs(expected).max())


@FAMILIES
def test_parameters_are_those_of_t5(config: t5.T5Config) -> None:
    ids = jnp.zeros((1, 2), jnp.int32)
    plain = functools.partial(t5.T5(config).init, jax.random.key(0), ids)
    ours = functools.partial(VccT5(config, small.vcc()).init, jax.random.key(0), ids, vip_mask=ids)
    trees = [jax.eval_shape(init)["params"] for init in (ours, plain)]
    shapes, expected = ({k: v.shape for k, v in param_tree.flatten(partitioning.unbox(t)).items()}
                        for t in trees)  # fmt: skip
    assert shapes == expected and "encoder/relative_bias/embedding" in shapes
    chex.assert_trees_all_equal_structs(*trees)  # logical axes too


@pytest.mark.parametrize(
    ("config", "n", "real", "kinds"),
    [
        (small_t5.RELU, 36, 29, ("vcc",) * 3),
        (small_t5.GATED, 257, 200, ("local", "vcc", "vcc")),
        (small_t5.RELU, 257, 200, ("dense", "vcc", "local")),
    ],
    ids=["relu", "gated", "mixed"],
)
def test_all_blocks_open_and_one_segment_is_t5(
    config: t5.T5Config, n: int, real: int, kinds: tuple[str, ...]
) -> None:
    given, params = small_t5.inputs(1, n, real), small_t5.params(config)
    settings = small.vcc(kinds, num_fine_blocks=n, segment_length=n, block_size=16)
    found, opened = small_t5.encode(config, settings, params, given)
    assert opened["fine_blocks"].shape[-1] == -(-(n - 4) // 16)
    expected, _ = small_t5.encode(config, None, params, given)
    assert relative(found[:, :real], expected[:, :real]) <= 1e-5


@pytest.mark.slow
def test_all_blocks_open_is_t5_at_two_thousand_tokens() -> None:
    given, params = small_t5.inputs(1, 2048, 1900), small_t5.params(small_t5.RELU)
    settings = small.vcc(num_fine_blocks=2048, block_size=16)
    found, _ = small_t5.encode(small_t5.RELU, settings, params, given)
    expected, _ = small_t5.encode(small_t5.RELU, None, params, given)
    assert relative(found[:, :1900], expected[:, :1900]) <= 1e-5


def test_block_sizes_agree_where_all_blocks_are_open() -> None:
    given, params = small_t5.inputs(1, 68, 60), small_t5.params(small_t5.RELU)
    found = [
        small_t5.encode(small_t5.RELU, small.vcc(num_fine_blocks=64, block_size=b), params, given)[
            0
        ]
        for b in (4, 64)
    ]
    assert relative(found[0][:, :60], found[1][:, :60]) <= 1e-5


def test_positions_of_segments_are_those_of_the_text() -> None:
    config = small_t5.RELU
    given, params = small_t5.inputs(2, 32), small_t5.params(config)
    whole, _ = small_t5.encode(config, small.vcc(("local",) * 3), params, given)
    for start in (0, 24):
        part = {name: x[:, start : start + 8] for name, x in given.items()}
        expected, _ = small_t5.encode(config, None, params, part)
        chex.assert_trees_all_close(whole[:, start : start + 8], expected, atol=1e-5)


def test_block_positions_choose_what_the_position_bias_favours() -> None:
    """With flat content, a bias for distance alone opens the blocks at that distance."""
    config = small_t5.RELU
    params = jax.tree.map(jnp.zeros_like, small_t5.params(config))
    bias = config.make_bias()
    near = bias.apply({"params": params["encoder"]["relative_bias"]}, jnp.int32(30),
                      method="buckets")  # fmt: skip
    table = params["encoder"]["relative_bias"]["embedding"].at[int(near)].set(9.0)
    params["encoder"]["relative_bias"]["embedding"] = table
    given = small_t5.inputs(1, 44, vips=1)
    given["vip_mask"] = jnp.zeros((1, 44), jnp.int32).at[0, 0].set(1)
    settings = small.vcc(num_fine_blocks=1)
    _, opened = small_t5.encode(config, settings, params, given)
    # Slots hold tokens 0-3, block j holds 4 + 4 j ... 7 + 4 j: block 5, at 26, is the first in the
    # bucket of distance 30, which starts at 23.
    assert (opened["fine_blocks"] == 5).all()


def gradients(config: t5.T5Config, settings: VccConfig, given: dict) -> tuple[Any, Any]:
    @functools.partial(jax.jit, compiler_options=small_t5.QUICK)
    @functools.partial(jax.value_and_grad, has_aux=True)
    def loss(params: Any) -> tuple[jax.Array, Any]:
        y, opened = small_t5.states(config, settings, params, given)
        return (jnp.sin(3 * y) * given["vip_mask"][..., None]).sum(), (y, opened)

    (_, outputs), bar = loss(small_t5.params(config))
    return outputs, {k: v for k, v in param_tree.flatten(bar).items() if "decoder" not in k}


@pytest.mark.parametrize(
    ("fine", "real"), [(0, 28), (2, 19), (6, 28)], ids=["none open", "padded", "all open"]
)
def test_static_layout_equals_gather_layout_with_gradients(fine: int, real: int) -> None:
    given = small_t5.inputs(real=real)
    pair = [small.vcc(num_fine_blocks=fine, layout=name) for name in ("static", "gather")]
    (one, bar), (other, expected) = (gradients(small_t5.RELU, s, given) for s in pair)
    chex.assert_trees_all_equal(one[1]["fine_blocks"], other[1]["fine_blocks"])
    assert relative(one[0], other[0]) <= 2e-5
    for name, leaf in expected.items():
        if "lm_head" not in name:
            assert relative(bar[name], leaf) < 1e-4, name


def test_full_remat_changes_no_number() -> None:
    given = small_t5.inputs()
    again = dataclasses.replace(small_t5.RELU, remat="full")
    (one, bar), (other, expected) = (
        gradients(c, small.vcc(), given) for c in (again, small_t5.RELU)
    )
    assert relative(one[0], other[0]) < 1e-6
    for name, leaf in expected.items():
        assert relative(bar[name], leaf) < 1e-5, name


def test_selection_learns_through_the_gates_and_moves_the_position_bias() -> None:
    given = small_t5.inputs()
    learns, blind = (
        gradients(small_t5.RELU, small.vcc(straight_through=switch), given)
        for switch in (True, False)
    )
    for part in ("layers/attention/query/kernel", "relative_bias/embedding"):
        assert relative(learns[1][f"encoder/{part}"], blind[1][f"encoder/{part}"]) > 0.01, part
    assert relative(learns[0][0], blind[0][0]) < 1e-5  # forward, the gates are 1


def test_tokens_of_a_block_never_opened_move_by_one_common_vector() -> None:
    config, (x, mask, vip) = small_t5.RELU, small.states(batch=3, n=44)
    states, selections, _ = small_t5.run_layers(
        config, small.vcc(), small_t5.params(config), x, mask, vip
    )
    closed = np.ones((3, 10), bool)
    for row in range(3):
        closed[row, np.unique([chosen.fine[row] for chosen in selections])] = False
    before, now = (compression.decompress(s.coarse, s.difference) for s in (states[0], states[-1]))
    moved = np.asarray(now - before)[closed]
    assert len(moved) > 3 and np.abs(moved).max() > 0.1
    assert np.abs(moved - moved.mean(1, keepdims=True)).max() <= 1e-5


@pytest.mark.parametrize("blocks", [3])
def test_appending_whole_padded_blocks_changes_no_vip(blocks: int) -> None:
    config, given = small_t5.RELU, small.states()
    longer = [jnp.pad(a, ((0, 0), (0, 4 * blocks)) + ((0, 0),) * (a.ndim - 2)) for a in given]
    found, expected = (
        small_t5.run_layers(config, small.vcc(), small_t5.params(config), *masks)[0][-1].vip
        for masks in (longer, given)
    )
    chex.assert_trees_all_close(found, expected, atol=1e-5)


def test_attention_weights_are_dropped_in_local_layers_alone() -> None:
    config = dataclasses.replace(small_t5.RELU, dropout_rate=0.3)
    stack = VccT5(config, small.vcc()).bind({"params": small_t5.params(config)}).encoder
    assert stack.vcc_layer().attention_dropout_rate == 0.0
    assert stack.trunk.make_layer().attention_dropout_rate == 0.3
    assert stack.vcc_layer().ffn_dropout_rate == stack.vcc_layer().dropout_rate == 0.3


def test_dropout_follows_its_rng_and_reaches_the_end_of_the_encoder() -> None:
    config = dataclasses.replace(small_t5.RELU, dropout_rate=0.3)
    settings, given = small.vcc(explore_prob=0.0), small_t5.inputs()
    params = small_t5.params(small_t5.RELU)
    quiet = small_t5.encode(config, settings, params, given)[0]
    chex.assert_trees_all_equal(quiet, small_t5.encode(small_t5.RELU, settings, params, given)[0])
    one, again, other = (
        small_t5.encode(config, settings, params, given, jax.random.key(s))[0] for s in (0, 0, 1)
    )
    chex.assert_trees_all_equal(one, again)
    assert relative(one, quiet) > 0.05 and relative(one, other) > 0.05
    assert 0.2 < float((one == 0).mean()) < 0.4


def test_bfloat16_products_keep_a_float32_residual_stream() -> None:
    half = dataclasses.replace(small_t5.RELU, dtype=jnp.bfloat16)
    given, params = small_t5.inputs(), small_t5.params(small_t5.RELU, size=0.15)
    settings = small.vcc(num_fine_blocks=6)
    found = small_t5.encode(half, settings, params, given)[0]
    assert found.dtype == jnp.float32
    assert 1e-5 < relative(found, small_t5.encode(small_t5.RELU, settings, params, given)[0]) < 0.05


def equations(jaxpr: Any) -> int:
    inner = [v for e in jaxpr.eqns for v in jax.tree.leaves(list(e.params.values()))]
    nested = (getattr(v, "jaxpr", v) for v in inner)
    return len(jaxpr.eqns) + sum(equations(j) for j in nested if hasattr(j, "eqns"))


def test_compiled_program_does_not_grow_with_depth() -> None:
    sizes = []
    for depth in (2, 9):
        config = dataclasses.replace(small_t5.RELU, num_layers=depth + 1)
        settings = small.vcc(("local", *("vcc",) * depth))
        run = functools.partial(small_t5.states, config, settings)
        sizes.append(
            equations(jax.make_jaxpr(run)(small_t5.params(config), small_t5.inputs()).jaxpr)
        )
    assert sizes[0] == sizes[1] > 100
