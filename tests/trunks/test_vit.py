"""ViT: Hugging Face's numbers in every layout, other image sizes, hooks, sizes, flat compile."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodels.core import hooks, partitioning
from jaxmodels.core import params as param_tree
from jaxmodels.trunks import vit
from tests.trunks import hook_cases, hugging_face
from tests.vcc import small
from tests.vcc.test_encoder import equations

CONFIG = vit.VitConfig(image_size=8, patch_size=4, d_model=16, num_layers=2, num_heads=2, d_ff=24)
IMAGES = np.random.default_rng(0).normal(size=(2, 8, 8, 3)).astype(np.float32)
WIDE = np.random.default_rng(1).normal(size=(2, 12, 20, 3)).astype(np.float32)

# Compiled without optimisation, which changes no number beyond rounding and takes half the time.
quick = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def config(**changes: Any) -> vit.VitConfig:
    return dataclasses.replace(CONFIG, **changes)


def started(given: vit.VitConfig) -> tuple[vit.VitModel, Any]:
    model = vit.VitModel(given)
    return model, small.drawn(model.init, IMAGES, size=0.3, spread=True)


def hugging_face_vit(name: str = "ViTModel", **changes: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    sizes = {
        "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 8,
        "intermediate_size": 24, "patch_size": 4, "num_labels": 3,
    } | changes  # fmt: skip
    return hugging_face.randomized(getattr(transformers, name)(transformers.ViTConfig(**sizes)))


def channels_first(images: np.ndarray) -> np.ndarray:
    return np.moveaxis(images, -1, 1)


@pytest.mark.parametrize(
    "changes",
    [{}, {"qkv_bias": False, "hidden_act": "gelu_new", "layer_norm_eps": 1e-3}],
    ids=["as published", "other parts"],
)
def test_hugging_face_gives_the_same_numbers(changes: dict[str, Any], tmp_path: Path) -> None:
    theirs = hugging_face_vit(**changes)
    family, settings, params = hugging_face.loaded(theirs, tmp_path)
    assert family == "vit" and settings["pooler"]
    model = vit.VitModel(vit.VitConfig(**settings | {"interpolate_positions": True}))
    run = quick(model.apply)
    for images, more in ((IMAGES, {}), (WIDE, {"interpolate_pos_encoding": True})):
        theirs.forward = functools.partial(type(theirs).forward, theirs, **more)
        expected = hugging_face.run(theirs, pixel_values=channels_first(images))
        found = run(params, images)
        tokens = expected.last_hidden_state
        np.testing.assert_allclose(found.tokens, tokens, rtol=1e-5, atol=1e-5)
        pooled = expected.pooler_output
        np.testing.assert_allclose(found.features, pooled, rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(found.pooled, found.tokens[:, 0])


def test_hugging_face_classifies_alike(tmp_path: Path) -> None:
    theirs = hugging_face_vit("ViTForImageClassification")
    _, settings, params = hugging_face.loaded(theirs, tmp_path)
    model = vit.VitClassifier(vit.VitConfig(**settings), 3)
    expected = hugging_face.run(theirs, pixel_values=channels_first(IMAGES)).logits
    found = quick(model.apply)(params, IMAGES)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_a_start_is_the_tree_that_files_give_and_predicts_nothing(tmp_path: Path) -> None:
    theirs = hugging_face_vit("ViTForImageClassification")
    _, settings, params = hugging_face.loaded(theirs, tmp_path)
    model = vit.VitClassifier(vit.VitConfig(**settings), 3)
    fresh = partitioning.unbox(jax.eval_shape(model.init, jax.random.key(0), IMAGES))
    chex.assert_trees_all_equal_shapes_and_dtypes(fresh, params)
    head = model.init(jax.random.key(0), jnp.ones((1, 16)), method=lambda m, x: m.classifier(x))
    assert not head["params"]["classifier"]["kernel"].value.any()
    made = CONFIG.make_embeddings().init(jax.random.key(0), IMAGES)["params"]
    assert 0.017 < float(made["patch"]["kernel"].value.std()) < 0.023


# Trunk alone; with a head for 1,000 classes each has d_model * 1000 + 1000 more.
COUNTS = {
    "vit_ti16": 5_524_416,
    "vit_s16": 21_665_664,
    "vit_b16": 85_798_656,
    "vit_b32": 87_455_232,
    "vit_l16": 303_301_632,
    "vit_l32": 305_510_400,
    "vit_h14": 630_764_800,
}


@pytest.mark.parametrize("name", COUNTS)
def test_published_sizes_have_their_parameter_counts(name: str) -> None:
    size = vit.SIZES[name].image_size
    images = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    made = jax.eval_shape(vit.VitModel(vit.SIZES[name]).init, jax.random.key(0), images)
    assert param_tree.count(made) == COUNTS[name]


def test_every_leaf_has_logical_axes() -> None:
    given = config(pooler=True, projection_dim=4, embeddings_norm=True)
    made = jax.eval_shape(vit.VitModel(given).init, jax.random.key(0), IMAGES)
    mesh = partitioning.make_mesh(1, 1, jax.devices()[:1])
    partitioning.param_shardings(made, mesh)  # names without a rule are refused
    boxed = jax.tree.leaves(made, is_leaf=lambda x: hasattr(x, "names"))
    assert all(len(leaf.names) == leaf.value.ndim for leaf in boxed)


def test_a_delta_on_query_and_value_equals_changed_kernels() -> None:
    group = (hooks.LayerHooks(hook_cases.Delta(16), 1),)
    model, params = started(config(layer_hooks=group))
    tree = params["params"]["encoder"]
    made = tree.pop(next(name for name in tree if name.startswith("hooks_")))
    merged = jax.tree.map(lambda leaf: leaf, params)
    attention = merged["params"]["encoder"]["layers"]["attention"]
    for name in ("query", "value"):
        change = made[f"{name}_down"][0] @ made[f"{name}_up"][0]
        attention[name]["kernel"] = attention[name]["kernel"].at[1].add(change)
    tree["hooks_1"] = made
    found = quick(model.apply)(params, IMAGES)
    del tree["hooks_1"]
    expected = quick(vit.VitModel(CONFIG).apply)(merged, IMAGES)
    chex.assert_trees_all_close(found, expected, atol=1e-5)
    plain = vit.VitModel(CONFIG).apply(params, IMAGES)
    assert float(jnp.abs(plain.features - found.features).max()) > 0.1


def test_an_adapter_behind_the_ffn_equals_a_changed_output_projection() -> None:
    model, params = started(config(layer_hooks=(hooks.LayerHooks(hook_cases.Bottleneck()),)))
    found = quick(model.apply)(params, IMAGES)
    encoder = dict(params["params"]["encoder"])
    kernel = np.eye(16) + encoder.pop("hooks_0")["kernel"]
    wo = encoder["layers"]["ffn"]["wo"]
    changed = {
        "kernel": jnp.einsum("lij,ljk->lik", wo["kernel"], kernel),
        "bias": jnp.einsum("lj,ljk->lk", wo["bias"], kernel),
    }
    ffn = encoder["layers"]["ffn"] | {"wo": changed}
    encoder["layers"] = encoder["layers"] | {"ffn": ffn}
    expected = vit.VitModel(CONFIG).apply(
        {"params": params["params"] | {"encoder": encoder}}, IMAGES
    )
    chex.assert_trees_all_close(found, expected, atol=2e-5)


def test_a_prefix_is_attended_to_by_every_token() -> None:
    given = config(num_layers=1, layer_hooks=(hooks.LayerHooks(hook_cases.Prefix(3)),))
    model, params = started(given)
    found = model.apply(params, IMAGES).tokens
    own = params["params"]["encoder"]
    layer = {"params": jax.tree.map(lambda leaf: leaf[0], own["layers"])}
    front = own["hooks_0"]["attention"][0]

    def forward(layer: Any, x: jax.Array) -> jax.Array:
        y = layer.normalize("attention", x)
        attention, rows = layer.attention, (2, 3, 2, 8)
        key = jnp.concatenate([jnp.broadcast_to(front[0], rows), attention.keys(y)], 1)
        value = jnp.concatenate([jnp.broadcast_to(front[1], rows), attention.values(y)], 1)
        x = x + attention.attend(attention.queries(y), key, value)
        return x + layer.ffn(layer.normalize("ffn", x))

    tokens = model.apply(params, IMAGES, method="embed")
    expected = CONFIG.make_layer().apply(layer, tokens, method=forward)
    norm = vit.layers.LayerNorm(CONFIG.norm_eps)
    expected = norm.apply({"params": own["final_norm"]}, expected)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_tokens_may_be_given_and_prompts_put_behind_them() -> None:
    model, params = started(CONFIG)
    tokens = model.apply(params, IMAGES, method="embed")
    chex.assert_trees_all_equal(
        model.apply(params, inputs_embeds=tokens), model.apply(params, IMAGES)
    )
    more = jnp.concatenate([tokens, jnp.ones((2, 3, 16))], axis=1)
    assert model.apply(params, inputs_embeds=more).tokens.shape == (2, 8, 16)
    for given in ({}, {"images": IMAGES, "inputs_embeds": tokens}):
        with pytest.raises(ValueError, match="either images or inputs_embeds"):
            model.apply(params, **given)


@pytest.mark.parametrize("policy", ["none", "full", "dots"])
def test_program_does_not_grow_with_depth_and_gradients_reach_every_leaf(policy: str) -> None:
    sizes, grads = [], []
    for depth in (2, 12):
        given = config(num_layers=depth, remat=policy)
        model, params = started(given)
        grad = jax.grad(lambda p, m=model: jnp.square(m.apply(p, IMAGES).features).sum())
        sizes.append(equations(jax.make_jaxpr(grad)(params).jaxpr))
        grads.append((grad, params))
    assert sizes[0] == sizes[1] > 50
    grad, params = grads[0]
    for path, leaf in param_tree.flatten(quick(grad)(params)).items():
        # Softmax does not see what all keys share.
        assert path.endswith("key/bias") or float(jnp.abs(leaf).max()) > 0, path


def test_dropout_acts_only_while_training_and_follows_its_rng() -> None:
    model, params = started(config(dropout_rate=0.2, attention_dropout_rate=0.2))
    quiet = model.apply(params, IMAGES).features
    np.testing.assert_array_equal(quiet, vit.VitModel(CONFIG).apply(params, IMAGES).features)
    run = quick(lambda key: model.apply(params, IMAGES, False, rngs={"dropout": key}).features)
    one, again, other = (run(jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, again)
    assert float(jnp.abs(one - quiet).max()) > 0.1 < float(jnp.abs(one - other).max())


def test_bfloat16_products_stay_near_float32() -> None:
    model, params = started(config(projection_dim=4, embeddings_norm=True))
    half = vit.VitModel(dataclasses.replace(model.config, dtype=jnp.bfloat16))
    full, found = model.apply(params, IMAGES), half.apply(params, IMAGES)
    assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {jnp.dtype("float32")}
    error = jnp.abs(found.features - full.features).max() / jnp.abs(full.features).max()
    assert 1e-4 < float(error) < 0.05


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_heads": 3}, "model.num_heads=3 does not divide model.d_model=16"),
        ({"patch_size": 3}, "model.patch_size=3 does not divide model.image_size=8"),
        ({"num_layers": 0}, "model.num_layers=0: must be at least 1"),
        ({"initialization": "random"}, "model.initialization='random': use one of"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        config(**change)


def test_images_of_another_size_are_refused_unless_asked_for() -> None:
    model, params = started(CONFIG)
    with pytest.raises(ValueError, match="12 x 20 pixels, but the positions are for 8 x 8"):
        model.apply(params, WIDE)
