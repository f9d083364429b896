"""CLIP's tables: OpenAI's and Hugging Face's files give one tree, and come back bit by bit."""

import dataclasses
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodels import weights
from jaxmodels.core import partitioning
from jaxmodels.trunks import clip
from jaxmodels.trunks.clip_resnet import ResNetConfig
from jaxmodels.weights.clip import hf_clip_rules, hf_text_rules, openai_clip_rules
from jaxmodels.weights.tensor_file import TensorFile, as_tensor_file
from tests.weights.test_layouts import assert_same_bits

TEXT = clip.TextConfig(
    vocab_size=30, d_model=64, num_layers=2, num_heads=1, max_positions=9, projection_dim=6
)
VIT = clip.ClipConfig(
    TEXT,
    clip.vision(
        image_size=8, patch_size=4, d_model=128, num_layers=1, num_heads=2, projection_dim=6
    ),
)
RESNET = clip.ClipConfig(
    TEXT, ResNetConfig(32, width=4, num_blocks=(1, 3, 2, 1), num_heads=2, projection_dim=6)
)
SCALARS = {"input_resolution": 8, "context_length": 9, "vocab_size": 30}
_HALF = ("weight", "bias", "proj", "projection", "in_proj_weight", "in_proj_bias")


def template(config: clip.ClipConfig) -> Any:
    """Our own model's tree of shapes."""
    side = config.vision.image_size
    images = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
    ids = jax.ShapeDtypeStruct((1, 9), jnp.int32)
    made = jax.eval_shape(clip.Clip(config).init, jax.random.key(0), images, ids)
    return partitioning.unbox(made)["params"]


def openai(config: clip.ClipConfig) -> dict[str, np.ndarray]:
    """A state dict as OpenAI's files hold it: half precision but for norms and tables."""
    rng = np.random.default_rng(0)
    tree = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape), template(config))
    blocks = getattr(config.vision, "num_blocks", None)
    named = weights.export_weights(tree, openai_clip_rules(blocks))
    found = {}
    for name, value in named.items():
        words = name.split(".")
        full = any(w.startswith(("ln_", "bn", "downsample")) for w in words) or "embedding" in name
        half = words[-1] in _HALF and not full
        found[name] = np.array(value, np.float16 if half else np.float32, order="C")
        if words[-1] == "running_var":
            found[name.replace("running_var", "num_batches_tracked")] = np.array(7)
    return found | {name: np.array(value) for name, value in SCALARS.items()}


def without_counts(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {
        name: value
        for name, value in tensors.items()
        if name not in SCALARS and not name.endswith("num_batches_tracked")
    }


@pytest.mark.parametrize("config", [VIT, RESNET], ids=["vit", "resnet"])
def test_openais_state_dict_is_told_by_its_shapes_and_comes_back_bit_by_bit(config: Any) -> None:
    tensors = openai(config)
    file = as_tensor_file(tensors)
    family = weights.detect(file)
    assert family.name == "clip_openai"
    found = clip.ClipConfig.from_settings(family.settings(file))
    text = dataclasses.replace(config.text, d_ff=256)
    vision = config.vision
    if config is VIT:
        vision = dataclasses.replace(vision, d_ff=512)
    assert found == clip.ClipConfig(text, vision)
    rules = family.rules(file)
    half = weights.import_tree(file, rules)
    assert_same_bits(weights.export_weights(half, rules), without_counts(tensors))
    full = weights.import_weights(template(found), file, rules)
    assert {leaf.dtype for leaf in jax.tree.leaves(full)} == {np.dtype(np.float32)}
    again = weights.export_weights(full, rules)
    again = {name: value.astype(tensors[name].dtype) for name, value in again.items()}
    assert_same_bits(again, without_counts(tensors))


def test_openai_to_ours_to_hugging_face_and_back_keeps_every_bit(tmp_path: pathlib.Path) -> None:
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    file = as_tensor_file(openai(VIT))
    ours = weights.import_tree(file, weights.detect(file).rules(file), dtype=np.float32)
    exported = weights.export_weights(ours, hf_clip_rules())
    both = {"num_hidden_layers": 1, "projection_dim": 6}
    text = {"hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 1}
    text |= {"vocab_size": 30, "max_position_embeddings": 9, "num_hidden_layers": 2}
    text |= {"eos_token_id": 2, "bos_token_id": 28, "pad_token_id": 1}
    vision = {"hidden_size": 128, "intermediate_size": 512, "num_attention_heads": 2}
    vision |= {"image_size": 8, "patch_size": 4}
    sizes = transformers.CLIPConfig(
        text_config=both | text, vision_config=both | vision, projection_dim=6
    )
    theirs = transformers.CLIPModel(sizes).eval()
    state = {k: torch.tensor(np.array(v, order="C")) for k, v in exported.items()}
    theirs.load_state_dict(state)  # strict: no key is missing or too many
    theirs.save_pretrained(tmp_path)
    saved = weights.read(tmp_path)
    family = weights.detect(saved)
    assert family.name == "clip"
    back = weights.import_tree(saved, family.rules(saved))
    jax.tree.map(np.testing.assert_array_equal, back, ours)
    assert_same_bits(dict(saved), {k: np.array(v, order="C") for k, v in exported.items()})
    model = clip.Clip(clip.ClipConfig.from_settings(family.settings(saved)))
    rng = np.random.default_rng(1)
    images, ids = rng.normal(size=(2, 8, 8, 3)).astype(np.float32), rng.integers(1, 30, (3, 9))
    with torch.no_grad():
        pixels = torch.tensor(np.moveaxis(images, -1, 1).copy())
        expected = theirs(pixel_values=pixels, input_ids=torch.tensor(ids))
    found = model.apply({"params": ours}, images, ids)
    expected = expected.logits_per_image.numpy()
    # Weights of standard deviation 1: rounding grows with them, and exp(logit_scale) scales it.
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-3 * np.abs(expected).max())


def modules_of(torch: Any, state: dict[str, np.ndarray]) -> Any:
    """A module whose state dict is `state`."""

    class Node(torch.nn.Module):
        def forward(self, x):  # noqa: ANN001, ANN202 - as TorchScript reads it
            return x

    root = Node()
    for name, value in state.items():
        *path, last = name.split(".")
        at = root
        for word in path:
            if word not in at._modules:
                at.add_module(word, Node())
            at = at._modules[word]
        tensor = torch.tensor(np.array(value, order="C"))
        if tensor.is_floating_point() and not last.startswith("running"):
            at.register_parameter(last, torch.nn.Parameter(tensor, requires_grad=False))
        else:
            at.register_buffer(last, tensor)
    return root


@pytest.mark.parametrize("config", [VIT, RESNET], ids=["vit", "resnet"])
def test_a_torchscript_archive_gives_the_same_tree(config: Any, tmp_path: pathlib.Path) -> None:
    torch = pytest.importorskip("torch")
    tensors = openai(config)
    traced = torch.jit.trace(modules_of(torch, tensors), torch.zeros(1))
    torch.jit.save(traced, tmp_path / "ViT-B-32.pt")
    file = weights.read(tmp_path / "ViT-B-32.pt")
    family = weights.detect(file)
    assert family.name == "clip_openai"
    found = weights.import_tree(file, family.rules(file), dtype=np.float32)
    plain = as_tensor_file(tensors)
    expected = weights.import_tree(plain, family.rules(plain), dtype=np.float32)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert family.settings(file) == family.settings(plain)


@pytest.mark.parametrize("part", ["text", "vision", "visual", "visual without projection"])
@pytest.mark.parametrize("config", [VIT, RESNET], ids=["vit", "resnet"])
def test_a_tower_alone_is_the_root_of_the_tree(config: Any, part: str) -> None:
    tensors = openai(config)
    whole = weights.import_tree(
        tensors, openai_clip_rules(getattr(config.vision, "num_blocks", None))
    )
    visual = {k: v for k, v in tensors.items() if k.startswith("visual.")}
    if part == "text":
        kept = {k: v for k, v in tensors.items() if k not in visual}
        expected, width = whole["text"], 64
    else:
        kept = (
            visual
            if part == "vision"
            else {k.removeprefix("visual."): v for k, v in visual.items()}
        )
        expected, width = whole["vision"], 128
        if part.endswith("without projection"):
            kept.pop("proj", None)
            expected.pop("projection", None)
    file = as_tensor_file(kept)
    family = weights.detect(file)
    found = weights.import_tree(file, family.rules(file))
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    settings = family.settings(file)
    if "width" not in settings:
        assert settings["d_model"] == width
        assert (settings["projection_dim"] is None) == ("projection" not in expected)


def saved(tensors: dict[str, np.ndarray], folder: pathlib.Path, config: Any = None) -> TensorFile:
    path = folder / "model.safetensors"
    weights.save_safetensors(path, tensors)
    file = weights.read(path)
    file.config = config or {}
    return file


def test_a_text_tower_may_lack_the_prefix_and_hold_position_ids(tmp_path: pathlib.Path) -> None:
    tensors = openai(VIT)
    ours = weights.import_tree(tensors, openai_clip_rules(), dtype=np.float32)["text"]
    del ours["projection"]
    for prefix in ("text_model.", ""):
        named = weights.export_weights(ours, hf_text_rules(prefix))
        named[f"{prefix}embeddings.position_ids"] = np.arange(9)[None]
        file = saved(named, tmp_path, {"model_type": "clip_text_model", "hidden_act": "gelu"})
        family = weights.detect(file)
        assert family.name == "clip"
        found = weights.import_tree(file, family.rules(file))
        jax.tree.map(np.testing.assert_array_equal, found, ours)
        settings = family.settings(file)
        assert (settings["activation"], settings["end_id"]) == ("gelu", None)
        clip.TextConfig(**settings)


def test_models_of_other_formulas_and_cut_files_are_refused(tmp_path: pathlib.Path) -> None:
    ours = weights.import_tree(openai(VIT), openai_clip_rules(), dtype=np.float32)
    named = weights.export_weights(ours, hf_clip_rules())
    file = saved(named, tmp_path, {"model_type": "siglip"})
    with pytest.raises(weights.WeightsError, match="model_type='siglip'"):
        weights.detect(file).rules(file)
    file = saved(named | {"text_model.head.weight": np.zeros(3, np.float32)}, tmp_path)
    with pytest.raises(weights.WeightsError, match="unexpected: text_model.head.weight"):
        weights.import_tree(file, weights.detect(file).rules(file))
    del named["vision_model.encoder.layers.0.mlp.fc2.bias"]
    file = saved(named, tmp_path)
    with pytest.raises(weights.WeightsError, match=r"missing: vision_model.*mlp.fc2.bias"):
        weights.import_tree(file, weights.detect(file).rules(file))
    tensors = openai(RESNET)
    del tensors["visual.layer2.1.bn2.running_mean"]
    file = as_tensor_file(tensors)
    with pytest.raises(weights.WeightsError, match=r"layer2.1.bn2.running_mean"):
        weights.import_tree(file, weights.detect(file).rules(file))
