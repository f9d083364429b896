"""CLIP: Hugging Face's numbers, where a text is read, hooks in both towers, published sizes."""

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
from jaxmodels.trunks import clip, clip_resnet, vit
from tests.trunks import hook_cases, hugging_face
from tests.vcc import small
from tests.vcc.test_encoder import equations

TEXT = clip.TextConfig(
    vocab_size=30, d_model=16, num_layers=2, num_heads=2, max_positions=9, projection_dim=6
)
VISION = clip.vision(
    image_size=8, patch_size=4, d_model=24, num_layers=1, num_heads=3, projection_dim=6
)
CONFIG = clip.ClipConfig(TEXT, VISION)
# The end token, 29, at places 8, 2 and 4; then junk that a causal tower does not see.
IDS = np.random.default_rng(0).integers(1, 28, (3, 9))
IDS[:, 0] = 28
ENDS = np.array([8, 2, 4])
IDS[np.arange(3), ENDS] = 29
IMAGES = np.random.default_rng(0).normal(size=(2, 8, 8, 3)).astype(np.float32)
# Compiled without optimisation, which changes no number beyond rounding and takes half the time.
quick = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def text(**changes: Any) -> tuple[clip.TextTower, Any]:
    model = clip.TextTower(dataclasses.replace(TEXT, **changes))
    return model, small.drawn(model.init, IDS, size=0.3, spread=True)


@functools.cache
def whole() -> tuple[clip.Clip, Any]:
    model = clip.Clip(CONFIG)
    return model, small.drawn(model.init, IMAGES, IDS, size=0.3, spread=True)


def hugging_face_clip(name: str, end: int = 29, **changes: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    both = {"num_hidden_layers": 2, "projection_dim": 6} | changes
    words = both | {
        "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "vocab_size": 30,
        "max_position_embeddings": 9, "eos_token_id": end, "bos_token_id": 28, "pad_token_id": 1,
    }  # fmt: skip
    pixels = both | {
        "hidden_size": 24, "intermediate_size": 20, "num_attention_heads": 3, "image_size": 8,
        "patch_size": 4,
    }  # fmt: skip
    make = getattr(transformers, name)
    if name == "CLIPModel":
        sizes = transformers.CLIPConfig(text_config=words, vision_config=pixels, projection_dim=6)
    elif "Text" in name:
        sizes = transformers.CLIPTextConfig(**words)
    else:
        sizes = transformers.CLIPVisionConfig(**pixels)
    return hugging_face.randomized(make(sizes))


CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.mark.parametrize(
    "changes",
    [{}, {"hidden_act": "gelu", "layer_norm_eps": 1e-3}, {"end": 2}],
    ids=["as published", "other parts", "first configs"],
)
def test_hugging_face_gives_the_same_numbers(changes: dict[str, Any], tmp_path: Path) -> None:
    theirs = hugging_face_clip("CLIPModel", **changes)
    family, settings, params = hugging_face.loaded(theirs, tmp_path)
    config = clip.ClipConfig.from_settings(settings)
    assert family == "clip" and config.text.end_id == (None if "end" in changes else 29)
    model = clip.Clip(config)
    expected = hugging_face.run(
        theirs, pixel_values=np.moveaxis(IMAGES, -1, 1), input_ids=IDS, attention_mask=IDS > -1
    )

    @quick
    def run(params: Any) -> Any:
        image = model.apply(params, IMAGES, method=lambda m, x: m.vision(x))
        words = model.apply(params, IDS, method=lambda m, x: m.text(x))
        return image, words, model.apply(params, IMAGES, IDS)

    image, words, logits = run(params)
    np.testing.assert_allclose(logits, expected.logits_per_image, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(clip.normalize(image.features), expected.image_embeds, **CLOSE)
    np.testing.assert_allclose(clip.normalize(words.features), expected.text_embeds, **CLOSE)
    tokens = expected.text_model_output.last_hidden_state
    np.testing.assert_allclose(words.tokens, tokens, **CLOSE)
    np.testing.assert_array_equal(words.pooled, words.tokens[np.arange(3), ENDS])
    pixels = expected.vision_model_output.last_hidden_state
    norm = theirs.vision_model.post_layernorm  # which they apply to the class token alone
    np.testing.assert_allclose(image.tokens, norm(pixels).detach(), **CLOSE)
    np.testing.assert_array_equal(image.pooled, image.tokens[:, 0])


@pytest.mark.parametrize("name", [
    "CLIPTextModel", "CLIPTextModelWithProjection", "CLIPVisionModel",
    "CLIPVisionModelWithProjection",
])  # fmt: skip
def test_a_tower_alone_gives_hugging_faces_numbers(name: str, tmp_path: Path) -> None:
    theirs = hugging_face_clip(name)
    family, settings, params = hugging_face.loaded(theirs, tmp_path)
    assert family == "clip"
    if "Text" in name:
        model, given = clip.TextTower(clip.TextConfig(**settings)), IDS
        expected = hugging_face.run(theirs, input_ids=IDS, attention_mask=IDS > -1)
        features = expected.get("text_embeds", expected.get("pooler_output"))
    else:
        model, given = vit.VitModel(vit.VitConfig(**settings)), IMAGES
        expected = hugging_face.run(theirs, pixel_values=np.moveaxis(IMAGES, -1, 1))
        features = expected.get("image_embeds", expected.get("pooler_output"))
    found = quick(model.apply)(params, given)
    np.testing.assert_allclose(found.features, features, **CLOSE)
    assert found.features.shape[1] == (6 if name.endswith("Projection") else given_width(name))


def given_width(name: str) -> int:
    return 16 if "Text" in name else 24


def test_a_text_is_read_at_its_first_end_token_and_sees_nothing_behind() -> None:
    model, params = text()
    run = quick(model.apply)
    found = run(params, IDS)
    by_id = quick(text(end_id=29)[0].apply)(params, IDS)
    chex.assert_trees_all_equal(found, by_id, run(params, IDS, ENDS))
    behind = np.arange(9)[None] > ENDS[:, None]
    other = run(params, np.where(behind, 7, IDS))
    np.testing.assert_array_equal(found.features, other.features)
    again = run(params, np.where(behind, 29, IDS))  # the first of several
    np.testing.assert_array_equal(found.features, again.features)
    moved = run(params, IDS, ENDS - 1)
    assert float(jnp.abs(moved.features - found.features).max()) > 0.1


def test_the_context_may_be_cut_to_the_longest_text() -> None:
    model, params = text()
    found = model.apply(params, IDS[1:]).features
    np.testing.assert_allclose(model.apply(params, IDS[1:, :5]).features, found, atol=1e-5)


def test_an_end_beyond_the_row_is_not_a_number_and_no_neighbour() -> None:
    model, params = text()
    found = np.asarray(model.apply(params, IDS, np.array([8, 9, 4])).features)
    assert np.isnan(found[1]).all() and np.isfinite(found[[0, 2]]).all()


def test_embeddings_may_stand_in_place_of_ids() -> None:
    model, params = text()
    embedded = model.apply(params, IDS, method="embed")
    chex.assert_trees_all_equal(
        model.apply(params, None, ENDS, inputs_embeds=embedded), model.apply(params, IDS)
    )
    for given, words in (
        ({"inputs_embeds": embedded}, "do not tell where a text ends"),
        ({}, "either input_ids or inputs_embeds"),
        ({"input_ids": IDS, "inputs_embeds": embedded}, "either input_ids or inputs_embeds"),
        ({"input_ids": np.ones((1, 10), int)}, "10 tokens, but the position table has 9"),
    ):
        with pytest.raises(ValueError, match=words):
            model.apply(params, **given)


def test_logits_are_scaled_cosines_whatever_the_lengths() -> None:
    model, params = whole()
    images, texts = jax.random.normal(jax.random.key(0), (2, 3, 6))
    scale = {"params": params["params"] | {"logit_scale": jnp.log(50.0)}}
    found = model.apply(scale, images, texts, method="logits")
    one = np.asarray(images[1], np.float64), np.asarray(texts[2], np.float64)
    cosine = one[0] @ one[1] / np.linalg.norm(one[0]) / np.linalg.norm(one[1])
    np.testing.assert_allclose(found[1, 2], 50 * cosine, rtol=1e-5)
    longer = model.apply(scale, 3 * images, texts / 7, method="logits")
    np.testing.assert_allclose(longer, found, rtol=1e-5, atol=1e-5)


COUNTS = {
    "rn50": 102_007_137,
    "rn101": 119_688_033,
    "rn50x4": 178_300_601,
    "rn50x16": 290_979_217,
    "vit_b32": 151_277_313,
    "vit_b16": 149_620_737,
    "vit_l14": 427_616_513,
    "vit_l14_336": 427_944_193,
}
VISION_COUNTS = {"rn50": 38_316_896, "vit_b32": 87_849_216, "vit_b16": 86_192_640}
VISION_COUNTS |= {"vit_l14": 303_966_208}


@pytest.mark.parametrize("name", clip.SIZES)
def test_published_sizes_have_their_parameter_counts_and_logical_axes(name: str) -> None:
    config = clip.SIZES[name]
    side = config.vision.image_size
    images = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
    ids = jax.ShapeDtypeStruct((1, 77), jnp.int32)
    boxed = jax.eval_shape(clip.Clip(config).init, jax.random.key(0), images, ids)["params"]
    partitioning.param_shardings(boxed, partitioning.make_mesh(1, 1, jax.devices()[:1]))
    made = partitioning.unbox(boxed)
    trained = param_tree.select(made, lambda path: not clip_resnet.is_statistic(path))
    assert param_tree.count(trained) == COUNTS[name]
    if name in VISION_COUNTS:
        assert param_tree.count(trained["vision"]) == VISION_COUNTS[name]
    if name == "rn50":  # batch norms: mean and variance; the counts of steps are no parameters
        assert param_tree.count(made) - COUNTS[name] == 53_303 - 55


def test_a_start_has_clips_own_spreads() -> None:
    sizes = dataclasses.replace(TEXT, d_model=64, num_layers=3, vocab_size=500)
    inits = sizes.make_layer().inits
    kernel = {
        name: float(init(jax.random.key(0), (200, 300)).std()) for name, init in inits.items()
    }
    inner, outer, wide = 64**-0.5, 64**-0.5 * 6**-0.5, 128**-0.5
    expected = {"query": inner, "key": inner, "value": inner, "out": outer, "wo": outer, "wi": wide}
    for name, std in expected.items():
        assert kernel[name] == pytest.approx(std, rel=0.02), name
    made = clip.TextEmbeddings(sizes).init(jax.random.key(0), jnp.zeros((1, 2, 64)))
    assert float(made["params"]["position"]["embedding"].value.std()) == pytest.approx(
        0.01, rel=0.1
    )
    scale = clip.Clip(CONFIG).init(jax.random.key(0), jnp.ones((1, 6)), jnp.ones((1, 6)),
                                   method="logits")  # fmt: skip
    assert float(jnp.exp(scale["params"]["logit_scale"].value)) == pytest.approx(1 / 0.07)


def test_hooks_act_in_either_tower_alone() -> None:
    group = (hooks.LayerHooks(hook_cases.Prefix(2)),)
    model, params = whole()
    plain = [model.apply(params, x, method=f"encode_{kind}") for kind, x in
             (("text", IDS), ("image", IMAGES))]  # fmt: skip
    for place, name in enumerate(("text_hooks", "image_hooks")):
        changed = clip.Clip(CONFIG.with_hooks(**{name: group}))
        made = small.drawn(changed.init, IMAGES, IDS, size=0.3, spread=True)
        tower = ("text", "vision")[place]
        encoder = params["params"][tower]["encoder"] | {
            "hooks_0": made["params"][tower]["encoder"]["hooks_0"]
        }
        tree = params["params"] | {tower: params["params"][tower] | {"encoder": encoder}}
        found = [changed.apply({"params": tree}, x, method=f"encode_{kind}") for kind, x in
                 (("text", IDS), ("image", IMAGES))]  # fmt: skip
        np.testing.assert_array_equal(found[1 - place], plain[1 - place])
        assert float(jnp.abs(found[place] - plain[place]).max()) > 0.05
    with pytest.raises(ValueError, match="this image tower is a ResNet"):
        clip.SIZES["rn50"].with_hooks(image_hooks=group)


def test_a_delta_on_the_text_tower_equals_changed_kernels() -> None:
    model, params = text(layer_hooks=(hooks.LayerHooks(hook_cases.Delta(16)),))
    found = quick(model.apply)(params, IDS)
    encoder = dict(params["params"]["encoder"])
    made, stacked = encoder.pop("hooks_0"), encoder["layers"]
    attention = dict(stacked["attention"])
    for name in ("query", "value"):
        change = jnp.einsum("lik,lkj->lij", made[f"{name}_down"], made[f"{name}_up"])
        attention[name] = attention[name] | {"kernel": attention[name]["kernel"] + change}
    encoder["layers"] = stacked | {"attention": attention}
    merged = {"params": params["params"] | {"encoder": encoder}}
    chex.assert_trees_all_close(found, quick(text()[0].apply)(merged, IDS), atol=2e-5)


@pytest.mark.parametrize("policy", ["none", "full"])
def test_program_does_not_grow_with_depth_and_gradients_reach_every_leaf(policy: str) -> None:
    sizes = []
    for depth in (2, 12):
        model, params = text(num_layers=depth, remat=policy)
        grad = jax.grad(lambda p, m=model: jnp.square(m.apply(p, IDS).features).sum())
        sizes.append(equations(jax.make_jaxpr(grad)(params).jaxpr))
        if depth == 2:
            found = quick(grad)(params)
    assert sizes[0] == sizes[1] > 50
    for path, leaf in param_tree.flatten(found).items():
        # Softmax does not see what all keys share.
        assert path.endswith("key/bias") or float(jnp.abs(leaf).max()) > 0, path


def test_bfloat16_products_stay_near_float32() -> None:
    model, params = whole()
    half = clip.Clip(CONFIG.with_both(dtype=jnp.bfloat16))
    assert half.config.text.dtype == half.config.vision.dtype == jnp.bfloat16
    full = model.apply(params, IDS, method="encode_text")
    found = half.apply(params, IDS, method="encode_text")
    assert found.dtype == jnp.float32
    assert 1e-4 < float(jnp.abs(found - full).max() / jnp.abs(full).max()) < 0.05


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: dataclasses.replace(TEXT, num_heads=3), "num_heads=3 does not divide"),
        (lambda: dataclasses.replace(TEXT, max_positions=0), "model.max_positions=0"),
        (lambda: dataclasses.replace(TEXT, end_id=30), "end_id=30 is not in the vocabulary of 30"),
        (
            lambda: clip.ClipConfig(TEXT, dataclasses.replace(VISION, projection_dim=7)),
            "projection_dim is 6 for texts and 7 for images",
        ),
        (
            lambda: clip.ClipConfig(dataclasses.replace(TEXT, projection_dim=None), VISION),
            "projection_dim is None for texts",
        ),
    ],
)
def test_sizes_that_do_not_fit_are_refused(make: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()
