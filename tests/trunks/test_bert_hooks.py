"""Hooks on BERT against weights and inputs changed by hand; groups of layers that have them."""

import dataclasses
import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodels.core import hooks
from jaxmodels.trunks import bert
from tests.core import peft_hooks
from tests.core.test_blocks import attend, feed_forward, norm
from tests.trunks.hook_cases import Prefix
from tests.vcc import small

CONFIG = small.trunk(norm_order="post", position_offset=0)  # 3 layers, d_model 16, 2 heads
IDS = jax.random.randint(jax.random.key(0), (2, 9), 5, 50)
MASK = jnp.asarray([[1] * 9, [1] * 6 + [0] * 3])
Group = hooks.LayerHooks


def hooked(*groups: hooks.LayerHooks) -> tuple[bert.BertModel, Any]:
    model = bert.BertModel(dataclasses.replace(CONFIG, layer_hooks=groups))
    return model, small.drawn(model.init, IDS, size=0.2, spread=True)["params"]


@functools.cache
def base() -> Any:
    return hooked()[1]


def with_hooks(params: Any) -> Any:
    """The parameters of `base` and the hooks of `params`."""
    own = {k: v for k, v in params["encoder"].items() if k.startswith("hooks_")}
    return base() | {"encoder": base()["encoder"] | own}


def run(model: bert.BertModel, params: Any) -> jax.Array:
    return jax.jit(model.apply)({"params": params}, IDS, MASK)


def with_layers(**changes: Any) -> Any:
    """The parameters of `base` with leaves of its layers changed, by "site.leaf"."""
    layers = jax.tree.map(lambda leaf: leaf, base()["encoder"]["layers"])
    for path, change in changes.items():
        *modules, leaf = path.split(".")
        module = functools.reduce(dict.__getitem__, modules, layers)
        module[leaf] = change(module[leaf])
    return base() | {"encoder": base()["encoder"] | {"layers": layers}}


def test_lora_on_some_layers_equals_changed_weights() -> None:
    lora = peft_hooks.Lora(("attention.query", "ffn.wo"), rank=2, scale=2.0)
    model, params = hooked(Group(lora, 1))
    made = params["encoder"]["hooks_1"]
    changes = {}
    for site in lora.sites:
        delta = 2.0 * made[f"{site}_a"] @ made[f"{site}_b"]
        assert delta.shape[0] == 2  # of layers 1 and 2
        changes[f"{site}.kernel"] = lambda kernel, delta=delta: kernel.at[1:].add(delta)
    expected = run(bert.BertModel(CONFIG), with_layers(**changes))
    chex.assert_trees_all_close(run(model, with_hooks(params)), expected, atol=2e-5)
    assert float(jnp.abs(expected - run(bert.BertModel(CONFIG), base())).max()) > 0.1


def test_bitfit_equals_changed_biases_of_projections_and_norms() -> None:
    model, params = hooked(Group(peft_hooks.BitFit()))
    made = params["encoder"]["hooks_0"]
    sites = [f"attention.{n}" for n in ("query", "key", "value", "out")]
    sites += ["ffn.wi", "ffn.wo", "attention_norm", "ffn_norm"]
    assert set(made) == set(sites)
    changes = {f"{site}.bias": lambda b, site=site: b + made[site] for site in sites}
    expected = run(bert.BertModel(CONFIG), with_layers(**changes))
    chex.assert_trees_all_close(run(model, with_hooks(params)), expected, atol=2e-5)


def test_pfeiffer_adapter_is_its_formula() -> None:
    """out = norm(s + r + u(norm(s + r))) behind the feed-forward: one norm, used twice."""
    model, params = hooked(Group(peft_hooks.Pfeiffer(3)))
    found = run(model, with_hooks(params))
    p: Any = jax.tree.map(lambda a: np.asarray(a, np.float64), with_hooks(params))
    tables = p["embeddings"]
    x = tables["word"]["embedding"][IDS] + tables["position"]["embedding"][:9]
    x = norm(x + tables["token_type"]["embedding"][0], tables["norm"])
    for i in range(3):
        one, own = (
            jax.tree.map(lambda leaf, i=i: leaf[i], p["encoder"][k]) for k in ("layers", "hooks_0")
        )
        x = norm(x + attend(x, one["attention"], np.asarray(MASK), 2), one["attention_norm"])
        total = x + feed_forward(x, one["ffn"])
        middle = norm(total, one["ffn_norm"])
        inner = np.maximum(middle @ own["ffn_down"]["kernel"] + own["ffn_down"]["bias"], 0)
        adapter = inner @ own["ffn_up"]["kernel"] + own["ffn_up"]["bias"]
        x = norm(total + adapter, one["ffn_norm"])
    np.testing.assert_allclose(found, x, atol=2e-5)


def test_prefix_is_read_by_every_token_beside_the_mask() -> None:
    """A prefix of what the key and value biases give equals tokens of zeros in front, one layer."""
    layer = CONFIG.make_layer()
    params = jax.tree.map(lambda leaf: leaf[0], base()["encoder"]["layers"])
    x = jax.random.normal(jax.random.key(1), (2, 9, 16))
    own = [jnp.tile(params["attention"][n]["bias"].reshape(2, 8), (3, 1, 1)) for n in
           ("key", "value")]  # fmt: skip
    bias = (-1e9 * (1 - MASK))[:, None, None, :]
    prefixed = CONFIG.make_layer(hooks=Prefix(3))
    variables = {"params": params | {"hooks": {"attention": jnp.stack(own)}}}
    found = jax.jit(prefixed.apply)(variables, x, bias)
    longer = jnp.pad(x, ((0, 0), (3, 0), (0, 0)))
    wider = jnp.pad(bias, ((0, 0), (0, 0), (0, 0), (3, 0)))
    expected = jax.jit(layer.apply)({"params": params}, longer, wider)[:, 3:]
    chex.assert_trees_all_close(found, expected, atol=2e-5)
    plain = jax.jit(layer.apply)({"params": params}, x, bias)
    assert float(jnp.abs(found - plain).max()) > 0.05


def test_hooks_without_parameters_run_on_published_ones() -> None:
    model, params = hooked(
        Group(hooks.Hooks()),
    )
    assert params["encoder"].get("hooks_0", {}) == {}
    chex.assert_trees_all_equal(run(model, base()), run(bert.BertModel(CONFIG), base()))


def test_missing_parameters_of_hooks_are_named() -> None:
    model, _ = hooked(Group(peft_hooks.Ia3()))
    with pytest.raises(Exception, match="attention.key|hooks"):
        model.apply({"params": base()}, IDS, MASK)


def test_chain_is_one_hook_behind_the_other() -> None:
    lora, scale = peft_hooks.Lora(("attention.key",), 2), peft_hooks.Ia3(("attention.key",))
    model, params = hooked(Group(hooks.Chain((lora, scale))))
    made = params["encoder"]["hooks_0"]
    (a,), (b,) = ([v for k, v in made.items() if k.endswith(str(i))] for i in (0, 1))
    delta, factor = a["attention.key_a"] @ a["attention.key_b"], b["attention.key"]
    changes = {
        "attention.key.kernel": lambda kernel: (kernel + delta) * factor[:, None],
        "attention.key.bias": lambda bias: bias * factor,
    }
    expected = run(bert.BertModel(CONFIG), with_layers(**changes))
    chex.assert_trees_all_close(run(model, with_hooks(params)), expected, atol=2e-5)


def test_gradients_reach_only_hooks_when_only_they_are_asked_for() -> None:
    model, params = hooked(Group(peft_hooks.Houlsby(3), 0, 1), Group(peft_hooks.Ia3(), 1))

    def loss(own: Any) -> jax.Array:
        encoder = base()["encoder"] | own
        variables = {"params": base() | {"encoder": encoder}}
        return jnp.sin(3 * model.apply(variables, IDS, MASK)).sum()

    own = {k: params["encoder"][k] for k in ("hooks_0", "hooks_1")}
    for leaf in jax.tree.leaves(jax.jit(jax.grad(loss))(own)):
        assert float(jnp.abs(leaf).max()) > 1e-4


def test_every_second_layer_may_have_hooks() -> None:
    first, second = Group(peft_hooks.Ia3(), 0, step=2), Group(peft_hooks.Ia3(), 1, 2)
    assert [(a, b) for a, b, _ in hooks.groups((first,), 3)] == [(0, 1), (1, 2), (2, 3)]
    assert hooks.owners((second, first), 3) == [1, 0, 1]
    _, params = hooked(first)
    names = {k for k in params["encoder"] if k.startswith("hooks")}
    assert names == {"hooks_0", "hooks_2"}


@pytest.mark.parametrize(
    ("groups", "words"),
    [
        ([Group(hooks.Hooks(), 2, 5)], "hooks of layers 2..4.*layers 0..2"),
        ([Group(hooks.Hooks(), -1)], "hooks of layers -1..2"),
        ([Group(hooks.Hooks(), 1, 1)], "choose 0 <= start < stop <= 3"),
        ([Group(hooks.Hooks(), step=0)], "step 0"),
        ([Group(hooks.Hooks(), 0, 2), Group(hooks.Hooks(), 1)], "two hooks for layer 1"),
        ([Group(hooks.Hooks(), step=2), Group(hooks.Hooks(), 2)], "two hooks for layer 2"),
    ],
)
def test_groups_outside_the_stack_or_over_each_other_are_refused(
    groups: list[hooks.LayerHooks], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        hooked(*groups)
