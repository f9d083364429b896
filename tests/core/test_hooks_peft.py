"""One mechanism carries the published methods: hooks give the numbers of a released implementation.

The file of references holds one small RoBERTa with eleven adapters, run by that implementation.
"""

import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodels import weights
from jaxmodels.core import hooks, partitioning
from jaxmodels.trunks import bert
from tests.core import peft_hooks
from tests.core.peft_hooks import SITES
from tests.parity.fixtures import Case, read_case

LAYERS, HEADS, LENGTH, ADAPTER, RANK = 4, 3, 5, 6, 4
QV = ("attention.query", "attention.value")
Tree = dict[str, Any]


@pytest.fixture(scope="module")
def case(parity: pathlib.Path) -> Case:
    path = parity / "peft_design_spaces" / "roberta_modules.npz"
    if not path.is_file():
        pytest.skip(f"no references at {path}")
    return read_case(path)


def stacked(case: Case, name: str, start: int = 0) -> np.ndarray:
    """Arrays of `name` in a layer, of all layers from `start` on."""
    key = "roberta.encoder.layer.{}." + name
    return np.stack([case.params[key.format(i)] for i in range(start, LAYERS)])


def dense(case: Case, name: str, start: int = 0) -> Tree:
    kernel = stacked(case, f"{name}.weight", start).swapaxes(1, 2)
    return {"kernel": kernel, "bias": stacked(case, f"{name}.bias", start)}


def adapter(case: Case, name: str, site: str = "ffn", start: int = 0) -> Tree:
    module = {"ffn": "output", "attention": "attention.output"}[site]
    parts = (("down", "adapter_down.0"), ("up", "adapter_up"))
    return {
        f"{site}_{ours}": dense(case, f"{module}.adapters.{name}.{theirs}", start)
        for ours, theirs in parts
    }


def lora(case: Case, name: str, sites: tuple[str, ...]) -> Tree:
    made = {}
    for site in sites:
        for ours, theirs in (("a", "lora_A"), ("b", "lora_B")):
            leaf = stacked(case, f"{SITES[site]}.loras.{name}.{theirs}")
            made[f"{site}_{ours}"] = leaf.swapaxes(1, 2)
    return made


def prefix(case: Case, name: str) -> Tree:
    """Keys and values of each layer, [layers, 2, length, heads, width], from the flat vector."""
    root = f"roberta.prefix_tuning.prefix_tunings.{name}.self_prefix"
    if f"{root}.control_trans" in case.params:
        flat = case.params[f"{root}.control_trans"]
    else:
        p = {k: case.params[f"{root}.{k}"] for k in ("wte.weight", "control_trans.0.weight",
             "control_trans.0.bias", "control_trans.2.weight", "control_trans.2.bias")}  # fmt: skip
        inner = np.tanh(p["wte.weight"] @ p["control_trans.0.weight"].T + p["control_trans.0.bias"])
        flat = inner @ p["control_trans.2.weight"].T + p["control_trans.2.bias"]
    flat = flat.reshape(LENGTH, LAYERS, 2, HEADS, -1)
    return {"attention": flat.transpose(1, 2, 0, 3, 4)}


def union(case: Case) -> Tree:
    name = "unipelt"
    gates = {
        "gates_attention.query": "attention.self.query.loras.unipelt.gate",
        "gates_attention.value": "attention.self.value.loras.unipelt.gate",
        "gates_prefix": "attention.self.prefix_tuning.prefix_gates.unipelt",
        "gates_ffn": "output.adapters.unipelt.gate",
    }
    both = adapter(case, name)
    return {
        "prefix": prefix(case, name),
        "adapter": {"down": both["ffn_down"], "up": both["ffn_up"]},
        **{f"lora_{site}": lora(case, name, (site,)) for site in QV},
        **{ours: dense(case, theirs) for ours, theirs in gates.items()},
    }


def fixed_scale(case: Case, name: str) -> Tree:
    return adapter(case, name) | {"scale": np.full((LAYERS, 1), 4.0, np.float32)}


def learned_scale(case: Case, name: str) -> Tree:
    return adapter(case, name) | {"scale": stacked(case, f"output.adapters.{name}.scaling")}


def ia3(case: Case, name: str) -> Tree:
    sites = peft_hooks.Ia3().sites
    return {s: stacked(case, f"{SITES[s]}.loras.{name}.lora_B")[..., 0] for s in sites}


ALL = tuple(SITES)
# name -> (hooks, their first layer, their parameters from the file).
METHODS: dict[str, tuple[hooks.Hooks | None, int, Callable[[Case, str], Tree]]] = {
    "base": (None, 0, lambda *_: {}),
    "pfeiffer": (peft_hooks.Pfeiffer(ADAPTER), 0, adapter),
    "pfeiffer_swish_leaveout": (
        peft_hooks.Pfeiffer(ADAPTER, "silu"), 1, lambda c, n: adapter(c, n, start=1)),
    "houlsby": (
        peft_hooks.Houlsby(ADAPTER), 0, lambda c, n: adapter(c, n) | adapter(c, n, "attention")),
    "parallel": (peft_hooks.Parallel(ADAPTER), 0, fixed_scale),
    "parallel_learned": (peft_hooks.Parallel(ADAPTER), 0, learned_scale),
    "prefix_mlp": (peft_hooks.Prefix(LENGTH), 0, prefix),
    "prefix_flat": (peft_hooks.Prefix(LENGTH), 0, prefix),
    "lora_qv": (peft_hooks.Lora(QV, RANK, 2.0), 0, lambda c, n: lora(c, n, QV)),
    "lora_all": (peft_hooks.Lora(ALL, RANK, 2.0), 0, lambda c, n: lora(c, n, ALL)),
    "ia3": (peft_hooks.Ia3(), 0, ia3),
    "unipelt": (peft_hooks.GatedUnion(LENGTH, RANK, ADAPTER), 0, lambda c, _: union(c)),
}  # fmt: skip


def config(case: Case, groups: tuple[hooks.LayerHooks, ...]) -> bert.BertConfig:
    sizes = case.meta["config"]
    return bert.BertConfig(
        vocab_size=sizes["vocab"],
        d_model=sizes["hidden_size"],
        num_layers=LAYERS,
        num_heads=HEADS,
        d_ff=sizes["ff"],
        max_positions=sizes["max_positions"] - 2,
        layer_hooks=groups,
    )


def trunk(case: Case) -> Tree:
    added = (".loras.", ".adapters.", "prefix_tuning")
    own = {k: v for k, v in case.params.items()
           if k.startswith("roberta.") and not any(word in k for word in added)}  # fmt: skip
    return weights.import_weights(shapes(case, ()), own, weights.rules_for(own, shapes(case, ())))


def shapes(case: Case, groups: tuple[hooks.LayerHooks, ...]) -> Tree:
    model = bert.BertModel(config(case, groups))
    ids = case.inputs["input_ids"]
    return partitioning.unbox(jax.eval_shape(model.init, jax.random.key(0), ids))["params"]


@pytest.mark.parametrize("name", METHODS)
def test_hooks_give_the_numbers_of_the_released_implementation(case: Case, name: str) -> None:
    module, start, make = METHODS[name]
    groups = () if module is None else (hooks.LayerHooks(module, start),)
    params = trunk(case)
    if groups:
        made = make(case, name)
        expected = shapes(case, groups)["encoder"][f"hooks_{start}"]
        assert jax.tree.map(np.shape, made) == jax.tree.map(lambda leaf: leaf.shape, expected)
        params = params | {"encoder": params["encoder"] | {f"hooks_{start}": made}}
    model, ids = bert.BertModel(config(case, groups)), case.inputs["input_ids"]
    real = (ids != case.meta["config"]["pad_token_id"]).astype(np.int32)
    positions = np.cumsum(real, axis=1) * real - 1

    @jax.jit
    def run(params: Any) -> tuple[jax.Array, jax.Array]:
        mask = jnp.asarray(case.inputs["attention_mask"])
        hidden, kept = model.apply(
            {"params": params}, ids, mask, None, positions, mutable=["intermediates"]
        )
        return hidden, kept["intermediates"]["encoder"]["hidden"][1]

    last, first = run(params)
    head = {k: case.params[f"heads.task.{k}"] for k in ("0.weight", "0.bias", "2.weight", "2.bias")}
    inner = np.tanh(np.asarray(last[:, 0]) @ head["0.weight"].T + head["0.bias"])
    logits = inner @ head["2.weight"].T + head["2.bias"]
    for found, what in ((first, "hidden_1"), (last, "hidden_last"), (logits, "logits")):
        np.testing.assert_allclose(
            found, case.expected[f"outputs/{name}/{what}"], rtol=1e-4, atol=2e-5, err_msg=what
        )
