"""Swin: Hugging Face's numbers, windows beyond theirs, hooks of every second layer, drop path."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from jaxmodels.core import hooks, partitioning
from jaxmodels.core import params as param_tree
from jaxmodels.trunks import swin, swin_layers
from tests.trunks import hugging_face
from tests.vcc import small
from tests.vcc.test_encoder import equations

# Five layers a shifted image needs padding for, then one of which nothing shifts.
CONFIG = swin.SwinConfig(
    d_model=8, depths=(3, 2), num_heads=(2, 4), windows=(3, 4), patch_size=2, mlp_ratio=2.0
)
IMAGES = jax.random.normal(jax.random.key(0), (2, 14, 16, 3))
# Compiled without optimisation, which changes no number beyond rounding and takes half the time.
quick = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def config(**changes: Any) -> swin.SwinConfig:
    return dataclasses.replace(CONFIG, **changes)


def started(given: swin.SwinConfig, images: jax.Array = IMAGES) -> tuple[swin.SwinModel, Any]:
    model = swin.SwinModel(given)
    return model, small.drawn(model.init, images, size=0.3, spread=True)


@functools.cache
def plain() -> tuple[Any, jax.Array]:
    """Parameters without hooks, and what the model makes of them."""
    model, params = started(CONFIG)
    return params, quick(model.apply)(params, IMAGES)


def relative(found: Any, expected: Any) -> float:
    found, expected = np.asarray(found), np.asarray(expected)
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max() / np.abs(expected).max())


VARIANTS = {
    "shifted, then exactly one window": (
        dict(image_size=16, depths=[2, 1], num_heads=[2, 4], window_size=4), (16, 16)),
    "nothing divides, odd depths, no qkv bias": (
        dict(image_size=22, depths=[3, 2], num_heads=[2, 4], window_size=3, mlp_ratio=2.0,
             qkv_bias=False, hidden_act="relu"), (21, 27)),
}  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
def test_hugging_face_gives_the_same_numbers(variant: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    sizes, shape = VARIANTS[variant]
    theirs = transformers.SwinForImageClassification(
        transformers.SwinConfig(num_labels=5, patch_size=2, embed_dim=8, **sizes)
    )
    theirs = hugging_face.randomized(theirs)
    family, settings, params = hugging_face.loaded(theirs, tmp_path)
    assert family == "swin_hf"
    model = swin.SwinClassifier(swin.SwinConfig(**settings), 5)
    images = np.random.default_rng(0).normal(size=(2, *shape, 3)).astype(np.float32)
    pixels = images.transpose(0, 3, 1, 2)

    def run(params: Any) -> tuple[jax.Array, jax.Array]:
        tokens = model.apply(params, images, method=lambda m, x: m.trunk(x))
        return model.apply(params, images), tokens.reshape(2, -1, tokens.shape[-1])

    logits, tokens = quick(run)(params)
    expected = hugging_face.run(theirs, pixel_values=pixels)
    assert relative(logits, expected.logits) < 1e-5
    hidden = hugging_face.run(theirs.swin, pixel_values=pixels).last_hidden_state
    assert relative(tokens, hidden) < 1e-5


@pytest.mark.slow
def test_an_image_smaller_than_its_window_reads_the_middle_of_the_table() -> None:
    x = jax.random.normal(jax.random.key(1), (2, 12, 8))
    large = swin_layers.SwinLayer(
        num_heads=2, d_model=8, d_ff=16, window=5, resolution=(3, 4), shifted=True
    )
    params = small.drawn(large.init, x, size=0.3, spread=True)
    table = params["params"]["relative_position_bias"].reshape(9, 9, 2)[2:7, 2:7]
    cut = {"params": params["params"] | {"relative_position_bias": table.reshape(25, 2)}}
    fitting = large.clone(window=3, shifted=False)
    chex.assert_trees_all_close(large.apply(params, x), fitting.apply(cut, x), atol=1e-6)


def test_shifted_windows_cut_the_image_where_they_should() -> None:
    """Tokens that change when one token does, on a 6 x 6 image of windows of 4 (padded to 8)."""
    reached = {}
    for shifted in (False, True):
        one = swin_layers.SwinLayer(
            num_heads=2, d_model=8, d_ff=16, window=4, resolution=(6, 6), shifted=shifted
        )
        x = jax.random.normal(jax.random.key(0), (1, 36, 8))
        params = small.drawn(one.init, x, size=0.3, spread=True)
        changed = x.at[0, 3 * 6 + 3, 0].add(1.0)  # row 3, column 3
        run = quick(one.apply)
        moved = np.abs(run(params, changed) - run(params, x)).max(-1).reshape(6, 6) > 1e-6
        reached[shifted] = [np.flatnonzero(moved.any(axis)).tolist() for axis in (1, 0)]
        assert moved.sum() == len(reached[shifted][0]) * len(reached[shifted][1])
    assert reached == {False: [[0, 1, 2, 3]] * 2, True: [[2, 3, 4, 5]] * 2}


def test_table_is_read_by_differences_in_rows_and_columns() -> None:
    index = swin_layers.relative_position_index(3, 4)  # window of 3, a table for 4: 7 x 7
    assert index.shape == (9, 9)
    for query, key in ((0, 0), (0, 8), (5, 1), (7, 3)):
        down = query // 3 - key // 3
        right = query % 3 - key % 3
        assert index[query, key] == (down + 3) * 7 + right + 3


class Lora(hooks.Hooks):
    """x A B beside the queries."""

    def setup(self) -> None:
        self.a, self.b = (nn.Dense(n, use_bias=False, name=k) for n, k in ((2, "a"), (8, "b")))

    def output(self, site: str, x: jax.Array, y: jax.Array) -> jax.Array:
        return y + self.b(self.a(x)) if site == "attention.query" else y


@pytest.mark.slow
def test_lora_on_shifted_layers_alone_equals_changed_weights() -> None:
    group = hooks.LayerHooks(Lora(), start=1, stop=3, step=2)  # of layers 0..4: layer 1
    model, params = started(config(layer_hooks=(group,)))
    made = params["params"]["stages_0"]["hooks_1"]
    chex.assert_shape([made["a"]["kernel"], made["b"]["kernel"]], [(1, 8, 2), (1, 2, 8)])
    merged = jax.tree.map(lambda leaf: leaf, plain()[0])
    query = merged["params"]["stages_0"]["layers"]["attention"]["query"]
    query["kernel"] = query["kernel"].at[1].add(made["a"]["kernel"][0] @ made["b"]["kernel"][0])
    base = jax.tree.map(lambda leaf: leaf, plain()[0])
    base["params"]["stages_0"]["hooks_1"] = made
    found = quick(model.apply)(base, IMAGES)
    expected = quick(swin.SwinModel(CONFIG).apply)(merged, IMAGES)
    assert relative(found, expected) < 1e-5 < relative(found, plain()[1])


class Scaled(hooks.Hooks):
    """An adapter with a closed form: the branch, scaled a site; tells what it saw."""

    @nn.compact
    def residual(self, site: str, x: jax.Array, y: jax.Array, norm: Any) -> jax.Array:
        factor = self.param(site, nn.initializers.ones, ())
        self.sow("intermediates", site, x.mean())
        return x + factor * y


def test_adapters_of_even_and_odd_layers_have_parameters_and_place_of_their_own() -> None:
    groups = (hooks.LayerHooks(Scaled(), 0, step=2), hooks.LayerHooks(Scaled(), 1, 4, step=2))
    model, params = started(config(layer_hooks=groups))
    for stage, sizes in enumerate(({0: 2, 1: 1}, {0: 1, 1: 1})):
        own = params["params"][f"stages_{stage}"]
        found = {k: v["ffn"].shape for k, v in own.items() if k.startswith("hooks_")}
        assert found == {f"hooks_{first}": (size,) for first, size in sizes.items()}
    # Layers 0..4 of the whole are layers 0, 1, 2 of stage 0 and 0, 1 of stage 1: 4 is its odd one.
    base = jax.tree.map(lambda leaf: leaf, plain()[0])
    factors = np.array([1.5, 0.5, 2.0, 0.25, 3.0], np.float32)
    merged = jax.tree.map(lambda leaf: leaf, base)
    for stage, start, end in ((0, 0, 3), (1, 3, 5)):
        own, layers = base["params"][f"stages_{stage}"], factors[start:end]
        for first in (0, 1):
            values = jnp.asarray(layers[first::2])
            own[f"hooks_{first}"] = {"attention": jnp.ones_like(values), "ffn": values}
        wo = merged["params"][f"stages_{stage}"]["layers"]["ffn"]["wo"]
        wo["kernel"], wo["bias"] = (
            jnp.einsum("l...,l->l...", leaf, layers) for leaf in (wo["kernel"], wo["bias"])
        )

    def run(params: Any) -> Any:
        return model.apply(params, IMAGES, mutable=["intermediates"])

    found, kept = quick(run)(base)
    assert relative(found, quick(swin.SwinModel(CONFIG).apply)(merged, IMAGES)) < 1e-5
    kept = kept["intermediates"]["stages_0"]
    means = kept["hidden"].mean((1, 2, 3))
    assert kept["hidden"].shape == (4, 2, 56, 8)
    for first in (0, 1):  # in the order of the layers
        (seen,) = kept[f"hooks_{first}"]["hooks"]["attention"]
        chex.assert_trees_all_close(seen, means[first:3:2], atol=1e-6)


class Twice(hooks.Hooks):
    """Each key and value twice: attention mixes the same."""

    def keys_values(self, site: str, key: Any, value: Any, bias: Any) -> Any:
        return *(jnp.concatenate([x, x], 1) for x in (key, value)), jnp.concatenate([bias] * 2, -1)


def test_keys_and_values_of_windows_may_grow() -> None:
    model = swin.SwinModel(config(layer_hooks=(hooks.LayerHooks(Twice()),)))
    found = quick(model.apply)(plain()[0], IMAGES)
    assert relative(found, plain()[1]) < 1e-5


@pytest.mark.slow
def test_another_stem_needs_no_parameters_of_this_one() -> None:
    model, tokens = swin.SwinModel(CONFIG), jax.random.normal(jax.random.key(2), (3, 5, 6, 8))
    shapes = jax.eval_shape(lambda rng: model.init(rng, tokens, method="encode"), jax.random.key(0))
    assert set(shapes["params"]) == {"stages_0", "stages_1", "final_norm"}
    params = plain()[0]
    found = quick(lambda p: model.apply(p, model.apply(p, IMAGES, method="embed"), method="encode"))
    assert relative(found(params), plain()[1]) < 1e-6


def test_drop_path_drops_whole_branches_of_images_and_keeps_the_mean() -> None:
    one = swin_layers.SwinLayer(num_heads=2, d_model=8, d_ff=16, drop_path_rate=0.25)
    params = small.drawn(one.init, jnp.zeros((1, 1, 8)), size=0.3)
    y = jax.random.normal(jax.random.key(0), (400, 3, 8))
    found = one.apply(params, y, False, method="drop", rngs={"dropout": jax.random.key(1)})
    kept = np.asarray(found != 0).reshape(400, -1)
    assert (kept.all(1) | ~kept.any(1)).all() and 270 < kept.all(1).sum() < 330
    chex.assert_trees_all_close(found[kept.all(1)], y[kept.all(1)] / 0.75, rtol=1e-6)
    chex.assert_trees_all_equal(one.apply(params, y, method="drop"), y)


def test_drop_path_grows_from_nothing_over_the_whole_depth() -> None:
    given = config(drop_path_rate=0.4)
    rates = [rate for stage in (0, 1) for rate in given.make_stage(stage).drop_path_rates]
    np.testing.assert_allclose(rates, [0, 0.1, 0.2, 0.3, 0.4])
    # Rates so near to 1 that all but the first layer drop every branch.
    model = swin.SwinModel(config(drop_path_rate=1 - 1e-7, depths=(1, 1)))
    params = started(model.config)[1]

    def run(params: Any, seed: int) -> Any:
        rngs = {"dropout": jax.random.key(seed)}
        return model.apply(params, IMAGES, False, rngs=rngs, mutable=["intermediates"])

    _, kept = quick(run, static_argnums=1)(params, 0)
    first, last = (kept["intermediates"][f"stages_{i}"]["hidden"] for i in (0, 1))
    chex.assert_trees_all_equal(last[0], last[1])
    quiet = quick(lambda p: model.apply(p, IMAGES, mutable=["intermediates"]))(params)[1]
    assert relative(first, quiet["intermediates"]["stages_0"]["hidden"]) < 1e-6
    assert relative(first[1], first[0]) > 0.1


@pytest.mark.slow
def test_dropout_follows_its_rng_and_differs_by_layer() -> None:
    model = swin.SwinModel(config(dropout_rate=0.2, attention_dropout_rate=0.2))
    params = plain()[0]
    run = quick(lambda key: model.apply(params, IMAGES, False, rngs={"dropout": key}))
    one, again, other = (run(jax.random.key(seed)) for seed in (0, 0, 1))
    chex.assert_trees_all_equal(one, again)
    assert relative(one, plain()[1]) > 0.05 < relative(one, other)
    with pytest.raises(Exception, match="dropout"):
        model.apply(params, IMAGES, False)


@pytest.mark.slow
def test_remat_changes_no_gradient_and_all_parameters_learn() -> None:
    one_stage, grads = config(depths=(2,), num_heads=(2,), windows=(3,)), []
    params = started(one_stage)[1]
    for policy in ("none", "full"):
        model = swin.SwinModel(dataclasses.replace(one_stage, remat=policy))
        loss = lambda p, m=model: jnp.sin(3 * m.apply(p, IMAGES)).sum()  # noqa: E731
        grads.append(quick(jax.grad(loss))(params))
    chex.assert_trees_all_close(*grads, rtol=1e-3, atol=1e-3)
    for path, leaf in param_tree.flatten(grads[0]).items():
        # Only differences between keys count: their biases have a gradient of zero.
        assert "key/bias" in path or float(jnp.abs(leaf).max()) > 1e-3, path


def test_program_does_not_grow_with_depth() -> None:
    sizes = []
    for depth in (2, 12):
        model, params = started(config(depths=(depth, depth), drop_path_rate=0.1, remat="full"))
        rngs = {"dropout": jax.random.key(0)}
        loss = lambda p, m=model, r=rngs: m.apply(p, IMAGES, False, rngs=r).sum()  # noqa: E731
        sizes.append(equations(jax.make_jaxpr(jax.grad(loss))(params).jaxpr))
    assert sizes[0] == sizes[1] > 50


def test_bfloat16_products_stay_near_float32() -> None:
    half = swin.SwinModel(config(dtype=jnp.bfloat16))
    found = quick(half.apply)(plain()[0], IMAGES)
    assert found.dtype == jnp.float32
    assert 1e-4 < relative(found, plain()[1]) < 0.05


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("swin_tiny", 28_288_354), ("swin_small", 49_606_258), ("swin_base", 87_768_224),
        ("swin_base_384", 87_903_584), ("swin_large", 196_532_476),
        ("swin_large_384", 196_735_516),
    ],
)  # fmt: skip
def test_published_sizes_have_the_published_parameters(name: str, count: int) -> None:
    model = swin.SwinClassifier(swin.SIZES[name], 1000)
    images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    boxed = jax.eval_shape(model.init, jax.random.key(0), images)
    assert sum(leaf.size for leaf in jax.tree.leaves(partitioning.unbox(boxed))) == count
    if name == "swin_tiny":  # every parameter has axes that the one table knows
        partitioning.param_shardings(boxed, partitioning.make_mesh())
        table = boxed["params"]["trunk"]["stages_2"]["layers"]["relative_position_bias"]
        assert table.names == ("layers", None, "heads") and table.value.shape == (6, 169, 12)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"windows": (3,)}, "need one entry a stage"),
        ({"depths": (), "num_heads": (), "windows": ()}, "need one entry a stage"),
        ({"depths": (0, 2)}, "every entry at least 1"),
        ({"num_heads": (2, 5)}, "5 does not divide the width 16 of stage 1"),
        ({"patch_size": 0}, "model.patch_size=0"),
        ({"drop_path_rate": 1.0}, "model.drop_path_rate=1.0"),
        ({"activation": "mish"}, "activation='mish'"),
        ({"layer_hooks": (hooks.LayerHooks(Lora(), 4, 6),)}, "layers 0..4"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        config(**change)


def test_images_that_are_none_are_refused() -> None:
    model, params = swin.SwinModel(CONFIG), plain()[0]
    with pytest.raises(ValueError, match="channels last"):
        model.apply(params, IMAGES.transpose(0, 3, 1, 2))
    with pytest.raises(ValueError, match="channels last"):
        model.apply(params, IMAGES[0])
    with pytest.raises(ValueError, match="images of uint8"):
        model.apply(params, jnp.zeros((1, 8, 8, 3), jnp.uint8))
