"""Swin's tables: official and Hugging Face files give one tree, and are written back bit by bit."""

import dataclasses
import pathlib

import jax
import numpy as np
import pytest

from jaxmodels import weights
from jaxmodels.core import partitioning
from jaxmodels.trunks import swin
from jaxmodels.weights.tensor_file import TensorFile

CONFIG = swin.SwinConfig(
    d_model=8, depths=(1, 3, 2), num_heads=(2, 4, 8), windows=(4, 3, 2), patch_size=2,
    num_channels=4, mlp_ratio=2.0,
)  # fmt: skip
RNG = np.random.default_rng(0)


def official(prefix: str = "", head: bool = True, qkv_bias: bool = True) -> dict[str, np.ndarray]:
    """A file as microsoft/Swin-Transformer saves it: keys and shapes of its modules."""
    shapes: dict[str, tuple[int, ...]] = {"patch_embed.proj.weight": (8, 4, 2, 2)}
    shapes |= {"patch_embed.proj.bias": (8,)}

    def norm(name: str, d: int) -> None:
        shapes.update({f"{name}.weight": (d,), f"{name}.bias": (d,)})

    def linear(name: str, out: int, d: int, bias: bool = True) -> None:
        shapes.update({f"{name}.weight": (out, d)} | ({f"{name}.bias": (out,)} if bias else {}))

    norm("patch_embed.norm", 8)
    for s, (depth, heads, window) in enumerate(
        zip(CONFIG.depths, CONFIG.num_heads, CONFIG.windows, strict=True)
    ):
        d = 8 * 2**s
        for j in range(depth):
            block = f"layers.{s}.blocks.{j}"
            for name in ("norm1", "norm2"):
                norm(f"{block}.{name}", d)
            linear(f"{block}.attn.qkv", 3 * d, d, qkv_bias)
            linear(f"{block}.attn.proj", d, d)
            linear(f"{block}.mlp.fc1", 2 * d, d)
            linear(f"{block}.mlp.fc2", d, 2 * d)
            table = f"{block}.attn.relative_position_bias_table"
            shapes[table] = ((2 * window - 1) ** 2, heads)
            shapes[f"{block}.attn.relative_position_index"] = (window**2, window**2)
            if j % 2:
                shapes[f"{block}.attn_mask"] = (4, window**2, window**2)
        if s < 2:
            norm(f"layers.{s}.downsample.norm", 4 * d)
            linear(f"layers.{s}.downsample.reduction", 2 * d, 4 * d, bias=False)
    norm("norm", 32)
    if head:
        linear("head", 5, 32)
    return {prefix + k: RNG.normal(size=v).astype(np.float32) for k, v in shapes.items()}


def saved(tensors: dict[str, np.ndarray], folder: pathlib.Path) -> TensorFile:
    weights.save_safetensors(folder / "model.safetensors", tensors)
    return weights.read(folder / "model.safetensors")


def shapes_of(model: object) -> dict:
    images = jax.ShapeDtypeStruct((1, 8, 8, 4), np.float32)
    boxed = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
    return jax.tree.map(lambda leaf: leaf.shape, partitioning.unbox(boxed))


@pytest.mark.parametrize(
    ("prefix", "head", "qkv_bias"),
    [("", True, True), ("model.", True, True), ("", False, True), ("", False, False)],
)
def test_an_official_file_is_read_and_written_back(
    prefix: str, head: bool, qkv_bias: bool, tmp_path: pathlib.Path
) -> None:
    tensors = official(prefix, head, qkv_bias)
    file = saved(tensors, tmp_path)
    family = weights.detect(file)
    assert family.name == "swin_official"
    config = swin.SwinConfig(**family.settings(file))
    assert config == dataclasses.replace(CONFIG, qkv_bias=qkv_bias)
    rules = family.rules(file)
    params = weights.import_tree(file, rules)
    model = swin.SwinClassifier(config, 5) if head else swin.SwinModel(config)
    assert jax.tree.map(np.shape, params) == shapes_of(model)
    trunk = params["trunk"] if head else params
    block = trunk["stages_1"]["layers"]
    qkv = tensors[f"{prefix}layers.1.blocks.2.attn.qkv.weight"]
    np.testing.assert_array_equal(block["attention"]["key"]["kernel"][2], qkv[16:32].T)
    patch = tensors[f"{prefix}patch_embed.proj.weight"]
    kernel = trunk["embeddings"]["patch"]["kernel"]
    np.testing.assert_array_equal(kernel, patch.transpose(2, 3, 1, 0))
    back = weights.export_weights(params, rules)
    buffers = {k for k in tensors if k.endswith(("relative_position_index", "attn_mask"))}
    assert set(back) == set(tensors) - buffers
    for key, value in back.items():
        np.testing.assert_array_equal(value, tensors[key], err_msg=key)


def test_both_layouts_of_one_model_give_one_tree(tmp_path: pathlib.Path) -> None:
    """Hugging Face's names for the official tensors, as its conversion of them says."""
    tensors, theirs = official(), {}
    renamed = {
        "patch_embed.proj": "swin.embeddings.patch_embeddings.projection",
        "patch_embed.norm": "swin.embeddings.norm",
        "attn.proj": "attention.output.dense",
        "attn.relative": "attention.self.relative",
        "mlp.fc1": "intermediate.dense",
        "mlp.fc2": "output.dense",
        "norm1": "layernorm_before",
        "norm2": "layernorm_after",
        "layers.": "swin.encoder.layers.",
    }
    for key, value in tensors.items():
        if "attn.qkv" in key:
            parts = np.split(value, 3)
            for name, part in zip(("query", "key", "value"), parts, strict=True):
                new = key.replace("attn.qkv", f"attention.self.{name}")
                theirs[new.replace("layers.", "swin.encoder.layers.", 1)] = part
            continue
        if key.endswith("attn_mask"):
            continue
        if key.startswith(("norm.", "head.")):
            key = key.replace("norm.", "swin.layernorm.").replace("head.", "classifier.")
        for old, new in renamed.items():
            key = key.replace(old, new, 1)
        theirs[key] = value
    trees = []
    for name, given in (("swin_official", tensors), ("swin_hf", theirs)):
        folder = tmp_path / name
        folder.mkdir()
        file = saved(given, folder)
        family = weights.detect(file)
        assert family.name == name and swin.SwinConfig(**family.settings(file)) == CONFIG
        rules = family.rules(file)
        trees.append(weights.import_tree(file, rules))
        for key, value in weights.export_weights(trees[-1], rules).items():
            np.testing.assert_array_equal(value, given[key], err_msg=key)
    jax.tree.map(np.testing.assert_array_equal, *trees)


def test_a_file_that_lacks_a_tensor_is_refused_by_its_name(tmp_path: pathlib.Path) -> None:
    tensors = official()
    del tensors["layers.1.blocks.2.mlp.fc2.bias"]
    file = saved(tensors, tmp_path)
    with pytest.raises(weights.WeightsError, match=r"layers.1.blocks.2.mlp.fc2.bias"):
        weights.import_tree(file, weights.detect(file).rules(file))
