"""Decoder-only trunk by itself: caches, padding, scores, hooks, sizes, refusals, flat compile."""

import dataclasses
import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodels.core import hooks, partitioning
from jaxmodels.core import params as param_tree
from jaxmodels.trunks import decoder_lm
from tests.trunks import hook_cases
from tests.vcc import small
from tests.vcc.test_encoder import equations

GPT2 = decoder_lm.DecoderConfig(
    vocab_size=31, d_model=16, num_layers=2, num_heads=4, d_ff=24, max_positions=24
)
LLAMA = dataclasses.replace(
    GPT2, num_kv_heads=2, head_dim=6, norm="rms", activation="silu", gated=True, use_bias=False,
    tied_head=False, rope_theta=100.0, dropout_rate=0.0, attention_dropout_rate=0.0,
)  # fmt: skip
KINDS = {"gpt2": GPT2, "llama": LLAMA}
IDS = jnp.asarray(np.random.default_rng(0).integers(0, 31, (2, 9)))
MASK = jnp.asarray([[1] * 9, [0] * 4 + [1] * 5])


@functools.cache
def started(config: decoder_lm.DecoderConfig, size: float = 0.3) -> tuple[Any, Any]:
    """The model, and parameters large enough that every part of the formula counts."""
    model = decoder_lm.DecoderLM(config)
    return model, small.drawn(model.init, IDS, size=size, spread=True)


@functools.partial(jax.jit, static_argnums=0, static_argnames=("method", "max_new_tokens"))
def run(model: Any, params: Any, *args: Any, **more: Any) -> Any:
    return model.apply(params, *args, **more)


@functools.partial(jax.jit, static_argnums=(0, 1))
def replayed(
    model: Any, prompt: int, params: Any, ids: Any, mask: Any, **more: Any
) -> tuple[jax.Array, Any]:
    """Logits of the places prompt-1 ... of `ids`, the first from `start`, the rest by `step`."""
    given = {"max_new_tokens": ids.shape[1] - prompt + 1, "method": "start"}
    first = model.apply(params, ids[:, :prompt], mask[:, :prompt], **given, **more)
    return hook_cases.replayed(model, params, first, ids[:, prompt:]), first


@pytest.mark.parametrize("kind", KINDS)
def test_cached_steps_after_a_left_padded_prompt_are_the_full_forward(kind: str) -> None:
    model, params = started(KINDS[kind])
    full = run(model, params, IDS, MASK)
    found, first = replayed(model, 6, params, IDS, MASK)
    np.testing.assert_allclose(found, full[:, 5:], rtol=1e-4, atol=1e-4)
    chex.assert_trees_all_equal(first.prompt, IDS[:, :6])
    chex.assert_trees_all_equal(first.prompt_mask, MASK[:, :6])
    # The last token fits in just so: nothing is kept for a token that nobody reads.
    assert first.cache[0].max_length == 9


@pytest.mark.parametrize("kind", KINDS)
def test_padding_on_either_side_changes_no_real_token(kind: str) -> None:
    model, params = started(KINDS[kind])
    alone = run(model, params, IDS[1:, 4:])[0]
    left = run(model, params, IDS, MASK)[1, 4:]
    right = jnp.pad(IDS[1:, 4:], ((0, 0), (0, 4)))
    right = run(model, params, right, MASK[1:, ::-1])[0, :5]
    np.testing.assert_allclose(left, alone, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(right, alone, rtol=1e-4, atol=1e-4)


def test_beams_read_the_masks_and_positions_of_their_example() -> None:
    model, params = started(GPT2)
    start = functools.partial(model.apply, max_new_tokens=3, method="start")
    first = jax.jit(start)(params, IDS, MASK)
    step = jax.jit(functools.partial(model.apply, method="step"))
    twice = jax.tree.map(lambda x: jnp.repeat(x, 2, 0) if x.ndim else x, first.cache)
    tokens = jnp.asarray([3, 4, 5, 6])
    found, _ = step(params, tokens, twice, first.fixed)
    for beam in (0, 1):
        alone, _ = step(params, tokens[beam::2], first.cache, first.fixed)
        np.testing.assert_allclose(found[beam::2], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_soft_prompts_go_in_front_of_embedded_ids() -> None:
    model, params = started(GPT2)
    soft = jax.random.normal(jax.random.key(1), (2, 3, 16))
    words = run(model, params, IDS, method="embed")
    embeds, mask = jnp.concatenate([soft, words], 1), jnp.pad(MASK, ((0, 0), (3, 0)))
    mask = mask.at[:, :3].set(1)
    full = run(model, params, inputs_embeds=embeds, attention_mask=mask)
    first = run(
        model, params, IDS[:, :8], mask[:, :-1], max_new_tokens=2, inputs_embeds=embeds[:, :-1],
        method="start",
    )  # fmt: skip
    np.testing.assert_allclose(first.logits, full[:, -2], rtol=1e-4, atol=1e-4)
    chex.assert_trees_all_equal(first.prompt_mask, MASK[:, :8])
    found, _ = run(model, params, IDS[:, 8], first.cache, first.fixed, method="step")
    np.testing.assert_allclose(found, full[:, -1], rtol=1e-4, atol=1e-4)
    plain = run(model, params, inputs_embeds=words, attention_mask=MASK)
    chex.assert_trees_all_close(plain, run(model, params, IDS, MASK), atol=1e-5)


@pytest.mark.parametrize("chunk", [1, 3, 100])
@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_log_probabilities_of_the_tokens_that_follow(kind: str, chunk: int) -> None:
    model, params = started(KINDS[kind])
    logits = np.asarray(run(model, params, IDS, MASK), np.float64)
    score = jax.jit(functools.partial(model.apply, chunk=chunk, method="score"))
    found, top = score(params, IDS, MASK)
    logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = np.take_along_axis(logits[:, :-1], np.asarray(IDS)[:, 1:, None], -1)[..., 0]
    known = np.asarray(MASK[:, 1:] * MASK[:, :-1])
    np.testing.assert_allclose(found[:, 1:], expected * known, rtol=1e-4, atol=1e-4)
    assert not found[:, 0].any() and not top[:, 0].any()
    most = (logits[:, :-1].argmax(-1) == np.asarray(IDS)[:, 1:]) & (known == 1)
    np.testing.assert_array_equal(top[:, 1:], most)


def test_the_greedy_continuation_is_scored_as_the_most_probable() -> None:
    model, params = started(GPT2)
    following = run(model, params, IDS).argmax(-1)
    _, top = decoder_lm.token_log_probs(
        run(model, params, IDS, method="decode"),
        model.bind(params).head_kernel(),
        following.at[0, 2].set(-100),
    )
    expected = np.ones((2, 9), bool)
    expected[0, 2] = False
    np.testing.assert_array_equal(top, expected)


@pytest.mark.slow
def test_gradients_of_token_log_probs_are_those_of_the_plain_formula() -> None:
    keys = jax.random.split(jax.random.key(0), 2)
    hidden, kernel = jax.random.normal(keys[0], (2, 7, 8)), jax.random.normal(keys[1], (8, 31))
    targets = IDS[:, :7].at[1, :3].set(-100)

    def plain(hidden: jax.Array, kernel: jax.Array) -> jax.Array:
        log_probs = jax.nn.log_softmax(hidden @ kernel)
        picked = jnp.take_along_axis(log_probs, jnp.maximum(targets, 0)[..., None], -1)[..., 0]
        return (picked * (targets >= 0)).sum()

    def chunked(hidden: jax.Array, kernel: jax.Array) -> jax.Array:
        return decoder_lm.token_log_probs(hidden, kernel, targets, chunk=3)[0].sum()

    expected, found = (
        jax.jit(jax.value_and_grad(total, (0, 1)))(hidden, kernel) for total in (plain, chunked)
    )
    chex.assert_trees_all_close(found, expected, rtol=1e-4, atol=1e-4)


def test_scores_of_long_inputs_never_hold_all_logits() -> None:
    shapes = [(2, 512, 8), (8, 4096)]
    hidden, kernel = (jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes)
    targets = jax.ShapeDtypeStruct((2, 512), jnp.int32)

    def loss(hidden: jax.Array, kernel: jax.Array, targets: jax.Array) -> jax.Array:
        return decoder_lm.token_log_probs(hidden, kernel, targets, chunk=16)[0].sum()

    compiled = jax.jit(jax.grad(loss)).lower(hidden, kernel, targets).compile()
    logits = 2 * 512 * 4096 * 4
    assert compiled.memory_analysis().temp_size_in_bytes < logits / 4


@pytest.mark.slow
def test_a_weight_delta_hook_equals_changed_kernels() -> None:
    delta = hooks.LayerHooks(hook_cases.Delta(16), 1)
    config = dataclasses.replace(GPT2, layer_hooks=(delta,))
    model, params = started(config)
    base = decoder_lm.DecoderLM(GPT2)
    made = params["params"]["decoder"]["hooks_1"]
    merged = jax.tree.map(lambda leaf: leaf, params["params"])
    del merged["decoder"]["hooks_1"]
    for name in ("query", "value"):
        product = jnp.einsum("lir,lro->lio", made[f"{name}_down"], made[f"{name}_up"])
        kernel = merged["decoder"]["layers"]["attention"][name]["kernel"]
        merged["decoder"]["layers"]["attention"][name]["kernel"] = kernel.at[1:].add(product)
    found = jax.jit(model.apply)(params, IDS, MASK)
    expected = jax.jit(base.apply)({"params": merged}, IDS, MASK)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    steps, _ = replayed(model, 6, params, IDS, MASK)
    np.testing.assert_allclose(steps, found[:, 5:], rtol=1e-4, atol=1e-4)


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_a_prefix_of_past_keys_and_values_equals_the_tokens_they_are_of(kind: str) -> None:
    base, plain = started(KINDS[kind])
    row = IDS[:1]
    past = run(base, plain, row[:, :3], max_new_tokens=1, method="start").cache
    group = (hooks.LayerHooks(hook_cases.Prefix(3)),)
    model = decoder_lm.DecoderLM(dataclasses.replace(KINDS[kind], layer_hooks=group))
    front = jnp.stack([jnp.stack([c.key[0], c.value[0]]).swapaxes(1, 2) for c in past])
    tree = plain["params"]
    params = {"params": tree | {"decoder": tree["decoder"] | {"hooks_0": {"attention": front}}}}
    positions = jnp.arange(3, 9)[None]
    full = run(base, plain, row)
    found = jax.jit(model.apply)(params, row[:, 3:], position_ids=positions)
    np.testing.assert_allclose(found, full[:, 3:], rtol=1e-4, atol=1e-4)
    ones = jnp.ones_like(row)[:, 3:]
    steps, _ = replayed(model, 4, params, row[:, 3:], ones, position_ids=positions[:, :4])
    np.testing.assert_allclose(steps, full[:, 6:], rtol=1e-4, atol=1e-4)


COUNTS = {
    "gpt2": 124439808,
    "gpt2_medium": 354823168,
    "gpt2_large": 774030080,
    "gpt2_xl": 1557611200,
    "llama_7b": 6738415616,
    "llama2_7b": 6738415616,
    "llama3_8b": 8030261248,
    "llama3_2_1b": 1235814400,
    "llama3_2_3b": 3212749824,
    "qwen2_5_0_5b": 494032768,
}


def shapes(config: decoder_lm.DecoderConfig) -> Any:
    return jax.eval_shape(decoder_lm.DecoderLM(config).init, jax.random.key(0), IDS)["params"]


@pytest.mark.parametrize("name", decoder_lm.SIZES)
def test_published_sizes_have_their_parameters(name: str) -> None:
    assert param_tree.count(partitioning.unbox(shapes(decoder_lm.SIZES[name]))) == COUNTS[name]


def test_large_parameters_are_split_and_every_axis_has_a_rule() -> None:
    mesh = jax.sharding.AbstractMesh((1, 8), partitioning.AXES)
    for name in ("gpt2_medium", "llama3_8b"):
        leaves = param_tree.flatten(shapes(decoder_lm.SIZES[name]))
        for path, leaf in leaves.items():
            shape = leaf.value.shape
            spec = partitioning.param_spec(shape, leaf.names, mesh)
            assert any(spec) or np.prod(shape) < 10**6, path


def test_gpt2_starts_the_last_projections_of_branches_smaller() -> None:
    config = dataclasses.replace(GPT2, num_layers=8, d_model=64, d_ff=64)

    @jax.jit
    def spreads(key: jax.Array) -> list[jax.Array]:
        params = partitioning.unbox(decoder_lm.DecoderLM(config).init(key, IDS)["params"])
        layers = params["decoder"]["layers"]
        kernels = (layers["attention"]["out"], layers["ffn"]["wo"], layers["ffn"]["wi"])
        return [kernel["kernel"].std() for kernel in kernels]

    assert spreads(jax.random.key(0)) == pytest.approx([0.005, 0.005, 0.02], rel=0.05)


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_training_reaches_every_parameter_and_remat_changes_nothing(kind: str) -> None:
    grads = []
    for policy in ("none", "full"):
        model, params = started(dataclasses.replace(KINDS[kind], remat=policy))
        run = jax.jit(jax.grad(lambda p, m=model: -m.apply(p, IDS, MASK, method="score")[0].sum()))
        grads.append(run(params))
    chex.assert_trees_all_close(*grads, rtol=1e-4, atol=1e-4)
    for path, leaf in param_tree.flatten(grads[0]["params"]).items():
        # Keys moved by a constant leave the softmax as it is.
        assert "key/bias" in path or float(jnp.abs(leaf).max()) > 1e-3, path


def test_program_does_not_grow_with_depth() -> None:
    sizes = []
    for depth in (2, 12):
        model, params = started(dataclasses.replace(LLAMA, num_layers=depth))
        traced = jax.make_jaxpr(jax.grad(lambda p, m=model: m.apply(p, IDS, MASK).sum()))(params)
        sizes.append(equations(traced.jaxpr))
    assert sizes[0] == sizes[1] > 50


@pytest.mark.slow
def test_dropout_acts_only_while_training() -> None:
    model, params = started(GPT2)
    train = functools.partial(model.apply, deterministic=False)
    dropped = jax.jit(train)(params, IDS, rngs={"dropout": jax.random.key(0)})
    quiet = run(model, params, IDS)
    assert float(jnp.abs(quiet - dropped).max()) > 0.1
    with pytest.raises(Exception, match="dropout"):
        jax.eval_shape(train, params, IDS)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_products_stay_near_float32(kind: str) -> None:
    model, params = started(KINDS[kind], 0.1)
    half, _ = started(dataclasses.replace(KINDS[kind], dtype=jnp.bfloat16), 0.1)
    full, found = (jax.jit(m.apply)(params, IDS, MASK) for m in (model, half))
    assert found.dtype == jnp.float32
    assert 1e-4 < float(jnp.abs(found - full).max() / jnp.abs(full).max()) < 0.05
    steps, first = replayed(half, 6, params, IDS, MASK)
    assert first.cache[0].key.dtype == jnp.bfloat16
    assert float(jnp.abs(steps - full[:, 5:]).max() / jnp.abs(full).max()) < 0.05


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_heads": 3}, "model.num_heads=3 does not divide model.d_model=16"),
        ({"num_kv_heads": 3}, "model.num_kv_heads=3 does not divide model.num_heads=4"),
        ({"num_kv_heads": 0}, "model.num_kv_heads=0"),
        ({"num_layers": 0}, "model.num_layers=0"),
        ({"activation": "swishy"}, "swishy"),
        ({"rope_theta": 10.0, "head_dim": 5}, "head width 5"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(GPT2, **change)


def test_inputs_that_do_not_fit_are_refused() -> None:
    model, params = started(GPT2)
    with pytest.raises(ValueError, match="25 tokens.*24 positions"):
        model.apply(params, jnp.zeros((1, 25), int))
    with pytest.raises(ValueError, match="25 tokens.*24 positions"):
        model.apply(params, IDS, max_new_tokens=17, method="start")
    jax.eval_shape(
        functools.partial(model.apply, max_new_tokens=16, method="start"), params, IDS
    )  # fits just so
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        model.apply(params)
    with pytest.raises(ValueError, match=r"attention_mask has shape \(2, 8\)"):
        model.apply(params, IDS, MASK[:, 1:])
    with pytest.raises(ValueError, match="inputs_embeds of length 2"):
        embeds = jnp.zeros((2, 2, 16))
        model.apply(params, IDS, max_new_tokens=1, inputs_embeds=embeds, method="start")
    longer = jnp.zeros((1, 30), int)  # rotary positions do not run out
    llama, params = started(LLAMA)
    assert bool(jnp.isfinite(run(llama, params, longer)).all())
