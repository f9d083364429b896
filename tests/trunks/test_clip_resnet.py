"""CLIP's ResNet: PyTorch's operators in the published order, fixed statistics, flat compile."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodels import weights
from jaxmodels.core import params as param_tree
from jaxmodels.core import partitioning
from jaxmodels.trunks import clip_resnet
from jaxmodels.weights.clip import openai_resnet_rules
from tests.vcc.test_encoder import equations

CONFIG = clip_resnet.ResNetConfig(64, width=4, num_blocks=(1, 3, 2, 1), num_heads=2,
                                  projection_dim=5)  # fmt: skip
IMAGES = np.random.default_rng(0).normal(size=(2, 64, 64, 3)).astype(np.float32)
WIDE = np.random.default_rng(1).normal(size=(1, 32, 96, 3)).astype(np.float32)
quick = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def started(config: clip_resnet.ResNetConfig) -> tuple[clip_resnet.ModifiedResNet, Any]:
    """The model, and parameters under which every part counts; variances are positive."""
    model = clip_resnet.ModifiedResNet(config)
    images = jax.ShapeDtypeStruct((1, *(config.image_size,) * 2, 3), jnp.float32)
    shapes = partitioning.unbox(jax.eval_shape(model.init, jax.random.key(0), images))
    rng = np.random.default_rng(0)

    def draw(path: str, leaf: Any) -> jax.Array:
        if path.endswith(("/scale", "running_var")):
            return jnp.asarray(rng.uniform(0.5, 1.5, leaf.shape), leaf.dtype)
        fan = np.prod(leaf.shape[-4:-1]) if path.endswith("kernel") else 25
        return jnp.asarray(rng.normal(size=leaf.shape) * fan**-0.5, leaf.dtype)

    return model, param_tree.label(shapes, draw)


def in_torch(tensors: dict[str, Any], images: np.ndarray, config: Any) -> list[np.ndarray]:
    """Stem, stages and features from PyTorch's own operators, channels first."""
    import torch
    from torch.nn import functional

    t = {name: torch.tensor(np.asarray(value)) for name, value in tensors.items()}

    def normed(x: Any, conv: str, norm: str, stride: int = 1) -> Any:
        kernel = t[f"{conv}.weight"]
        y = functional.conv2d(x, kernel, stride=stride, padding=kernel.shape[-1] // 2)
        names = ("running_mean", "running_var", "weight", "bias")
        return functional.batch_norm(y, *(t[f"{norm}.{name}"] for name in names), eps=1e-5)

    x = torch.tensor(np.moveaxis(images, -1, 1).copy())
    for n in (1, 2, 3):
        x = torch.relu(normed(x, f"conv{n}", f"bn{n}", 2 if n == 1 else 1))
    maps = [functional.avg_pool2d(x, 2)]
    for stage, depth in enumerate(config.num_blocks, 1):
        x = maps[-1]
        for block in range(depth):
            at, stride = f"layer{stage}.{block}", 2 if stage > 1 and block == 0 else 1
            y = torch.relu(normed(x, f"{at}.conv1", f"{at}.bn1"))
            y = torch.relu(normed(y, f"{at}.conv2", f"{at}.bn2"))
            y = normed(functional.avg_pool2d(y, stride), f"{at}.conv3", f"{at}.bn3")
            if block == 0:
                x = functional.avg_pool2d(x, stride)
                x = normed(x, f"{at}.downsample.0", f"{at}.downsample.1")
            x = torch.relu(x + y)
        maps.append(x)
    tokens = x.flatten(2).permute(2, 0, 1)
    tokens = torch.cat([tokens.mean(0, keepdim=True), tokens])
    tokens = tokens + t["attnpool.positional_embedding"][:, None]
    pool = {name: (t[f"attnpool.{name}_proj.weight"], t[f"attnpool.{name}_proj.bias"])
            for name in "qkvc"}  # fmt: skip
    pooled, _ = functional.multi_head_attention_forward(
        query=tokens[:1], key=tokens, value=tokens, embed_dim_to_check=tokens.shape[-1],
        num_heads=config.num_heads, q_proj_weight=pool["q"][0], k_proj_weight=pool["k"][0],
        v_proj_weight=pool["v"][0], in_proj_weight=None,
        in_proj_bias=torch.cat([pool[name][1] for name in "qkv"]), bias_k=None, bias_v=None,
        add_zero_attn=False, dropout_p=0, out_proj_weight=pool["c"][0],
        out_proj_bias=pool["c"][1], use_separate_proj_weight=True, training=False,
        need_weights=False,
    )  # fmt: skip
    return [one.numpy() for one in (*maps, pooled[0])]


def test_pytorch_gives_the_same_numbers_after_every_stage() -> None:
    pytest.importorskip("torch")
    model, params = started(CONFIG)
    rules = openai_resnet_rules(CONFIG.num_blocks, prefix="")
    expected = in_torch(weights.export_weights(params["params"], rules), IMAGES, CONFIG)
    maps = quick(lambda p, x: model.apply(p, x, method="feature_maps"))(params, IMAGES)
    found = [np.moveaxis(one, -1, 1) for one in maps]
    found.append(quick(model.apply)(params, IMAGES).features)
    for stage, (one, wanted) in enumerate(zip(found, expected, strict=True)):
        assert one.shape == wanted.shape
        assert np.abs(one - wanted).max() < 2e-5 * np.abs(wanted).max(), stage


def test_statistics_get_no_gradient_and_the_label_frozen() -> None:
    model, params = started(CONFIG)
    grads = quick(jax.grad(lambda p: jnp.square(model.apply(p, IMAGES).features).sum()))(params)
    labels = clip_resnet.label_statistics(param_tree.weight_decay_groups(params["params"]))
    labels, frozen = param_tree.flatten(labels), 0
    for path, leaf in param_tree.flatten(grads["params"]).items():
        statistic = clip_resnet.is_statistic(path)
        frozen += statistic
        assert (labels[path] == "frozen") == statistic
        # Softmax does not see what all keys share.
        moved = bool(jnp.abs(leaf).max() > 0)
        assert moved != statistic or path.endswith("key/bias"), path
    # Stem, first blocks with their shortcuts, and the rest of the two stages that have more.
    assert frozen == 2 * (3 + 4 * 4 + 2 * 3)


@pytest.mark.parametrize("policy", ["none", "full"])
def test_program_does_not_grow_with_depth(policy: str) -> None:
    sizes = []
    for depth in (2, 7):
        config = dataclasses.replace(CONFIG, num_blocks=(depth,) * 4, remat=policy)
        model, params = started(config)
        run = jax.grad(lambda p, m=model: m.apply(p, IMAGES).features.sum())
        sizes.append(equations(jax.make_jaxpr(run)(params).jaxpr))
    assert sizes[0] == sizes[1] > 100


def test_a_block_starts_as_its_shortcut() -> None:
    made = clip_resnet.Bottleneck(4).init(jax.random.key(0), jnp.zeros((1, 4, 4, 16)))
    made = partitioning.unbox(made)
    assert not made["params"]["conv3"]["norm"]["scale"].any()
    x = jax.random.normal(jax.random.key(1), (1, 4, 4, 16))
    found = clip_resnet.Bottleneck(4).apply(made, x)
    np.testing.assert_array_equal(found, jnp.maximum(x, 0))
    kernel = made["params"]["conv1"]["kernel"]  # uniform within fan_in^-1/2
    assert 0.2 < float(jnp.abs(kernel).max()) <= 0.25


def test_other_image_sizes_are_refused_unless_asked_for() -> None:
    model, params = started(CONFIG)
    with pytest.raises(ValueError, match="32 x 96 pixels, but the positions are for 64 x 64"):
        model.apply(params, WIDE)
    wide = clip_resnet.ModifiedResNet(dataclasses.replace(CONFIG, interpolate_positions=True))
    found = quick(wide.apply)(params, WIDE)
    assert found.tokens.shape == (1, 1 + 3, 128) and np.isfinite(found.features).all()
    with pytest.raises(ValueError, match="do not divide into patches of 32 x 32"):
        wide.apply(params, WIDE[:, :, :90])


def test_bfloat16_convolutions_stay_near_float32() -> None:
    model, params = started(CONFIG)
    half = clip_resnet.ModifiedResNet(dataclasses.replace(CONFIG, dtype=jnp.bfloat16))
    full, found = (quick(m.apply)(params, IMAGES).features for m in (model, half))
    assert found.dtype == jnp.float32
    assert 1e-4 < float(jnp.abs(found - full).max() / jnp.abs(full).max()) < 0.1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_blocks": (1, 2, 3)}, r"num_blocks=\(1, 2, 3\): give 4 numbers"),
        ({"num_blocks": (1, 2, 0, 1)}, "each 1 or more"),
        ({"image_size": 40}, "image_size=40.*multiple of 32"),
        ({"width": 3}, "width=3.*even"),
        ({"num_heads": 3}, r"num_heads=3 does not divide 32 \* model.width = 128"),
        ({"projection_dim": 0}, "projection_dim=0"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(CONFIG, **change)
