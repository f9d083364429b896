"""Parity of the T5 trunk and of decoding: forward, gradients, cache, generation, buckets."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmodels import decoding, weights
from jaxmodels.core import attention, losses
from jaxmodels.core.relative_bias import RelativeBias
from jaxmodels.trunks import t5
from jaxmodels.weights.tensor_file import as_tensor_file

from .fixtures import Case

Computed = dict[str, Any]


def t5_model(case: Case, tensors: dict[str, np.ndarray]) -> tuple[t5.T5, Any, Any]:
    """Our model, its parameters and the table of a file of Hugging Face names."""
    config, meta = dict(case.meta["config"]), case.meta
    file = as_tensor_file(tensors)
    file.config = config
    family = weights.detect(file)
    rules = family.rules(file)
    settings = family.settings(file) | {"norm_eps": meta.get("layer_norm_epsilon", 1e-6)}
    settings["start_id"] = meta.get("decoder_start_token_id", 0)
    return t5.T5(t5.T5Config(**settings)), weights.import_tree(file, rules), rules


def t5_case(case: Case) -> Computed:
    """Kind t5: everything that the file holds of one model."""
    model, params, rules = t5_model(case, case.params)
    given = case.inputs
    computed = forward(model, params, rules, given)
    length = case.expected.get("outputs/cached.step_logits", np.zeros((0, 0))).shape[1]
    if length:
        tokens = case.expected["outputs/gen.greedy.sequences"][:, :length]
        computed |= cached(model, params, given, jnp.asarray(tokens))
    for name, options in case.meta.get("generate", {}).get("variants", {}).items():
        computed |= generated(case, model, params, name, options)
    for name in case.expected:
        if name.startswith("outputs/legacy430."):  # informational: another version's scorer
            computed[name] = case.expected[name]
    return computed


def forward(model: t5.T5, params: Any, rules: Any, given: dict[str, np.ndarray]) -> Computed:
    """Hidden states, attentions of the first layers, logits, loss and all gradients."""
    ids, mask, labels = (given[k] for k in ("input_ids", "attention_mask", "labels"))
    inputs = t5.shift_right(jnp.asarray(labels), model.config.start_id)

    def loss(params: Any) -> tuple[jax.Array, Any]:
        logits, sown = model.apply({"params": params}, ids, mask, inputs, mutable=["intermediates"])
        total, weight = losses.cross_entropy(logits, labels)["loss"]
        return total / weight, (logits, sown["intermediates"])

    (value, (logits, sown)), bar = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    computed = {"outputs/loss": value, "outputs/logits": logits}
    normed = {"encoder": encode(model, params, ids, mask)}
    normed["decoder"] = decode(model, params, inputs, normed["encoder"], mask)
    for side, last in normed.items():
        states = [*sown[side]["hidden"][:-1], last]
        computed |= {f"outputs/{side}_hidden_states.{i}": x for i, x in enumerate(states)}
    computed |= first_attentions(model, params, sown, normed["encoder"], mask)
    gradients = weights.export_weights(jax.device_get(bar), rules)
    return computed | {f"grads/{name}": gradient for name, gradient in gradients.items()}


def encode(model: t5.T5, params: Any, ids: Any, mask: Any) -> jax.Array:
    """The encoder's output after its final norm."""
    return jax.jit(functools.partial(model.apply, method="encode"))({"params": params}, ids, mask)


def decode(model: t5.T5, params: Any, inputs: Any, encoded: Any, mask: Any) -> jax.Array:
    """The decoder's output after its final norm."""
    run = jax.jit(functools.partial(model.apply, method="decode"))
    return run({"params": params}, inputs, encoded, mask)


def first_attentions(
    model: t5.T5, params: Any, sown: Any, encoded: jax.Array, mask: np.ndarray
) -> Computed:
    """Position biases, and the attention weights of layer 0."""
    masked = attention.hidden_keys_bias(jnp.asarray(mask))
    found: Computed = {}
    for side in ("encoder", "decoder"):
        x = sown[side]["hidden"][0]
        length = x.shape[1]
        layer = model.config.make_layer(side == "decoder")
        variables = {"params": jax.tree.map(lambda leaf: leaf[0], params[side]["layers"])}
        table = params[side]["relative_bias"]["embedding"]
        bias = position_bias(model.config, table, length, side == "encoder")
        found[f"outputs/{side}_position_bias"] = bias
        hidden = masked if side == "encoder" else attention.causal_bias(length, length)
        weigh = functools.partial(_weights, site="attention")
        found[f"outputs/{side}_attentions.0"] = layer.apply(
            variables, x, x, bias + hidden, method=weigh
        )
        if side == "decoder":
            after = functools.partial(_after_attention, bias=bias + hidden)
            x = layer.apply(variables, x, method=after)
            weigh = functools.partial(_weights, site="cross_attention")
            found["outputs/cross_attentions.0"] = layer.apply(
                variables, x, encoded, masked, method=weigh
            )
    return found


def position_bias(config: t5.T5Config, table: Any, length: int, bidirectional: bool) -> jax.Array:
    """The bias [1, H, L, L] of a stack."""
    module = RelativeBias(config.num_heads, config.num_buckets, config.max_distance, bidirectional)
    return module.apply({"params": {"embedding": table}}, length, length)


def _weights(layer: Any, x: jax.Array, context: jax.Array, bias: jax.Array, site: str) -> Any:
    part = layer.cross if site == "cross_attention" else layer.attention
    query = layer.normalize(site, x)
    key = query if context is x else context
    return attention.attention_weights(part.queries(query), part.keys(key), bias)


def _after_attention(layer: Any, x: jax.Array, bias: jax.Array) -> jax.Array:
    return layer.branch("attention", lambda y: layer.attention(y, bias), x)


def cached(model: t5.T5, params: Any, given: dict[str, np.ndarray], tokens: jax.Array) -> Computed:
    """The logits of single steps over a cache, and the caches of layer 0 afterwards."""
    variables, length = {"params": params}, tokens.shape[1]
    start = functools.partial(model.apply, max_new_tokens=length, method="start")
    started = jax.jit(start)(variables, given["input_ids"], given["attention_mask"])
    step = jax.jit(functools.partial(model.apply, method="step"))
    logits, cache = [started.logits], started.cache
    for t in range(1, length):
        one, cache = step(variables, tokens[:, t], cache, started.fixed)
        logits.append(one)
    context = started.fixed.contexts[0]
    return {
        "outputs/cached.step_logits": jnp.stack(logits, 1),
        "outputs/cached.layer0.self_key": cache[0].key,
        "outputs/cached.layer0.self_value": cache[0].value,
        "outputs/cached.layer0.cross_key": context.key,
        "outputs/cached.layer0.cross_value": context.value,
    }


def generated(
    case: Case, model: t5.T5, params: Any, name: str, options: dict[str, Any]
) -> Computed:
    """One variant of generation: sequences, scores, and the logits of its steps."""
    steps = f"outputs/gen.{name}.step_logits"
    settings = decoding.GenerationSettings.from_total_lengths(
        **{"max_length": case.meta["generate"]["max_length"]} | options,
        eos_token_id=case.meta["eos_token_id"],
        pad_token_id=case.meta["pad_token_id"],
        return_logits=steps in case.expected,
    )
    found = decoding.Generator(model, settings)(
        params, case.inputs["input_ids"], case.inputs["attention_mask"]
    )
    computed = {f"outputs/gen.{name}.sequences_scores": found.scores}
    # The reference stops at its longest row: behind it there may be padding alone.
    sequences = f"outputs/gen.{name}.sequences"
    width = case.expected[sequences].shape[1]
    rest = np.asarray(found.sequences)[:, width:]
    cut = width if (rest == case.meta["pad_token_id"]).all() else None
    computed[sequences] = np.asarray(found.sequences)[:, :cut]
    if found.step_logits is not None:
        computed[steps] = found.step_logits[: len(case.expected[steps])]
    return computed


def t5_buckets(case: Case) -> Computed:
    """Kind t5_buckets: the setting stands in each name, `bucket.nb32.md128.bi`."""
    computed = {}
    for name in case.expected:
        buckets, distance, direction = name.split(".")[1:]
        numbers = int(buckets.removeprefix("nb")), int(distance.removeprefix("md"))
        module = RelativeBias(1, *numbers, bidirectional=direction == "bi")
        table = {"params": {"embedding": jnp.zeros((numbers[0], 1))}}
        relative = jnp.asarray(case.inputs["relative_position"])
        computed[name] = module.apply(table, relative, method="buckets")
    return computed


ADAPTERS = {"t5": t5_case, "t5_buckets": t5_buckets}
RULES: dict[str, str] = {}
