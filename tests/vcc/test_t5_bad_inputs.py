"""Rows of the table of bad inputs that reach VCC-T5: what is given, and what comes of it."""

import functools
import logging
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodels import weights
from jaxmodels.core.losses import IGNORE, cross_entropy
from jaxmodels.trunks import t5
from jaxmodels.vcc import VccT5
from jaxmodels.weights.t5 import t5_rules
from tests.vcc import small, small_t5

CONFIG = small_t5.RELU
MIXED = small.vcc(("local", "vcc", "vcc"))


@pytest.fixture(scope="module")
def params() -> Any:
    return small_t5.params(CONFIG)


def test_length_that_fits_no_segment_or_block_is_padded_and_cut(params: Any) -> None:
    given = small_t5.inputs(2, 27)
    found, opened = small_t5.encode(CONFIG, MIXED, params, given)
    assert found.shape == (2, 27, 16) and opened["order"].shape == (2, 28)
    longer = {name: jnp.pad(x, ((0, 0), (0, 1))) for name, x in given.items()}
    expected, _ = small_t5.encode(CONFIG, MIXED, params, longer)
    np.testing.assert_allclose(found, expected[:, :27], atol=1e-5)


@pytest.mark.parametrize("fine", [0, 37])
def test_opening_no_block_or_more_than_there_are_is_legal(
    fine: int, params: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        found, opened = small_t5.encode(
            CONFIG, small.vcc(num_fine_blocks=fine), params, small_t5.inputs()
        )
    assert jnp.isfinite(found).all() and opened["fine_blocks"].shape == (3, 2, min(fine, 6))
    assert ("every block is opened" in caplog.text) == (fine == 37)


@pytest.mark.parametrize("vips", [0, 9], ids=["none", "more than slots"])
def test_rows_without_vips_or_with_too_many_are_defined(vips: int, params: Any) -> None:
    given = small_t5.inputs()
    given["vip_mask"] = jnp.broadcast_to(jnp.arange(28) < vips, (2, 28)).astype(jnp.int32)
    found, opened = small_t5.encode(CONFIG, small.vcc(), params, given)
    assert jnp.isfinite(found).all()
    if not vips:
        assert (opened["fine_blocks"] == jnp.array([0, 1])).all()
        return
    # The last five lose their vote and their slot; whether they are marked or not is the same.
    given["vip_mask"] = given["vip_mask"].at[:, 4:].set(0)
    np.testing.assert_array_equal(found, small_t5.encode(CONFIG, small.vcc(), params, given)[0])


def test_fully_padded_row_is_finite_and_out_of_the_loss(params: Any) -> None:
    given, model = small_t5.inputs(), VccT5(CONFIG, MIXED)
    mask = jnp.asarray([[1] * 28, [0] * 28])
    given |= {"attention_mask": mask, "vip_mask": given["vip_mask"] * mask}
    labels = jnp.array([[5, 9, 1], [IGNORE] * 3])

    @functools.partial(jax.jit, compiler_options=small_t5.QUICK)
    @jax.value_and_grad
    def loss(params: Any, ids: jax.Array) -> jax.Array:
        inputs = t5.shift_right(labels)
        more = given | {"input_ids": ids, "decoder_input_ids": inputs}
        total, weight = cross_entropy(model.apply({"params": params}, **more), labels)["loss"]
        return total / weight

    value, bar = loss(params, given["input_ids"])
    other, _ = loss(params, given["input_ids"].at[1].set(7))
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(bar))
    assert float(value) == float(other) > 0


def test_opened_padding_changes_nothing_for_real_tokens(params: Any) -> None:
    given = small_t5.inputs(2, 28, 12)  # two blocks are real: k beyond them opens padding
    found = [
        small_t5.encode(CONFIG, small.vcc(num_fine_blocks=k), params, given)[0][:, :12]
        for k in (2, 4)
    ]
    np.testing.assert_allclose(found[1], found[0], atol=2e-5)


@pytest.mark.parametrize("kind", [bool, np.float32])
def test_masks_of_any_numeric_type_are_taken(kind: type, params: Any) -> None:
    given = small_t5.inputs(2, 28, 21)
    other = {k: v.astype(kind) if k.endswith("mask") else v for k, v in given.items()}
    found, expected = (small_t5.encode(CONFIG, MIXED, params, g)[0] for g in (other, given))
    np.testing.assert_array_equal(found, expected)


def test_missing_and_misshapen_weights_are_all_listed(params: Any) -> None:
    rules = t5_rules(gated=False, tied_head=True)
    tensors = dict(weights.export_weights(params, rules))
    del tensors["encoder.block.1.layer.0.layer_norm.weight"]
    tensors["encoder.final_layer_norm.weight"] = np.zeros(17, np.float32)
    tensors["stray"] = np.zeros(1)
    with pytest.raises(weights.WeightsError) as error:
        weights.import_weights(params, tensors, rules)
    told = " ".join(error.value.problems)
    assert all(word in told for word in ("encoder.block.1.layer.0.layer_norm", "stray", "(17,)"))
