"""Zero-shot classes: templates and names as texts, means of features, alignment and uniformity."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodels.trunks import clip_zero_shot as zero_shot


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def test_names_and_templates_become_texts_and_each_template_one_call() -> None:
    seen: list[list[str]] = []
    table = np.random.default_rng(0).normal(size=(4, 3))

    def tokenizer(texts: list[str]) -> np.ndarray:
        seen.append(list(texts))
        return np.array([[len(seen) * 2 - 2], [len(seen) * 2 - 1]])

    def encode(ids: jax.Array) -> jax.Array:
        return jnp.asarray(table)[ids[:, 0]]

    templates = ["a photo of a {}.", "{} texture."]
    names = ["golden_retriever", "T-shirt"]
    found = zero_shot.class_features(encode, tokenizer, names, templates)
    assert seen == [
        ["a photo of a golden retriever.", "a photo of a T-shirt."],
        ["golden retriever texture.", "T-shirt texture."],
    ]
    expected = unit((unit(table[:2]) + unit(table[2:])) / 2)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_one_template_is_its_normalised_features() -> None:
    features = np.random.default_rng(0).normal(size=(3, 5))
    np.testing.assert_allclose(zero_shot.ensemble([features]), unit(features), rtol=1e-5)


def test_alignment_and_uniformity_are_their_formulas() -> None:
    rng = np.random.default_rng(0)
    images, classes, labels = rng.normal(size=(4, 5)), rng.normal(size=(3, 5)), [2, 0, 1, 2]
    distances = ((unit(images) - unit(classes)[labels]) ** 2).sum(-1)
    found = zero_shot.alignment(jnp.asarray(images), jnp.asarray(classes), jnp.asarray(labels))
    np.testing.assert_allclose(found, distances.mean(), rtol=1e-5)
    pairs = [(0, 1), (0, 2), (1, 2)]
    w = unit(classes)
    mean = np.mean([np.exp(-2 * ((w[i] - w[j]) ** 2).sum()) for i, j in pairs])
    np.testing.assert_allclose(zero_shot.uniformity(jnp.asarray(classes)), np.log(mean), rtol=1e-5)


@pytest.mark.parametrize(
    ("names", "templates", "words"),
    [
        (["a"], ["no place"], r"template 'no place': write \{\} once"),
        (["a"], ["{} and {}"], r"write \{\} once"),
        (["a", "_"], ["{}"], r"class names \[1\] are empty"),
        ([], ["{}"], "0 class names and 1 templates"),
        (["a"], [], "1 class names and 0 templates"),
    ],
)
def test_what_cannot_be_filled_is_refused(names: list, templates: list, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        zero_shot.class_features(lambda ids: ids, lambda texts: texts, names, templates)


def test_uniformity_of_one_class_is_refused() -> None:
    with pytest.raises(ValueError, match="at least two classes"):
        zero_shot.uniformity(jnp.ones((1, 4)))
