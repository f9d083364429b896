"""Parity of CLIP's towers, of whole models in OpenAI's layout, and of zero-shot classes."""

import json
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmodels import weights
from jaxmodels.trunks import clip, clip_zero_shot
from jaxmodels.trunks.clip_resnet import ModifiedResNet, ResNetConfig
from jaxmodels.trunks.vit import VitConfig, VitModel
from jaxmodels.weights.clip import hf_clip_rules
from jaxmodels.weights.tensor_file import as_tensor_file

from .fixtures import Case
from .pomp_data import Computed, published_tokenizer, shared_path

VOCAB_SIZE = 49408
# Our settings by the names that the files give them.
_NAMES = {"heads": "num_heads", "ln_eps": "norm_eps", "bn_eps": "norm_eps", "act": "activation"}


def tensors_of(params: Mapping[str, np.ndarray], row_ids: np.ndarray | None) -> dict[str, Any]:
    """State dict of a file, the rows of its token table put back at their ids."""
    tensors = dict(params)
    rows = tensors.pop("token_embedding.rows", None)
    if rows is not None:
        size = int(tensors.get("vocab_size", VOCAB_SIZE))
        table = np.zeros((max(size, int(row_ids.max()) + 1), rows.shape[1]), rows.dtype)
        table[row_ids] = rows
        tensors["token_embedding.weight"] = table
    return tensors


def load(params: Mapping[str, np.ndarray], row_ids: Any = None) -> tuple[dict[str, Any], Any]:
    """Settings and float32 parameters that our tables make of a state dict."""
    file = as_tensor_file(tensors_of(params, row_ids))
    family = weights.detect(file)
    tree = weights.import_tree(file, family.rules(file), dtype=np.float32)
    return family.settings(file), jax.tree.map(jnp.asarray, tree)


def stated(settings: dict[str, Any], meta: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with what the file states in place of what shapes suggest."""
    return settings | {ours: meta[name] for name, ours in _NAMES.items() if name in meta}


def channels_last(images: np.ndarray) -> jax.Array:
    """Images [B, 3, H, W] as [B, H, W, 3]."""
    return jnp.asarray(np.moveaxis(images, 1, -1))


def hidden_of(sown: Any) -> jax.Array:
    """The residual stream before each layer and after the last: [layers + 1, B, L, d]."""
    return sown["intermediates"]["encoder"]["hidden"]


def _named_blocks(hidden: jax.Array) -> Computed:
    return {f"outputs/block{i}": value for i, value in enumerate(hidden[1:])}


def text_tower(case: Case) -> list[Computed]:
    """Kind text_tower: every stage of the tower, with what follows the end token changed too."""
    settings, params = load(case.params, case.inputs.get("token_embedding_row_ids"))
    config = clip.TextConfig(**stated(settings, case.meta))
    tower, at = clip.TextTower(config), {"params": params}
    layer = config.make_layer()
    first = {"params": jax.tree.map(lambda leaf: leaf[0], params["encoder"]["layers"])}

    @jax.jit
    def run(ids: jax.Array) -> Computed:
        found, sown = tower.apply(at, ids, mutable=["intermediates"])
        hidden = hidden_of(sown)
        bias = clip.attention.causal_bias(ids.shape[1], ids.shape[1])
        normed = layer.apply(first, "attention", hidden[0], method="normalize")
        attended = layer.apply(first, normed, bias, method=lambda m, *args: m.attention(*args))
        return _named_blocks(hidden) | {
            "outputs/embed": hidden[0],
            "outputs/block0_ln_1": normed,
            "outputs/block0_attn": attended,
            "outputs/ln_final": found.tokens,
            "outputs/text_features": found.features,
            "outputs/text_features_normalized": clip.normalize(found.features),
        }

    names = [name for name in case.inputs if name.startswith("tokens")]
    whole = run(jnp.asarray(case.inputs["tokens"]))
    variants = [whole]
    for name in sorted(set(names) - {"tokens"}):
        other = run(jnp.asarray(case.inputs[name]))
        # Only the features are read at the end token; the rest differs behind it.
        variants.append(whole | {k: v for k, v in other.items() if "text_features" in k})
    return variants


def image_tower_vit(case: Case) -> Computed:
    """Kind image_tower_vit."""
    settings, params = load(case.params)
    tower = VitModel(VitConfig(**stated(settings, case.meta)))
    images = channels_last(case.inputs["image"])

    @jax.jit
    def run(images: jax.Array) -> Computed:
        at = {"params": params}
        found, sown = tower.apply(at, images, mutable=["intermediates"])
        patches = tower.apply(at, images, method=lambda m, x: m.embeddings.patches(x))
        hidden = hidden_of(sown)
        return _named_blocks(hidden) | {
            "outputs/conv1": jnp.moveaxis(patches, -1, 1),
            "outputs/embed": tower.apply(at, images, method="embed"),
            "outputs/ln_pre": hidden[0],
            "outputs/ln_post": found.tokens,
            "outputs/pooled": found.pooled,
            "outputs/image_features": found.features,
        }

    return run(images)


def image_tower_rn(case: Case) -> Computed:
    """Kind image_tower_rn."""
    settings, params = load(case.params)
    tower = ModifiedResNet(ResNetConfig(**stated(settings, case.meta)))
    images = channels_last(case.inputs["image"])

    @jax.jit
    def run(images: jax.Array) -> Computed:
        at = {"params": params}
        maps = tower.apply(at, images, method="feature_maps")
        names = ("stem", *(f"layer{n}" for n in range(1, len(maps))))
        computed = {
            f"outputs/{name}": jnp.moveaxis(one, -1, 1)
            for name, one in zip(names, maps, strict=True)
        }
        return computed | {"outputs/image_features": tower.apply(at, images).features}

    return run(images)


def _check_inferred(config: clip.ClipConfig, inferred: Mapping[str, Any]) -> None:
    text, vision = config.text, config.vision
    ours = {
        "text_layers": text.num_layers,
        "text_width": text.d_model,
        "text_heads": text.num_heads,
        "context_length": text.max_positions,
        "vocab_size": text.vocab_size,
        "embed_dim": text.projection_dim,
        "vision_heads": vision.num_heads,
        "image_resolution": vision.image_size,
    }
    if isinstance(vision, ResNetConfig):
        ours |= {"vision_layers": list(vision.num_blocks), "vision_width": vision.width}
    else:
        ours |= {"vision_layers": vision.num_layers, "vision_width": vision.d_model}
        ours |= {"vision_patch_size": vision.patch_size, "patch_size": vision.patch_size}
    wrong = {name: (ours[name], inferred[name]) for name in ours.keys() & inferred.keys()}
    wrong = {name: pair for name, pair in wrong.items() if pair[0] != pair[1]}
    if wrong:
        raise ValueError(f"inferred (ours, stated): {wrong}")


def _whole(settings: Mapping[str, Any], params: Any, case: Case) -> Computed:
    config = clip.ClipConfig.from_settings(
        {tower: stated(settings[tower], case.meta.get(tower, {})) for tower in settings}
    )
    _check_inferred(config, case.meta.get("inferred", {}))
    model, at = clip.Clip(config), {"params": params}

    @jax.jit
    def run(images: jax.Array, ids: jax.Array) -> Computed:
        image = model.apply(at, images, method="encode_image")
        text = model.apply(at, ids, method="encode_text")
        logits = model.apply(at, image, text, method="logits")
        return {
            "outputs/image_features": image,
            "outputs/text_features": text,
            "outputs/logits_per_image": logits,
            "outputs/logits_per_text": logits.T,
        }

    return run(channels_last(case.inputs["image"]), jnp.asarray(case.inputs["tokens"]))


def clip_from_state_dict(case: Case) -> list[Computed]:
    """Kind clip_from_state_dict: from OpenAI's layout, and from there through Hugging Face's."""
    settings, params = load(case.params, case.inputs.get("token_embedding_row_ids"))
    computed = [_whole(settings, params, case)]
    if "num_blocks" not in settings["vision"]:
        computed.append(_whole(*load(weights.export_weights(params, hf_clip_rules())), case))
    return computed


def zeroshot_ensemble(case: Case) -> Computed:
    """Kind zeroshot_ensemble: classes from templates, and how they lie among images."""
    settings, params = load(case.params, case.inputs.get("token_embedding_row_ids"))
    config = clip.ClipConfig.from_settings(
        {tower: stated(settings[tower], case.meta.get(tower, {})) for tower in settings}
    )
    model, at = clip.Clip(config), {"params": params}
    encode_text = jax.jit(lambda ids: model.apply(at, ids, method="encode_text"))
    tokenizer, meta = published_tokenizer(case), case.meta
    own = [meta["templates_custom"]]

    def classes(templates: list[str]) -> jax.Array:
        return clip_zero_shot.class_features(encode_text, tokenizer, meta["classnames"], templates)

    added = [] if "ImageNet" in meta["dataset"] else own
    lists = json.loads(shared_path(case, "data_lists.json").read_text(encoding="utf-8"))
    single = classes(own)
    images = model.apply(at, channels_last(case.inputs["image"]), method="encode_image")
    labels = jnp.asarray(case.inputs["labels"])
    eighty = meta.get("ensemble80", lists["imagenet_templates_80"])
    return {
        "outputs/class_features_single": single,
        "outputs/class_features_ensemble7_plus_custom": classes(meta["ensemble7"] + added),
        "outputs/class_features_ensemble80_plus_custom": classes(eighty + added),
        "outputs/logits": model.apply(at, images, single, method="logits"),
        "outputs/align_loss": clip_zero_shot.alignment(images, single, labels)[None],
        "outputs/uniform_loss": clip_zero_shot.uniformity(single)[None],
    }
