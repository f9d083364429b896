"""A published video model as hooks on Swin: its numbers, through a stem of its own.

Every layer has adapters at both sub-layers; layers that do not shift attend over time before that,
with the weights of their window attention and a bias by difference in time.
"""

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from jaxmodels import weights
from jaxmodels.core import hooks, layers
from jaxmodels.trunks import swin
from jaxmodels.weights.swin import official_swin_rules
from tests.parity.fixtures import Case, read_case
from tests.trunks.hook_cases import Norm

FRAMES = 4  # two taps a token, eight frames


class Adapter(nn.Module):
    """up(gelu(down(x))), a quarter as wide inside."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        inner = layers.Dense(x.shape[-1] // 4, ("embed", None), name="down")(x)
        return layers.Dense(x.shape[-1], (None, "embed"), name="up")(
            layers.activation("gelu")(inner)
        )


class Video(hooks.Hooks):
    """Adapters; and attention over time where `temporal`."""

    heads: int
    temporal: bool

    def setup(self) -> None:
        self.space, self.joint = Adapter(), Adapter()
        if self.temporal:
            self.time = Adapter()
            shape = (2 * FRAMES - 1, self.heads)
            self.time_bias = self.param("time_bias", nn.initializers.zeros, shape)

    def enter(self, layer: Any, x: jax.Array) -> jax.Array:
        if not self.temporal:
            return x
        frames = 1 if self.is_initializing() else FRAMES
        _, places, d = x.shape
        z = layer.normalize("attention", x).reshape(-1, frames, places, d)
        z = z.swapaxes(1, 2).reshape(-1, frames, d)  # a sequence in time for each place
        time = np.arange(frames)
        bias = self.time_bias[time[:, None] - time[None, :] + FRAMES - 1]
        z = layer.attention(z, bias.transpose(2, 0, 1)[None])
        z = z.reshape(-1, places, frames, d).swapaxes(1, 2).reshape(-1, places, d)
        return x + self.time(z)

    def residual(self, site: str, x: jax.Array, y: jax.Array, norm: Norm) -> jax.Array:
        if site == "attention":
            return x + y + self.space(y)
        return x + y + 0.5 * self.joint(norm(x))


@pytest.fixture(scope="module")
def case(parity: pathlib.Path) -> Case:
    path = parity / "aim" / "model_swin.npz"
    if not path.is_file():
        pytest.skip(f"no references at {path}")
    return read_case(path)


def adapter(case: Case, block: str, name: str) -> dict[str, Any]:
    made = {}
    for ours, theirs in (("down", "D_fc1"), ("up", "D_fc2")):
        root = f"{block}.{name}.{theirs}"
        kernel, bias = case.params[f"{root}.weight"].T, case.params[f"{root}.bias"]
        made[ours] = {"kernel": kernel[None], "bias": bias[None]}
    return made


def parameters(case: Case) -> dict[str, Any]:
    added = ("Adapter", "temporal", "patch_embed", "cls_head")
    own = {k.removeprefix("backbone."): v for k, v in case.params.items()
           if not any(word in k for word in added)}  # fmt: skip
    rules = [r for r in official_swin_rules(2) if "patch_embed" not in getattr(r, "source", "")]
    params = weights.import_tree(own, rules)
    for stage in (0, 1):
        for index in (0, 1):
            block = f"backbone.layers.{stage}.blocks.{index}"
            made: dict[str, Any] = {
                "space": adapter(case, block, "S_Adapter2"),
                "joint": adapter(case, block, "S_Adapter"),
            }
            if index == 0:
                made["time"] = adapter(case, block, "T_Adapter")
                bias = case.params[f"{block}.attn.temporal_position_bias_table"]
                made["time_bias"] = bias[None]
            params[f"stages_{stage}"][f"hooks_{index}"] = made
    return params


def tokens(case: Case) -> jax.Array:
    """The stem: a projection of 2 x 16 x 16 pixels, a norm; [clips * times, rows, columns, d]."""
    video = case.inputs["video_lowres_uint8"].repeat(4, axis=3).repeat(4, axis=4)
    video = (video.astype(np.float32) - 128) / 64
    batch, channels = video.shape[:2]
    cut = video.reshape(batch, channels, FRAMES, 2, 14, 16, 14, 16).transpose(
        0, 2, 4, 6, 1, 3, 5, 7
    )
    p = {k: case.params[f"backbone.patch_embed.{k}"] for k in
         ("proj.weight", "proj.bias", "norm.weight", "norm.bias")}  # fmt: skip
    x = cut.reshape(batch * FRAMES, 14, 14, -1) @ p["proj.weight"].reshape(12, -1).T
    x = x + p["proj.bias"]
    x = x - x.mean(-1, keepdims=True)
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5)
    return jnp.asarray(x * p["norm.weight"] + p["norm.bias"], jnp.float32)


def test_hooks_and_another_stem_give_the_numbers_of_the_released_video_model(case: Case) -> None:
    # A stage is a group of its own: its heads differ.
    groups = tuple(
        hooks.LayerHooks(Video(heads, index == 0), 2 * stage + index, 2 * stage + index + 1)
        for stage, heads in enumerate((2, 4))
        for index in (0, 1)
    )
    config = swin.SwinConfig(
        d_model=12, depths=(2, 2), num_heads=(2, 4), windows=(7, 7), layer_hooks=groups
    )
    model = swin.SwinModel(config)

    @jax.jit
    def run(params: Any, x: jax.Array) -> Any:
        return model.apply({"params": params}, x, method="encode", mutable=["intermediates"])

    found, kept = run(parameters(case), tokens(case))
    hidden = kept["intermediates"]["stages_1"]["hidden"]
    features = found.reshape(2, FRAMES, 7, 7, 24).transpose(0, 4, 1, 2, 3)
    head = case.params["cls_head.fc_cls.weight"], case.params["cls_head.fc_cls.bias"]
    logits = np.asarray(features.mean((2, 3, 4))) @ head[0].T + head[1]
    wanted = (("stage0", hidden[0]), ("stage1", hidden[-1]), ("features", features))
    for name, ours in (*wanted, ("logits", logits)):
        reference = case.expected[f"outputs/{name}"]
        np.testing.assert_allclose(ours, reference, rtol=3e-5, atol=3e-5, err_msg=name)
