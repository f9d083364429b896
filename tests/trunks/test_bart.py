"""BART and mBART: Hugging Face's numbers and tokens; caches, hooks, sizes, refusals."""

import dataclasses
import functools
import pathlib
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodels.core import hooks, partitioning
from jaxmodels.core import params as param_tree
from jaxmodels.trunks import bart
from tests.trunks import hook_cases
from tests.vcc import small
from tests.vcc.test_encoder import equations

TINY = bart.BartConfig(
    vocab_size=31, d_model=16, num_layers=2, num_decoder_layers=3, num_heads=4, d_ff=24,
    max_positions=12,
)  # fmt: skip
PRE = dataclasses.replace(TINY, norm_order="pre", scale_embedding=True, logits_bias=True)
KINDS = {"post": TINY, "pre": PRE}
RNG = np.random.default_rng(0)
IDS = jnp.asarray(RNG.integers(3, 31, (2, 9)))
MASK = jnp.asarray([[1] * 9, [1] * 6 + [0] * 3])
OUTPUT = jnp.asarray(RNG.integers(3, 31, (2, 5)))


@functools.cache
def started(config: bart.BartConfig, size: float = 0.3) -> tuple[Any, Any]:
    """The model, and parameters large enough that every part of the formula counts."""
    model = bart.BartModel(config)
    return model, small.drawn(model.init, IDS, size=size, spread=True)


@functools.partial(jax.jit, static_argnums=0)
def replayed(model: Any, params: Any, ids: Any, mask: Any, output: Any) -> jax.Array:
    """Logits of start token and `output`, one step at a time."""
    first = model.apply(params, ids, mask, max_new_tokens=output.shape[1] + 1, method="start")
    return hook_cases.replayed(model, params, first, output)


def teacher_forced(model: Any, params: Any, mask: Any = MASK) -> jax.Array:
    given = jnp.pad(OUTPUT, ((0, 0), (1, 0)), constant_values=model.config.start_id)
    return jax.jit(model.apply)(params, IDS, mask, given)


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_cached_steps_are_the_full_forward(kind: str) -> None:
    model, params = started(KINDS[kind])
    full = teacher_forced(model, params)
    found = replayed(model, params, IDS, MASK, OUTPUT)
    np.testing.assert_allclose(found, full, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_padding_of_input_and_output_changes_no_real_token() -> None:
    model, params = started(TINY)
    run = jax.jit(model.apply)
    full, other = (run(params, jnp.where(MASK == 1, IDS, x), MASK, OUTPUT) for x in (1, 9))
    chex.assert_trees_all_close(full, other, rtol=1e-5)
    alone = run(params, IDS[1:, :6], None, OUTPUT[1:])
    np.testing.assert_allclose(full[1:], alone, rtol=1e-4, atol=1e-4)
    hidden = jnp.asarray([[1, 1, 0, 1, 1]] * 2)
    masked, again = (run(params, IDS, MASK, OUTPUT.at[:, 2].set(token), hidden) for token in (4, 5))
    np.testing.assert_allclose(masked[:, 3:], again[:, 3:], rtol=1e-5, atol=1e-5)
    assert float(jnp.abs(masked[:, 2] - again[:, 2]).max()) > 0.1


def test_defaults_are_a_start_token_and_all_ones() -> None:
    model, params = started(TINY)
    given, run = (jnp.ones_like(IDS), jnp.full((2, 1), 2)), jax.jit(model.apply)
    expected = run(params, IDS, *given)
    chex.assert_trees_all_close(run(params, IDS), expected, rtol=1e-5, atol=1e-5)


def test_soft_prompts_go_in_front_of_embedded_ids() -> None:
    for config in KINDS.values():
        model, params = started(config)
        encode = jax.jit(functools.partial(model.apply, method="encode"))
        words = model.apply(params, IDS, method="embed")
        found = encode(params, inputs_embeds=words, attention_mask=MASK)
        expected = encode(params, IDS, MASK)
        chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        model.apply(params, IDS, inputs_embeds=words, method="encode")


def test_shift_right_puts_the_start_token_in_front_and_padding_for_ignored_labels() -> None:
    labels = jnp.asarray([[5, 6, 2], [7, -100, -100]])
    np.testing.assert_array_equal(bart.shift_right(labels), [[2, 5, 6], [2, 7, 1]])
    np.testing.assert_array_equal(bart.shift_right(labels, 0, 9), [[0, 5, 6], [0, 7, 9]])


@pytest.mark.long
def test_a_weight_delta_hook_equals_changed_kernels_in_both_stacks() -> None:
    group = (hooks.LayerHooks(hook_cases.Delta(16), 1),)
    config = dataclasses.replace(TINY, encoder_hooks=group, decoder_hooks=group)
    model, params = started(config)
    merged = jax.tree.map(lambda leaf: leaf, params["params"])
    for stack in ("encoder", "decoder"):
        made = merged[stack].pop("hooks_1")
        for name in ("query", "value"):
            product = jnp.einsum("lir,lro->lio", made[f"{name}_down"], made[f"{name}_up"])
            projection = merged[stack]["layers"]["attention"][name]
            projection["kernel"] = projection["kernel"].at[1:].add(product)
    found = teacher_forced(model, params)
    expected = teacher_forced(bart.BartModel(TINY), {"params": merged})
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    steps = replayed(model, params, IDS, MASK, OUTPUT)
    np.testing.assert_allclose(steps, found, rtol=1e-4, atol=1e-4)


@pytest.mark.long
def test_an_adapter_joins_before_the_norm_and_a_prefix_reaches_both_attentions() -> None:
    encoder = (hooks.LayerHooks(hook_cases.Bottleneck()),)
    decoder = (hooks.LayerHooks(hook_cases.Prefix(2), 2),)
    config = dataclasses.replace(TINY, encoder_hooks=encoder, decoder_hooks=decoder)
    model, params = started(config)
    # y + y W = (wo + wo W) h + (b + b W): the adapter is another outer projection.
    merged = jax.tree.map(lambda leaf: leaf, params["params"])
    adapter = merged["encoder"].pop("hooks_0")["kernel"]
    outer = merged["encoder"]["layers"]["ffn"]["wo"]
    for name, sum_of in (("kernel", "lio,lop->lip"), ("bias", "lo,lop->lp")):
        outer[name] = outer[name] + jnp.einsum(sum_of, outer[name], adapter)
    plain = dataclasses.replace(config, encoder_hooks=())
    found = teacher_forced(model, params)
    expected = teacher_forced(bart.BartModel(plain), {"params": merged})
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    made = params["params"]["decoder"]["hooks_2"]
    assert set(made) == {"attention", "cross_attention"}
    grads = jax.jit(jax.grad(lambda p: jnp.square(teacher_forced(model, p)).sum()))(params)
    for leaf in jax.tree.leaves(grads["params"]["decoder"]["hooks_2"]):
        assert float(jnp.abs(leaf).max()) > 1e-3
    steps = replayed(model, params, IDS, MASK, OUTPUT)
    np.testing.assert_allclose(steps, found, rtol=1e-4, atol=1e-4)


COUNTS = {"bart_base": 139420416, "bart_large": 406291456, "mbart_large": 610851840}


@pytest.mark.parametrize("name", bart.SIZES)
def test_published_sizes_have_their_parameters(name: str) -> None:
    boxed = jax.eval_shape(bart.BartModel(bart.SIZES[name]).init, jax.random.key(0), IDS)["params"]
    assert param_tree.count(partitioning.unbox(boxed)) == COUNTS[name]
    mesh = jax.sharding.AbstractMesh((1, 8), partitioning.AXES)
    for path, leaf in param_tree.flatten(boxed).items():
        spec = partitioning.param_spec(leaf.value.shape, leaf.names, mesh)
        assert any(spec) or leaf.value.size < 10**6, path


@pytest.mark.parametrize("kind", KINDS)
def test_training_reaches_every_parameter_and_remat_changes_nothing(kind: str) -> None:
    grads = []
    for policy in ("none", "full"):
        model, params = started(dataclasses.replace(KINDS[kind], remat=policy))

        def loss(params: Any, model: Any = model) -> jax.Array:
            log_probs = jax.nn.log_softmax(model.apply(params, IDS, MASK, OUTPUT))
            return -log_probs[..., 7].sum()

        grads.append(jax.jit(jax.grad(loss))(params))
    chex.assert_trees_all_close(*grads, rtol=1e-4, atol=1e-4)
    for path, leaf in param_tree.flatten(grads[0]["params"]).items():
        # Keys moved by a constant leave the softmax as it is.
        assert "key/bias" in path or float(jnp.abs(leaf).max()) > 1e-3, path


def test_program_does_not_grow_with_depth() -> None:
    sizes = []
    for depth in (2, 12):
        deep = dataclasses.replace(TINY, num_layers=depth, num_decoder_layers=depth)
        model, params = started(deep)
        traced = jax.make_jaxpr(jax.grad(lambda p, m=model: m.apply(p, IDS, MASK, OUTPUT).sum()))(
            params
        )
        sizes.append(equations(traced.jaxpr))
    assert sizes[0] == sizes[1] > 50


def test_dropout_acts_only_while_training() -> None:
    model, params = started(TINY)
    rngs = {"dropout": jax.random.key(0)}
    run = jax.jit(model.apply, static_argnames="deterministic")
    quiet, dropped = (run(params, IDS, deterministic=d, rngs=rngs) for d in (True, False))
    assert float(jnp.abs(quiet - dropped).max()) > 0.1


@pytest.mark.long
def test_bfloat16_products_stay_near_float32() -> None:
    (model, params), (half, _) = (
        started(dataclasses.replace(PRE, dtype=dtype), 0.1) for dtype in (jnp.float32, jnp.bfloat16)
    )
    full, found = teacher_forced(model, params), teacher_forced(half, params)
    assert found.dtype == jnp.float32
    assert 1e-4 < float(jnp.abs(found - full).max() / jnp.abs(full).max()) < 0.05
    steps = replayed(half, params, IDS, MASK, OUTPUT)
    assert float(jnp.abs(steps - full).max() / jnp.abs(full).max()) < 0.05


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_heads": 3}, "model.num_heads=3 does not divide model.d_model=16"),
        ({"num_decoder_layers": 0}, "model.num_decoder_layers=0"),
        ({"norm_order": "middle"}, "model.norm_order='middle'"),
        ({"activation": "swishy"}, "swishy"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(TINY, **change)


def test_lengths_beyond_the_position_tables_are_refused() -> None:
    model, params = started(TINY)
    long = jnp.ones((1, 13), int)
    with pytest.raises(ValueError, match="input of 13 tokens.* 12 positions"):
        model.apply(params, long)
    with pytest.raises(ValueError, match="output of 13 tokens.* 12 positions"):
        model.apply(params, IDS[:1], None, long)
    with pytest.raises(ValueError, match="output of 13 tokens.* 12 positions"):
        model.apply(params, IDS, max_new_tokens=13, method="start")


# ---- against transformers


def published(kind: str, folder: pathlib.Path, name: str) -> tuple[Any, Any, Any]:
    """Hugging Face's random model, ours, and our parameters, through a file."""
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from tests.trunks import hugging_face

    sizes = dict(
        vocab_size=53, d_model=24, encoder_layers=2, decoder_layers=3, encoder_attention_heads=3,
        decoder_attention_heads=3, encoder_ffn_dim=40, decoder_ffn_dim=40, pad_token_id=1,
        max_position_embeddings=32, eos_token_id=2, decoder_start_token_id=2,
    )  # fmt: skip
    more = {"scale_embedding": True, "activation_function": "relu"} if kind == "MBart" else {}
    config = getattr(transformers, f"{kind}Config")(**sizes | more)
    theirs = hugging_face.randomized(getattr(transformers, f"{kind}{name}")(config))
    family, settings, variables = hugging_face.loaded(theirs, folder)
    assert family == "bart"
    return theirs, bart.BartModel(bart.BartConfig(**settings)), variables


BATCH = {
    "input_ids": np.asarray(RNG.integers(3, 53, (2, 9))),
    "attention_mask": np.asarray(MASK),
    "decoder_input_ids": np.asarray(RNG.integers(3, 53, (2, 5))),
    "decoder_attention_mask": np.asarray([[1] * 5, [1] * 3 + [0] * 2]),
}


@pytest.mark.parametrize("kind", ["Bart", "MBart"])
def test_logits_and_encoder_are_hugging_faces(kind: str, tmp_path: pathlib.Path) -> None:
    from tests.trunks import hugging_face

    theirs, model, variables = published(kind, tmp_path, "ForConditionalGeneration")
    assert model.config.logits_bias and np.asarray(theirs.final_logits_bias).any()
    expected = hugging_face.run(theirs, **BATCH)
    found = np.asarray(jax.jit(model.apply)(variables, **BATCH))
    assert np.abs(found - expected.logits.numpy()).max() < 1e-5 * np.abs(found).max()
    encoded = model.apply(variables, BATCH["input_ids"], MASK, method="encode")
    np.testing.assert_allclose(encoded, expected.encoder_last_hidden_state, rtol=1e-4, atol=1e-5)


def test_a_file_without_a_head_gives_the_same_hidden_states(tmp_path: pathlib.Path) -> None:
    from tests.trunks import hugging_face

    theirs, model, variables = published("Bart", tmp_path, "Model")
    assert not model.config.logits_bias
    expected = hugging_face.run(theirs, **BATCH)
    encoded = model.apply(variables, BATCH["input_ids"], MASK, method="encode")
    found = model.apply(
        variables, BATCH["decoder_input_ids"], encoded, MASK, BATCH["decoder_attention_mask"],
        method="decode",
    )  # fmt: skip
    np.testing.assert_allclose(found, expected.last_hidden_state, rtol=1e-4, atol=1e-5)


def test_the_loss_of_labels_is_hugging_faces(tmp_path: pathlib.Path) -> None:
    from tests.trunks import hugging_face

    theirs, model, variables = published("Bart", tmp_path, "ForConditionalGeneration")
    labels = np.where(BATCH["decoder_attention_mask"] == 1, BATCH["decoder_input_ids"], -100)
    given = {name: BATCH[name] for name in ("input_ids", "attention_mask")}
    expected = float(hugging_face.run(theirs, **given, labels=labels).loss)
    config = model.config
    shifted = bart.shift_right(jnp.asarray(labels), config.start_id, config.pad_id)
    log_probs = jax.nn.log_softmax(model.apply(variables, *given.values(), shifted))
    picked = np.take_along_axis(np.asarray(log_probs), np.maximum(labels, 0)[..., None], -1)[..., 0]
    assert -picked[labels >= 0].mean() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("num_beams", [1, 3])
def test_generated_tokens_are_hugging_faces(num_beams: int, tmp_path: pathlib.Path) -> None:
    from tests.trunks import hugging_face

    theirs, model, variables = published("Bart", tmp_path, "ForConditionalGeneration")
    settings = {"max_new_tokens": 7, "num_beams": num_beams, "pad_token_id": 1, "eos_token_id": 2}
    settings |= {"forced_bos_token_id": 9, "forced_eos_token_id": 2, "no_repeat_ngram_size": 2}
    ids = BATCH["input_ids"]
    expected = hugging_face.generate(theirs, ids, MASK, **settings)
    found = hugging_face.our_generation(model, variables, ids, MASK, **settings)
    hugging_face.same_sequences(found, expected, pad_id=1)
