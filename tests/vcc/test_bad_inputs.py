"""Every row of the method's table of bad inputs: what is given, and what has to come of it."""

import functools
import logging
import pathlib
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodels import weights
from jaxmodels.core import params as param_tree
from jaxmodels.core.embeddings import grow_position_table
from jaxmodels.vcc import VccConfig, VccRoberta, check_inputs, compression, losses
from jaxmodels.vcc.task import make_task
from tests.vcc import presets, small

ROW = np.array([[1, 1, 1, 1, 0, 0]])


def built(settings: VccConfig, n: int = 28, **changes: Any) -> tuple[VccRoberta, Any, dict]:
    """A tiny model, its parameters, and inputs whose first two tokens are VIP."""
    module = VccRoberta(small.trunk(**changes), settings)
    ids = jax.random.randint(jax.random.key(0), (2, n), 5, 50)
    vip = jnp.broadcast_to(jnp.arange(n) < 2, (2, n)).astype(jnp.int32)
    given = {"input_ids": ids, "attention_mask": jnp.ones_like(ids), "vip_mask": vip}
    return module, small.drawn(module.init, *given.values(), size=0.1), given


@pytest.mark.parametrize(("n", "slots", "size"), [(27, 4, 4), (3, 4, 4), (64, 5, 16)])
def test_length_that_fits_no_block_is_named_with_slots_and_block_size(
    n: int, slots: int, size: int
) -> None:
    x = jnp.zeros((1, n, 8))
    with pytest.raises(ValueError) as error:
        compression.enter(x, x[..., 0] + 1, x[..., 0], slots, size)
    assert all(word in str(error.value) for word in (f"n={n}", f"p={slots}", f"b={size}"))


@pytest.mark.slow
def test_length_that_fits_no_segment_or_block_is_padded_by_the_model() -> None:
    module, params, given = built(small.vcc(("local", "vcc", "vcc")), n=27)
    hidden, opened = jax.jit(module.apply)(params, **given)
    assert hidden.shape == (2, 27, 16) and opened["order"].shape == (2, 28)
    assert jnp.isfinite(hidden).all()


def test_more_blocks_to_open_than_there_are_opens_all_with_a_note(
    caplog: pytest.LogCaptureFixture,
) -> None:
    settings = small.vcc(num_fine_blocks=37)
    assert settings.compressed_length(28) == 4 + 6 * 4
    module, params, given = built(settings)
    with caplog.at_level(logging.INFO):
        _, opened = jax.jit(module.apply)(params, **given)
    assert (jnp.sort(opened["fine_blocks"]) == jnp.arange(6)).all()
    assert "37" in caplog.text and "6 blocks" in caplog.text


@pytest.mark.parametrize("fine", [0, 6])
def test_opening_no_block_and_opening_all_are_legal(fine: int) -> None:
    module, params, given = built(small.vcc(num_fine_blocks=fine))
    hidden, opened = jax.jit(module.apply)(params, **given)
    assert opened["fine_blocks"].shape == (3, 2, fine) and jnp.isfinite(hidden).all()
    assert small.vcc(num_fine_blocks=fine).compressed_length(28) == 4 + 4 * fine + 6 - fine


def test_row_without_vip_opens_the_first_blocks_and_warns_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jaxmodels.vcc.inputs._warned", set())
    module, params, given = built(small.vcc())
    given["vip_mask"] = jnp.zeros_like(given["vip_mask"])
    _, opened = jax.jit(module.apply)(params, **given)
    assert (opened["fine_blocks"] == jnp.array([0, 1])).all()
    for _ in range(2):
        mask, vip = check_inputs(ROW, np.zeros_like(ROW), num_vip=4)
        assert mask.sum() == 4 and vip.sum() == 0
    assert caplog.text.count("no VIP token") == 1


@pytest.mark.parametrize("policy", ["error", "warn", "demote"])
def test_more_vips_than_slots_follow_the_policy_with_counts(
    policy: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jaxmodels.vcc.inputs._warned", set())
    vip = np.array([[1, 1, 1, 0, 0, 0]])
    message = r"3 VIP tokens.*num_vip=2"
    if policy == "error":
        with pytest.raises(ValueError, match=message):
            check_inputs(ROW, vip, 2, policy)
        return
    _, kept = check_inputs(ROW, vip, 2, policy)
    assert (kept == vip).all()
    assert bool(re.search(message, caplog.text)) == (policy == "warn")


@pytest.mark.parametrize("policy", ["error", "warn", "demote"])
def test_a_vip_on_padding_is_refused_with_its_count(policy: str) -> None:
    with pytest.raises(ValueError, match="2 VIP tokens lie on padding"):
        check_inputs(ROW, np.array([[1, 0, 0, 0, 1, 1]]), 4, policy)


@pytest.mark.slow
def test_fully_padded_row_is_finite_zero_and_out_of_the_loss() -> None:
    module, params, given = built(small.vcc(("local", "vcc", "vcc")))
    mask = jnp.asarray([[1] * 28, [0] * 28])
    given |= {"attention_mask": mask, "vip_mask": given["vip_mask"] * mask}
    labels = jnp.where(mask == 1, given["input_ids"], losses.IGNORE)

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def loss(params: Any, ids: Any) -> tuple[jax.Array, jax.Array]:
        hidden, _ = module.apply(params, **(given | {"input_ids": ids}))
        table = params["params"]["embeddings"]["word"]["embedding"]
        return losses.mean(losses.cross_entropy(hidden @ table.T, labels)["loss"]), hidden

    ids = np.asarray(given["input_ids"])
    (value, hidden), bar = jax.device_get(loss(params, ids))
    assert np.isfinite(hidden).all() and (hidden[1, 4:] == 0).all()
    (other, _), _ = loss(params, np.stack([ids[0], np.full_like(ids[1], 7)]))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(bar))
    assert float(value) == float(other) > 0


@pytest.mark.parametrize("kind", [bool, np.int64, np.float32, np.uint8])
def test_masks_of_any_numeric_type_are_taken(kind: type) -> None:
    vip = np.array([[1, 0, 0, 1, 0, 0]])
    mask, found = check_inputs(ROW.astype(kind), vip.astype(kind), 4)
    assert mask.dtype == found.dtype == np.int32
    assert (mask == ROW).all() and (found == vip).all()


@pytest.mark.parametrize("bad", [2, -1, 0.5, np.nan])
@pytest.mark.parametrize("name", ["attention_mask", "vip_mask"])
def test_values_other_than_zero_and_one_are_refused_by_name(name: str, bad: float) -> None:
    given = {"attention_mask": np.ones((1, 4)), "vip_mask": np.zeros((1, 4))}
    given[name][0, 1] = bad
    with pytest.raises(ValueError, match=f"{name} holds {bad}"):
        check_inputs(**given, num_vip=2)


def test_masks_of_different_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(1, 6\).*\(1, 5\)"):
        check_inputs(ROW, ROW[:, :5], 4)


@pytest.mark.slow
def test_input_longer_than_the_position_table_names_size_and_remedy() -> None:
    module, params, given = built(small.vcc(), max_positions=28)
    longer = {name: jnp.pad(x, ((0, 0), (0, 2))) for name, x in given.items()}
    with pytest.raises(ValueError, match=r"30 tokens.*28 positions.*grow_position_table"):
        module.apply(params, **longer)
    grown = grow_position_table(params["params"]["embeddings"]["position"]["embedding"], 34)
    params["params"]["embeddings"]["position"]["embedding"] = grown
    hidden, _ = VccRoberta(small.trunk(max_positions=32), small.vcc()).apply(params, **longer)
    assert jnp.isfinite(hidden).all()


def test_missing_extra_and_misshapen_weights_are_all_listed() -> None:
    _, params, _ = built(small.vcc())
    rules = weights.vcc_rules(prefix="", trunk="")
    tensors = weights.export_weights(params["params"], rules)
    again = weights.import_weights(params["params"], tensors, rules)
    assert param_tree.count(again) == param_tree.count(params["params"])
    wrong = {k: v for k, v in tensors.items() if k != "encoder.layer.1.FFN.1.bias"}
    wrong["embeddings.word_embeddings.weight"] = np.zeros((60, 16), np.float32)
    with pytest.raises(weights.WeightsError) as error:
        weights.import_weights(params["params"], wrong | {"stray": np.zeros(1)}, rules)
    told = " ".join(error.value.problems)
    assert all(w in told for w in ("encoder.layer.1.FFN.1.bias", "stray", "(60, 16)", "(50, 16)"))


def test_block_size_one_compresses_nothing_but_the_official_epsilon() -> None:
    x, mask, vip = small.states()
    state, layout = small.enter(x, mask, vip, 4, 1)
    rows = jnp.take_along_axis(x, layout.order[..., None], axis=1)[:, 4:]
    np.testing.assert_allclose(state.coarse, rows / (1 + 1e-4), rtol=1e-6)
    np.testing.assert_allclose(small.leave(state, layout), x, atol=1e-6)


def checked(config: Any) -> None:
    """What the trainer does before anything is compiled: the task, and the shapes of its start."""
    jax.eval_shape(make_task(config).init, jax.random.key(0))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_vip": 0}, "model.num_vip=0"),
        ({"block_size": 0}, "model.block_size=0"),
        ({"num_fine_blocks": -1}, "model.num_fine_blocks=-1"),
        ({"segment_length": 0}, "model.segment_length=0"),
        ({"explore_prob": 1.5}, "model.explore_prob=1.5"),
        ({"selector": "best"}, "attention, random"),
        ({"layout": "fast"}, "static, gather"),
        ({"overflow": "ignore"}, "error, warn, demote"),
        ({"kinds": ("vcc", "sparse")}, "local, vcc, dense"),
    ],
)
def test_settings_of_compression_out_of_range_are_refused(change: dict, words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        small.vcc(**change)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model__num_heads": 5}, "num_heads=5"),
        ({"model__num_local_layers": 4}, "num_local_layers=4 exceeds model.num_layers=3"),
        ({"model__layer_kinds": ("vcc",)}, "names 1 layers"),
        ({"model__layer_kinds": ("sparse",) * 3}, "local | vcc | dense"),
        ({"model__norm_order": "post"}, "norm_order='post'"),
        ({"data__questions": 3, "model__num_vip": 16}, "22 VIP tokens"),
        ({"model__positions": "text"}, "exceeds model.max_positions=32"),
        ({"data__name": "wikipedia"}, "text_lines | pydoc_facts"),
        ({"data__curriculum_steps": (5,)}, "different numbers of stages"),
        ({"total_steps": 100}, "steps of total_steps=100"),
        ({"model__num_vip": 0}, "> 0"),
        ({"model__explore_prob": -0.1}, "0 to 1"),
        ({"data__length": 16}, ">= 32"),
        ({"data__fact_groups": 40}, "fact_groups"),
        ({"model__d_model": 16, "model__num_heads": 2}, "model.d_model=16"),
    ],
)
def test_quickstart_with_bad_settings_is_refused_before_any_compilation(
    change: dict, words: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        checked(presets.build("quickstart", **change))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"data__files": ()}, "data.files is empty"),
        ({"data__files": ("no/such/*.txt",)}, "no/such/*.txt"),
        ({"data__validation_files": ("gone.txt",)}, "gone.txt"),
        ({"data__tokenizer": "gone.json"}, "gone.json"),
        ({"data__num_masked": 9}, "exceeds model.num_vip=8"),
        ({"data__length": 97}, "exceeds model.max_positions=96"),
        ({"data__num_masked": 40, "model__num_vip": 40}, "num_masked is 40"),
        ({"model__positions": "segment"}, "positions=segment"),
        ({"model__norm_order": "post"}, "norm_order='post'"),
        ({"model__num_token_types": 1}, "num_token_types"),  # a type for each shuffled segment
    ],
)
def test_text_presets_with_bad_settings_are_refused_before_any_compilation(
    tmp_path: pathlib.Path, change: dict, words: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        checked(presets.tiny_text(tmp_path, **change))
