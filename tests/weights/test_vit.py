"""ViT's tables: timm's, Hugging Face's and the original files give one tree, and come back."""

import dataclasses
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodels import weights
from jaxmodels.core import partitioning
from jaxmodels.trunks import vit
from jaxmodels.weights.tensor_file import as_tensor_file
from tests.weights.test_layouts import assert_same_bits

CONFIG = vit.VitConfig(image_size=8, patch_size=4, d_model=128, num_layers=2, num_heads=2, d_ff=20)
D, N, H = 128, 5, 2
TREES = {
    "trunk": (CONFIG, None),
    "pooler": (dataclasses.replace(CONFIG, pooler=True), None),
    "head": (CONFIG, 3),
    "pooler and head": (dataclasses.replace(CONFIG, pooler=True), 3),
}


def timm(config: vit.VitConfig, classes: int | None, rng: Any) -> dict[str, np.ndarray]:
    shapes: dict[str, tuple[int, ...]] = {"cls_token": (1, 1, D), "pos_embed": (1, N, D)}
    shapes |= {"patch_embed.proj.weight": (D, 3, 4, 4), "patch_embed.proj.bias": (D,)}
    linear = {"attn.qkv": (3 * D, D), "attn.proj": (D, D), "mlp.fc1": (20, D), "mlp.fc2": (D, 20)}
    outer = {"norm": (D,)} | ({"head": (classes, D)} if classes else {})
    outer |= {"pre_logits.fc": (D, D)} if config.pooler else {}
    modules = outer | {
        f"blocks.{i}.{name}": shape
        for i in range(2)
        for name, shape in (linear | {"norm1": (D,), "norm2": (D,)}).items()
    }
    for name, shape in modules.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return {k: rng.normal(size=v).astype(np.float32) for k, v in shapes.items()}


def hugging_face(config: vit.VitConfig, classes: int | None, rng: Any) -> dict[str, np.ndarray]:
    at = "vit." if classes else ""
    shapes = {f"{at}embeddings.cls_token": (1, 1, D)}
    shapes[f"{at}embeddings.position_embeddings"] = (1, N, D)
    modules = {f"{at}embeddings.patch_embeddings.projection": (D, 3, 4, 4), f"{at}layernorm": (D,)}
    inner = {f"attention.attention.{name}": (D, D) for name in ("query", "key", "value")}
    inner |= {"attention.output.dense": (D, D), "intermediate.dense": (20, D)}
    inner |= {"output.dense": (D, 20), "layernorm_before": (D,), "layernorm_after": (D,)}
    for i in range(2):
        modules |= {f"{at}encoder.layer.{i}.{name}": shape for name, shape in inner.items()}
    modules |= {f"{at}pooler.dense": (D, D)} if config.pooler else {}
    modules |= {"classifier": (classes, D)} if classes else {}
    for name, shape in modules.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return {k: rng.normal(size=v).astype(np.float32) for k, v in shapes.items()}


def original(config: vit.VitConfig, classes: int | None, rng: Any) -> dict[str, np.ndarray]:
    shapes: dict[str, tuple[int, ...]] = {"cls": (1, 1, D)}
    shapes["Transformer/posembed_input/pos_embedding"] = (1, N, D)
    modules: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
        "embedding": ((4, 4, 3, D), (D,))
    }
    norms = ["Transformer/encoder_norm"]
    for i in range(2):
        block = f"Transformer/encoderblock_{i}"
        heads = f"{block}/MultiHeadDotProductAttention_1"
        for name in ("query", "key", "value"):
            modules[f"{heads}/{name}"] = ((D, H, D // H), (H, D // H))
        modules[f"{heads}/out"] = ((H, D // H, D), (D,))
        modules[f"{block}/MlpBlock_3/Dense_0"] = ((D, 20), (20,))
        modules[f"{block}/MlpBlock_3/Dense_1"] = ((20, D), (D,))
        norms += [f"{block}/LayerNorm_0", f"{block}/LayerNorm_2"]
    if config.pooler:
        modules["pre_logits"] = ((D, D), (D,))
    if classes:
        modules["head"] = ((D, classes), (classes,))
    for name, (kernel, bias) in modules.items():
        shapes |= {f"{name}/kernel": kernel, f"{name}/bias": bias}
    shapes |= {f"{name}/{leaf}": (D,) for name in norms for leaf in ("scale", "bias")}
    return {k: rng.normal(size=v).astype(np.float32) for k, v in shapes.items()}


LAYOUTS = {"vit_timm": timm, "vit": hugging_face, "vit_flax": original}


@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_gives_our_models_tree_and_comes_back_bit_by_bit(layout: str, tree: str) -> None:
    config, classes = TREES[tree]
    tensors = LAYOUTS[layout](config, classes, np.random.default_rng(0))
    file = as_tensor_file(tensors)
    family = weights.detect(file)
    assert family.name == layout
    settings = family.settings(file)
    eps = 1e-12 if layout == "vit" else 1e-6
    assert vit.VitConfig(**settings) == dataclasses.replace(config, norm_eps=eps)
    rules = family.rules(file)
    params = weights.import_tree(file, rules)
    assert_same_bits(weights.export_weights(params, rules), tensors)
    model = vit.VitClassifier(config, classes) if classes else vit.VitModel(config)
    images = jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32)
    wanted = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
    wanted = jax.tree.map(lambda leaf: leaf.shape, partitioning.unbox(wanted))
    assert jax.tree.map(lambda leaf: leaf.shape, params) == wanted
    if classes:  # the trunk alone, from the same file
        trunk = weights.import_weights({"trunk": params["trunk"]}, file, rules)
        jax.tree.map(np.testing.assert_array_equal, trunk["trunk"], params["trunk"])


@pytest.mark.parametrize("tree", TREES)
def test_all_layouts_of_the_same_weights_give_the_same_tree(tree: str) -> None:
    config, classes = TREES[tree]
    t = timm(config, classes, np.random.default_rng(0))
    expected = import_all(t)
    theirs = {k: np.empty(v.shape) for k, v in original(config, classes, np.random).items()}
    for name in list(theirs):
        theirs[name] = t[timm_name(name)]
        if "query" in name or "key" in name or "value" in name:
            part = ("query", "key", "value").index(name.split("/")[-2])
            theirs[name] = np.split(theirs[name], 3)[part]
        if name.endswith("kernel"):
            four = theirs[name].ndim == 4
            theirs[name] = theirs[name].transpose(2, 3, 1, 0) if four else theirs[name].T
        if "MultiHead" in name and not name.endswith("out/bias"):
            axis = (H, D // H)
            wide = {"out/kernel": (*axis, D)}.get("/".join(name.split("/")[-2:]))
            kernel = name.endswith("kernel")
            theirs[name] = theirs[name].reshape(wide or ((D, *axis) if kernel else axis))
    jax.tree.map(np.testing.assert_array_equal, import_all(theirs), expected)
    with_prefix = {f"opt/target/{name}": value for name, value in theirs.items()}
    jax.tree.map(np.testing.assert_array_equal, import_all(with_prefix), expected)


def import_all(tensors: dict[str, np.ndarray]) -> Any:
    file = as_tensor_file(tensors)
    return weights.import_tree(file, weights.detect(file).rules(file))


def timm_name(name: str) -> str:
    """timm's key of a tensor of the original files."""
    names = {
        "Transformer/posembed_input/pos_embedding": "pos_embed", "cls": "cls_token",
        "Transformer/encoderblock_": "blocks.", "Transformer/encoder_norm": "norm",
        "embedding/": "patch_embed.proj/", "MultiHeadDotProductAttention_1/out": "attn.proj",
        "MultiHeadDotProductAttention_1/query": "attn.qkv",
        "MultiHeadDotProductAttention_1/key": "attn.qkv",
        "MultiHeadDotProductAttention_1/value": "attn.qkv", "LayerNorm_0": "norm1",
        "LayerNorm_2": "norm2", "MlpBlock_3/Dense_0": "mlp.fc1", "MlpBlock_3/Dense_1": "mlp.fc2",
        "pre_logits": "pre_logits.fc", "kernel": "weight", "scale": "weight", "/": ".",
    }  # fmt: skip
    for theirs, ours in names.items():
        name = name.replace(theirs, ours)
    return name


def test_an_npz_file_of_the_original_weights_is_read(tmp_path: pathlib.Path) -> None:
    tensors = original(CONFIG, 3, np.random.default_rng(0))
    np.savez(tmp_path / "ViT-B_16.npz", **tensors)
    file = weights.read(tmp_path / "ViT-B_16.npz")
    found = weights.import_tree(file, weights.detect(file).rules(file))
    jax.tree.map(np.testing.assert_array_equal, found, import_all(tensors))


def test_without_biases_at_queries_keys_and_values_the_tree_has_none() -> None:
    for layout, word in (("vit_timm", "attn.qkv.bias"), ("vit", "attention.attention.")):
        tensors = LAYOUTS[layout](CONFIG, None, np.random.default_rng(0))
        dropped = [k for k in tensors if word in k and k.endswith("bias")]
        file = as_tensor_file({k: v for k, v in tensors.items() if k not in dropped})
        family = weights.detect(file)
        assert family.settings(file)["qkv_bias"] is False
        attention = weights.import_tree(file, family.rules(file))["encoder"]["layers"]["attention"]
        assert attention["query"].keys() == {"kernel"} and "bias" in attention["out"]


def test_what_our_formula_lacks_is_refused_by_name() -> None:
    tensors = timm(CONFIG, 3, np.random.default_rng(0))
    for key in ("dist_token", "blocks.0.ls1.gamma", "fc_norm.weight"):
        with pytest.raises(weights.WeightsError, match=f"unexpected: {key}"):
            import_all(tensors | {key: np.zeros(D, np.float32)})
    file = as_tensor_file(hugging_face(CONFIG, None, np.random.default_rng(0)))
    file.config = {"model_type": "vit_msn"}
    with pytest.raises(weights.WeightsError, match="model_type='vit_msn'"):
        weights.detect(file).rules(file)
