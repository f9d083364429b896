"""Parity of AIM's frozen image models: CLIP run frame by frame, and every key of a checkpoint."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmodels import weights
from jaxmodels.core import params as params_lib
from jaxmodels.core import partitioning
from jaxmodels.trunks import swin, vit
from jaxmodels.weights.rules import drop_absent
from jaxmodels.weights.tensor_file import TensorFile, as_tensor_file
from jaxmodels.weights.vit import timm_vit_rules

from .fixtures import Case
from .pomp_data import Computed
from .pomp_towers import load, stated

_CLIP = "clip_visual/"
_BACKBONE = "backbone."
_STEM = "patch_embed.proj.weight"
# What AIM adds to an image model, and its classifier.
_ADDED = ("Adapter", "temporal_embedding", "temporal_position_bias_table", "cls_head.")


def init_equals_clip(case: Case) -> Computed:
    """Kind init_equals_clip: class tokens of CLIP's image tower, [B, d_model, T, 1, 1]."""
    tensors = {k.removeprefix(_CLIP): v for k, v in case.params.items() if k.startswith(_CLIP)}
    settings, params = load(tensors)
    tower = vit.VitModel(vit.VitConfig(**stated(settings, case.meta)))
    video = np.moveaxis(case.inputs["video"], 1, -1)
    frames = jnp.asarray(video.reshape(-1, *video.shape[2:]))
    pooled = jax.jit(tower.apply)({"params": params}, frames).pooled
    features = pooled.reshape(*video.shape[:2], -1).swapaxes(1, 2)
    return {"outputs/features": features[..., None, None]}


def _listed(case: Case) -> dict[str, dict[str, tuple[int, ...]]]:
    """{architecture: {key: shape}} of what belongs to the image model."""
    found = {}
    for name, rows in case.meta.items():
        if isinstance(rows, list):
            kept = [row for row in rows if row[2] != "buffer"]
            kept = [row for row in kept if not any(word in row[0] for word in _ADDED)]
            found[name] = {
                key.removeprefix("module.").removeprefix(_BACKBONE): tuple(shape)
                for key, shape, _ in kept
            }
    return found


def expected_state_dict_layout(case: Case) -> Computed:
    """References of kind state_dict_layout: the shape of every tensor of an image model."""
    return {
        f"outputs/{name}/{key}": np.asarray(shape)
        for name, shapes in _listed(case).items()
        for key, shape in shapes.items()
    }


def state_dict_layout(case: Case) -> Computed:
    """Kind state_dict_layout: the shapes that our models have in the foreign layout."""
    return {
        f"outputs/{name}/{key}": np.asarray(shape)
        for name, shapes in _listed(case).items()
        for key, shape in _written(shapes).items()
    }


def _written(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Shapes that our own model, of the size that the file tells, is written with."""
    flat = dict(shapes)
    taps = None
    if len(flat.get(_STEM, ())) == 5:  # AIM's Swin repeats the kernel over frames
        out, channels, taps, *window = flat[_STEM]
        flat[_STEM] = (out, channels, *window)
    file = as_tensor_file({key: _nothing(shape) for key, shape in flat.items()})
    rules, model, size = _model(file)
    images = jnp.zeros((1, size, size, 3))
    made = partitioning.unbox(jax.eval_shape(model.init, jax.random.key(0), images))["params"]
    told = params_lib.flatten(weights.tree_of(file, rules))
    ours = params_lib.flatten(made)
    different = [k for k in told.keys() | ours.keys() if _shape(told, k) != _shape(ours, k)]
    if different:
        raise ValueError(f"the file's tree and our model's differ at {sorted(different)[:5]}")
    tree = jax.tree.map(lambda leaf: _nothing(leaf.shape), made)
    written = {key: value.shape for key, value in weights.export_weights(tree, rules).items()}
    if taps is not None:
        out, channels, *window = written[_STEM]
        written[_STEM] = (out, channels, taps, *window)
    return written


def _shape(leaves: Mapping[str, Any], path: str) -> tuple[int, ...] | None:
    return tuple(leaves[path].shape) if path in leaves else None


def _nothing(shape: tuple[int, ...]) -> np.ndarray:
    """An array of a full-size model's shape that takes one byte."""
    return np.broadcast_to(np.int8(0), shape)


def _model(file: TensorFile) -> tuple[weights.Rules, Any, int]:
    """(table, our model, side of its images) of a state dict of shapes."""
    family = weights.detect(file)
    settings = family.settings(file)
    if family.name.startswith("swin"):
        return family.rules(file), swin.SwinModel(swin.SwinConfig(**settings)), 224
    rules = family.rules(file)
    if family.name == "vit_timm" and "ln_post.weight" in file:
        # AIM gives timm's last norm the name that CLIP's has.
        rules = drop_absent(timm_vit_rules(final_norm="ln_post"), file, ["pooler"])
    config = vit.VitConfig(**settings)
    return rules, vit.VitModel(config), config.image_size


ADAPTERS = {"init_equals_clip": init_equals_clip, "state_dict_layout": state_dict_layout}
# Kinds whose references are inside a json document.
EXPECTED = {"state_dict_layout": expected_state_dict_layout}
RULES: dict[str, str] = {}
