"""T5: against transformers, cached steps, hooks, soft prompts, published sizes, refusals."""

import dataclasses
import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodels.core import hooks, losses
from jaxmodels.core import params as param_tree
from jaxmodels.trunks import t5
from tests.trunks import hook_cases, hugging_face
from tests.vcc import small
from tests.vcc.test_encoder import equations

V10 = t5.T5Config(
    vocab_size=40, d_model=16, num_layers=2, num_decoder_layers=3, num_heads=2, head_dim=6,
    d_ff=24, num_buckets=8, max_distance=20,
)  # fmt: skip
V11 = dataclasses.replace(V10, activation="gelu_new", gated=True, tied_head=False)
KINDS = {"v1.0": V10, "v1.1": V11}
IDS = jnp.asarray(np.random.default_rng(0).integers(2, 40, (2, 7)))
MASK = jnp.asarray([[1] * 7, [1] * 4 + [0] * 3])
TARGETS = jnp.asarray(np.random.default_rng(1).integers(2, 40, (2, 5)))


@functools.cache
def started(config: t5.T5Config) -> tuple[t5.T5, Any]:
    """The model, and parameters large enough that every part of the formula counts."""
    model = t5.T5(config)
    return model, small.drawn(model.init, IDS, size=0.3, spread=True)


@functools.partial(jax.jit, static_argnums=0, static_argnames="deterministic")
def logits(model: t5.T5, variables: Any, **more: Any) -> jax.Array:
    return model.apply(variables, IDS, MASK, t5.shift_right(TARGETS), **more)


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_hugging_face_model_gives_the_same_logits_and_tokens(kind, tmp_path) -> None:
    transformers = pytest.importorskip("transformers")
    config = KINDS[kind]
    feed_forward = "gated-gelu" if config.gated else "relu"
    model = transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            vocab_size=config.vocab_size, d_model=config.d_model, d_kv=config.head_dim,
            d_ff=config.d_ff, num_layers=config.num_layers,
            num_decoder_layers=config.num_layers, num_heads=config.num_heads,
            relative_attention_num_buckets=8, relative_attention_max_distance=20,
            feed_forward_proj=feed_forward, decoder_start_token_id=0,
            tie_word_embeddings=config.tied_head,
        )
    )  # fmt: skip
    name, settings, variables = hugging_face.loaded(hugging_face.randomized(model), tmp_path)
    assert name == "t5" and settings["gated"] == config.gated and settings["max_distance"] == 20
    # Version 5 ties every head it makes and keeps "untied" as "not scaled"; the published v1.1
    # models with a head of their own are in the parity files.
    assert settings["tied_head"] and settings["scaled_output"] == config.tied_head
    ours = t5.T5(t5.T5Config(**settings))
    expected = hugging_face.run(
        model, input_ids=IDS, attention_mask=MASK, decoder_input_ids=t5.shift_right(TARGETS)
    )
    found = logits(ours, variables)
    np.testing.assert_allclose(found, expected.logits, rtol=1e-4, atol=1e-4)
    options = {"max_new_tokens": 6, "num_beams": 3, "pad_token_id": 0, "eos_token_id": 1}
    tokens = hugging_face.generate(model, IDS, MASK, **options)
    hugging_face.same_sequences(
        hugging_face.our_generation(ours, variables, IDS, MASK, **options), tokens, 0
    )


@pytest.mark.parametrize("kind", KINDS)
def test_cached_steps_are_the_whole_decoder(kind: str) -> None:
    model, variables = started(KINDS[kind])
    inputs = t5.shift_right(TARGETS)

    @jax.jit
    def replay(variables: Any) -> jax.Array:
        begun = model.apply(variables, IDS, MASK, max_new_tokens=5, method="start")
        return hook_cases.replayed(model, variables, begun, inputs[:, 1:])

    whole = logits(model, variables)
    np.testing.assert_allclose(replay(variables), whole, rtol=1e-4, atol=1e-4)


def test_a_step_reads_one_encoder_output_for_all_beams_of_an_example() -> None:
    model, variables = started(V10)
    start = jax.jit(functools.partial(model.apply, method="start", max_new_tokens=3))
    step = jax.jit(functools.partial(model.apply, method="step"))
    begun = start(variables, IDS, MASK)
    tokens = jnp.asarray([4, 5, 6, 7])  # two beams of each of two examples
    repeated = jax.tree.map(lambda x: jnp.repeat(x, 2, axis=0) if x.ndim else x, begun.cache)
    both, _ = step(variables, tokens, repeated, begun.fixed)
    for beam in range(2):
        one, _ = step(variables, tokens[beam::2], begun.cache, begun.fixed)
        np.testing.assert_allclose(both[beam::2], one, rtol=1e-5, atol=1e-5)


def test_padding_of_the_input_changes_nothing() -> None:
    model, variables = started(V11)
    run = jax.jit(functools.partial(model.apply, variables))
    padded = run(IDS, MASK, t5.shift_right(TARGETS))
    alone = run(IDS[1:, :4], MASK[1:, :4], t5.shift_right(TARGETS)[1:])
    np.testing.assert_allclose(padded[1:], alone, rtol=1e-4, atol=1e-4)


def test_soft_prompts_go_in_as_embeddings() -> None:
    model, variables = started(V10)
    embedded = model.apply(variables, IDS, method="embed")
    encode = jax.jit(functools.partial(model.apply, variables, method="encode"))
    chex.assert_trees_all_equal(encode(IDS, MASK), encode(None, MASK, inputs_embeds=embedded))
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        encode(IDS, MASK, inputs_embeds=embedded)


def test_a_delta_hook_is_a_change_of_two_kernels_in_its_layers_alone() -> None:
    inner = V10.num_heads * V10.head_dim
    group = hooks.LayerHooks(hook_cases.Delta(features=inner), start=1)
    model, variables = started(dataclasses.replace(V10, decoder_hooks=(group,)))
    params = variables["params"]
    made = params["decoder"]["hooks_1"]
    assert param_tree.count(made) == 2 * 2 * 2 * (V10.d_model + inner)  # two of three layers
    plain = jax.tree.map(lambda leaf: leaf, params)
    plain["decoder"] = {k: v for k, v in params["decoder"].items() if k != "hooks_1"}
    stacked = plain["decoder"]["layers"] = jax.tree.map(jnp.asarray, params["decoder"]["layers"])
    for name in ("query", "value"):
        delta = made[f"{name}_down"] @ made[f"{name}_up"]
        kernel = stacked["attention"][name]["kernel"]
        stacked["attention"][name] = {"kernel": kernel.at[1:].add(delta)}
    found = logits(model, variables)
    expected = logits(t5.T5(V10), {"params": plain})
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    assert float(jnp.abs(found - logits(t5.T5(V10), {"params": {**params, "decoder": {
        k: v for k, v in params["decoder"].items() if k != "hooks_1"}}})).max()) > 1e-3  # fmt: skip


def test_a_prefix_is_seen_by_training_and_by_cached_steps_alike() -> None:
    groups = (hooks.LayerHooks(hook_cases.Prefix(length=2)),)
    model, variables = started(dataclasses.replace(V11, decoder_hooks=groups))
    inputs = t5.shift_right(TARGETS)

    @jax.jit
    def replay(variables: Any) -> jax.Array:
        begun = model.apply(variables, IDS, MASK, max_new_tokens=3, method="start")
        return hook_cases.replayed(model, variables, begun, inputs[:, 1:2])

    whole = logits(model, variables)
    np.testing.assert_allclose(replay(variables), whole[:, :2], rtol=1e-4, atol=1e-4)


class OtherFeedForward(hooks.Hooks):
    """Another feed-forward in place of the trunk's: a gate of the input, and a sown number."""

    def sublayer(self, site: str, run: Any, x: jax.Array) -> jax.Array:
        if site != "ffn":
            return run(x)
        self.sow("intermediates", "mean", x.mean())
        return jax.nn.sigmoid(x)


def test_another_feed_forward_takes_the_place_of_the_trunks_and_reports_by_layer() -> None:
    group = hooks.LayerHooks(OtherFeedForward(), stop=1)
    model, variables = started(dataclasses.replace(V10, encoder_hooks=(group,)))
    encode = functools.partial(model.apply, method="encode", mutable=["intermediates"])
    apply = jax.jit(encode)
    found, sown = apply(variables, IDS, MASK)
    (means,) = sown["intermediates"]["encoder"]["hooks_0"]["hooks"]["mean"]
    assert means.shape == (1,)
    params = jax.tree.map(jnp.asarray, variables["params"])
    params["encoder"]["layers"]["ffn"]["wo"]["kernel"] *= 100.0  # of layer 0: nothing may read it
    params["encoder"]["layers"]["ffn"]["wo"]["kernel"] = (
        params["encoder"]["layers"]["ffn"]["wo"]["kernel"].at[1:].divide(100.0)
    )
    again, _ = apply({"params": params}, IDS, MASK)
    np.testing.assert_allclose(again, found, rtol=1e-5, atol=1e-5)


def test_overlapping_and_outside_hooks_are_refused() -> None:
    groups = (hooks.LayerHooks(hooks.Hooks(), 0, 2), hooks.LayerHooks(hooks.Hooks(), 1))
    model = t5.T5(dataclasses.replace(V10, encoder_hooks=groups))
    with pytest.raises(ValueError, match=r"two hooks for layer 1; .*Chain"):
        jax.eval_shape(model.init, jax.random.key(0), IDS)
    model = t5.T5(dataclasses.replace(V10, encoder_hooks=(hooks.LayerHooks(hooks.Hooks(), 2),)))
    with pytest.raises(ValueError, match=r"layers 2\.\.1 .*but the stack has layers 0\.\.1"):
        jax.eval_shape(model.init, jax.random.key(0), IDS)


# Section 5 of the specification of Multimodal-CoT, counted from transformers.
COUNTS = {
    "t5_small": 60_506_624,
    "t5_base": 222_903_552,
    "t5_large": 737_668_096,
    "t5_3b": 2_851_598_336,
    "t5_11b": 11_307_321_344,
    "flan_t5_small": 76_961_152,
    "flan_t5_base": 247_577_856,
    "flan_t5_large": 783_150_080,
    "flan_t5_xl": 2_849_757_184,
    "flan_t5_xxl": 11_135_332_352,
}


@pytest.mark.parametrize("name", COUNTS)
def test_published_sizes_have_their_parameters(name: str) -> None:
    shapes = jax.eval_shape(t5.T5(t5.SIZES[name]).init, jax.random.key(0), IDS)
    assert param_tree.count(shapes) == COUNTS[name]
    assert t5.SIZES.keys() == COUNTS.keys()


def test_parameters_start_as_published() -> None:
    config = dataclasses.replace(V11, d_model=64, head_dim=32, d_ff=128, vocab_size=500)
    tree = t5.T5(config).init(jax.random.key(0), IDS)["params"]
    layers = tree["encoder"]["layers"]
    stds = {
        "query": (layers["attention"]["query"]["kernel"], (64 * 32) ** -0.5),
        "value": (layers["attention"]["value"]["kernel"], 64**-0.5),
        "out": (layers["attention"]["out"]["kernel"], 64**-0.5),
        "wi": (layers["ffn"]["wi_0"]["kernel"], 64**-0.5),
        "wo": (layers["ffn"]["wo"]["kernel"], 128**-0.5),
        "embedding": (tree["shared"]["embedding"], 1.0),
        "head": (tree["lm_head"]["kernel"], 1.0),
    }
    for name, (leaf, std) in stds.items():
        assert float(leaf.unbox().std()) == pytest.approx(std, rel=0.08), name


def test_the_program_does_not_grow_with_depth() -> None:
    sizes = []
    for depth in (2, 6):
        config = dataclasses.replace(V11, num_layers=depth, num_decoder_layers=depth)
        model = t5.T5(config)
        variables = jax.eval_shape(model.init, jax.random.key(0), IDS)
        traced = jax.make_jaxpr(functools.partial(logits, model))(variables)
        sizes.append(equations(traced.jaxpr))
    assert sizes[0] == sizes[1]


def test_dropout_needs_an_rng_and_training_reaches_every_parameter() -> None:
    model, variables = started(V11)

    def loss(params: Any, key: jax.Array) -> jax.Array:
        found = logits(model, {"params": params}, deterministic=False, rngs={"dropout": key})
        total, weight = losses.cross_entropy(found, TARGETS)["loss"]
        return total / weight

    compiled = jax.jit(jax.value_and_grad(loss))
    first, bar = compiled(variables["params"], jax.random.key(0))
    other, _ = compiled(variables["params"], jax.random.key(1))
    assert first != other
    still = [p for p, leaf in param_tree.flatten(bar).items() if not float(jnp.abs(leaf).max())]
    assert still == []


def test_bfloat16_products_stay_near_float32() -> None:
    model, variables = started(V11)
    exact = logits(model, variables)
    rough = logits(t5.T5(dataclasses.replace(V11, dtype=jnp.bfloat16)), variables)
    assert rough.dtype == jnp.float32
    assert float(jnp.abs(rough - exact).max()) < 0.06 * float(jnp.abs(exact).max())


def test_sizes_that_cannot_work_are_refused() -> None:
    with pytest.raises(ValueError, match=r"model\.num_heads=0: must be at least 1"):
        t5.T5Config(num_heads=0)
    with pytest.raises(ValueError, match="activation='swish': use one of"):
        t5.T5Config(activation="swish")


def test_labels_shift_with_a_start_token_and_no_ignored_ones() -> None:
    labels = jnp.asarray([[5, 6, -100, -100]])
    np.testing.assert_array_equal(t5.shift_right(labels, start_id=3), [[3, 5, 6, 0]])
