"""Zero-shot classes for CLIP: one vector a class from templates filled with its name.

    names, templates = ["golden_retriever", "abaya"], ["a photo of a {}.", "{} texture."]
    vectors = class_features(encode_text, tokenizer, names, templates)      # [2, d]
    logits = model.apply(params, image_features, vectors, method="logits")

`encode_text` is `Clip.encode_text` with its parameters, `tokenizer` any text -> ids.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmodels.trunks.clip import normalize


def fill_template(template: str, class_names: Sequence[str]) -> list[str]:
    """Returns a template with each name in place of "{}", underscores in names as spaces.

    Raises:
      ValueError: the template has no "{}" or several, or a name is empty.
    """
    if template.count("{}") != 1:
        raise ValueError(f"template {template!r}: write {{}} once, where the class name goes.")
    names = [name.replace("_", " ") for name in class_names]
    if empty := [place for place, name in enumerate(names) if not name.strip()]:
        raise ValueError(f"class names {empty[:5]} are empty: every class needs a name.")
    return [template.replace("{}", name) for name in names]


def class_features(
    encode_text: Callable[[jax.Array], jax.Array],
    tokenizer: Callable[[Sequence[str]], np.ndarray],
    class_names: Sequence[str],
    templates: Sequence[str],
) -> jax.Array:
    """Returns the normalised mean over templates of normalised text features, [classes, d].

    Args:
      encode_text: ids [classes, length] int32 -> [classes, d]; called once a template, so jit it.
      tokenizer: texts -> ids [classes, length], as `data.clip_tokenizer` gives.
      class_names: names; underscores become spaces.
      templates: each with one "{}".

    Raises:
      ValueError: no class, no template, or one that cannot be filled.
    """
    if not class_names or not templates:
        raise ValueError(
            f"{len(class_names)} class names and {len(templates)} templates: give at least one of "
            "each."
        )
    filled = [fill_template(template, class_names) for template in templates]
    return ensemble([encode_text(jnp.asarray(tokenizer(texts))) for texts in filled])


def ensemble(features: Any) -> jax.Array:
    """Returns the normalised mean of normalised features: [templates, classes, d] -> [classes, d].

    Args:
      features: an array, or a sequence of [classes, d] arrays.
    """
    return normalize(normalize(jnp.stack(list(features))).mean(0))


def alignment(image_features: jax.Array, class_vectors: jax.Array, labels: jax.Array) -> jax.Array:
    """Returns the mean squared distance of images to their classes, on normalised features.

    Args:
      image_features: [B, d].
      class_vectors: [C, d].
      labels: [B] int, below C.
    """
    difference = normalize(image_features) - normalize(class_vectors)[labels]
    return jnp.square(difference).sum(-1).mean()


def uniformity(class_vectors: jax.Array) -> jax.Array:
    """Returns log mean exp(-2 distance^2) over pairs of classes, normalised: [C, d] -> [].

    Raises:
      ValueError: fewer than two classes.
    """
    if class_vectors.shape[0] < 2:
        raise ValueError("uniformity is about pairs: give the vectors of at least two classes.")
    vectors = normalize(class_vectors)
    first, second = np.triu_indices(vectors.shape[0], k=1)
    distances = jnp.square(vectors[first] - vectors[second]).sum(-1)
    return jax.nn.logsumexp(-2.0 * distances) - jnp.log(float(len(first)))
