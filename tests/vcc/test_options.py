"""What goes beyond the published method: each option by what it must equal, and what it refuses."""

import dataclasses
import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodels import decoding
from jaxmodels.vcc import VccT5, compression, opened
from jaxmodels.vcc.layer import RelativePositions, VccLayer, enter_rows, run_sharing_layers
from jaxmodels.vcc.rows import scatter_rows
from tests.vcc import small, small_t5

CONFIG = small_t5.RELU
PARAMS = functools.partial(small_t5.params, CONFIG)


def relative(found: Any, expected: Any) -> float:
    return float(jnp.abs(found - expected).max() / jnp.abs(expected).max())


def chosen(share: float, **changes: Any) -> compression.Selection:
    """Five blocks with 0.1, 0.5, 0.0, 0.3, 0.1 of the votes, and a last one of padding."""
    weights = jnp.array([0.1, 0.5, 0.0, 0.3, 0.1, 0.0])[None, None, None]
    layout = compression.Layout(
        jnp.zeros((1, 13), jnp.int32), jnp.ones((1, 1)), jnp.ones((1, 1)), jnp.ones((1, 6, 2))
    )
    return compression.select(weights, layout, 4, open_share=share, **changes)


@pytest.mark.parametrize(
    ("share", "fine"),
    [(0.4, [1, 5, 5, 5]), (0.7, [1, 3, 5, 5]), (0.85, [1, 3, 0, 5]), (1.0, [1, 3, 0, 4])],
)
def test_blocks_are_opened_until_they_have_the_share(share: float, fine: list[int]) -> None:
    assert chosen(share).fine.tolist() == [fine]


def test_a_random_order_opens_all_k() -> None:
    noise = jnp.array([[0.1, 0.2, 0.9, 0.3, 0.8, 0.0]])
    assert chosen(0.4, order_by=noise).fine.tolist() == [[2, 4, 3, 1]]
    kept = chosen(0.4, order_by=noise, explored=jnp.array([False]))
    assert kept.fine.tolist() == [[1, 5, 5, 5]]


def gradients(settings: Any, given: dict) -> tuple[Any, Any]:
    """States and trace, and the gradient of a loss on real tokens by the encoder's parameters."""

    @functools.partial(jax.jit, compiler_options=small_t5.QUICK)
    @functools.partial(jax.value_and_grad, has_aux=True)
    def loss(encoder: Any) -> tuple[jax.Array, Any]:
        y, trace = small_t5.states(CONFIG, settings, PARAMS() | {"encoder": encoder}, given)
        return (jnp.sin(3 * y) * given["attention_mask"][..., None]).sum(), (y, trace)

    (_, outputs), bar = loss(PARAMS()["encoder"])
    return outputs, bar


@pytest.mark.long
def test_slots_left_over_change_nothing_forward_or_backward() -> None:
    """So small a share opens one block a layer: as k = 1, though shapes are those of k = 4."""
    given = small_t5.inputs(real=25)
    (found, trace), bar = gradients(small.vcc(num_fine_blocks=4, open_share=1e-6), given)
    (expected, one), bar_one = gradients(small.vcc(num_fine_blocks=1), given)
    np.testing.assert_array_equal(trace["fine_blocks"][..., :1], one["fine_blocks"])
    assert (trace["fine_blocks"][..., 1:] == -1).all()
    real = given["attention_mask"][..., None]
    assert relative(found * real, expected * real) < 1e-5
    chex.assert_trees_all_close(bar, bar_one, rtol=1e-3, atol=2e-4)
    assert [len(layer) for layer in opened.block_ranges(trace, small.vcc())] == [1, 1, 1]


@pytest.mark.long
@pytest.mark.parametrize("keep", ["static", "gather"])
def test_shared_blocks_stay_open_as_if_closed_and_opened_again(keep: str) -> None:
    settings = small.vcc(layout=keep)
    layer = CONFIG.make_layer(cls=VccLayer, vcc=settings)
    params = PARAMS()["encoder"]
    x, mask, vip = small.states(real=25)
    relative_bias = RelativePositions(params["relative_bias"], CONFIG.make_bias())

    def run(shared: bool, stacked: Any) -> Any:
        places = jnp.broadcast_to(jnp.arange(28), mask.shape)
        state, layout = compression.enter(x, mask, vip, 4, 4, places)
        if shared:
            given = (layer, stacked, state, layout, None, "none", relative_bias)
            state, chosen = run_sharing_layers(*given)
            return compression.leave(state, layout), chosen.fine
        chosen = None
        for i in range(3):
            one = {"params": jax.tree.map(lambda leaf, i=i: leaf[i], stacked)}
            if chosen is None:
                chosen = layer.apply(
                    one, state, layout, None, False, relative_bias, method="choose"
                )
            rows = enter_rows(settings, state, layout, chosen)
            y = layer.apply(one, rows, True, relative_bias, method="encode")
            state = scatter_rows(state, layout, chosen, y)
        return compression.leave(state, layout), chosen.fine

    @functools.partial(jax.jit, static_argnums=0, compiler_options=small_t5.QUICK)
    def both(shared: bool, stacked: Any) -> Any:
        def loss(stacked: Any) -> Any:
            y, fine = run(shared, stacked)
            return (jnp.sin(3 * y) * mask[..., None]).sum(), (y, fine)

        return jax.value_and_grad(loss, has_aux=True)(stacked)

    (_, (found, fine)), bar = both(True, params["layers"])
    (_, (expected, again)), bar_expected = both(False, params["layers"])
    np.testing.assert_array_equal(fine, again)
    assert relative(found * mask[..., None], expected * mask[..., None]) < 1e-5
    for have, want in zip(*map(jax.tree.leaves, (bar, bar_expected)), strict=True):
        assert relative(have, want) < 1e-3


@pytest.mark.slow
def test_layers_share_in_groups_and_the_rest_among_themselves() -> None:
    settings, given = small.vcc(share_selection=2, num_fine_blocks=2), small_t5.inputs(real=25)
    trace = small_t5.encode(CONFIG, settings, PARAMS(), given)[1]
    fine = np.asarray(trace["fine_blocks"])
    alone = small_t5.encode(CONFIG, small.vcc(), PARAMS(), given)[1]["fine_blocks"]
    assert fine.shape == (3, 2, 2) and trace["scores"].shape == (3, 2, 6)
    np.testing.assert_array_equal(fine[0], alone[0])
    np.testing.assert_array_equal(fine[0], fine[1])
    assert (fine[2] != fine[0]).any()


def logits(model: VccT5, given: dict, labels: jax.Array) -> jax.Array:
    run = functools.partial(model.apply, {"params": PARAMS()})
    call = jax.jit(lambda: run(**given, decoder_input_ids=labels), compiler_options=small_t5.QUICK)
    return call()


@pytest.mark.long
def test_a_decoder_reads_the_rows_as_it_reads_the_tokens_where_all_are_open() -> None:
    given, labels = small_t5.inputs(real=25), jnp.array([[0, 3, 7]] * 2)
    tokens, rows = (
        logits(VccT5(CONFIG, small.vcc(num_fine_blocks=6, cross_attention=to)), given, labels)
        for to in ("tokens", "rows")
    )
    assert relative(rows, tokens) < 1e-5
    model = VccT5(CONFIG, small.vcc(num_fine_blocks=1, cross_attention="rows"))
    compressed = logits(model, given, labels)
    assert 1e-4 < relative(compressed, tokens)
    generator = decoding.Generator(model, decoding.GenerationSettings(max_new_tokens=2))
    first = generator(PARAMS(), **given).sequences[:, 1]
    np.testing.assert_array_equal(first, compressed[:, 0].argmax(-1))


def test_a_block_mean_counts_as_many_keys_as_it_has_tokens() -> None:
    given = small_t5.inputs(real=22)
    settings = small.vcc(num_fine_blocks=1, cross_attention="rows")
    rows, trace = small_t5.encode(CONFIG, settings, PARAMS(), given)
    bias = trace["key_bias"]
    assert rows.shape == (2, 4 + 6 + 4, 16) and bias.shape == (2, 14)
    for row, fine in zip(np.asarray(bias), np.asarray(trace["fine_blocks"][-1, :, 0]), strict=True):
        counts = np.array([4, 4, 4, 4, 2, 0.0])  # 18 real tokens behind the four slots
        closed = np.arange(6) != fine
        found = np.exp(row[4:10])[closed]
        np.testing.assert_allclose(found, np.where(counts > 0, counts, 0)[closed], atol=2e-3)
        assert row[4:10][fine] <= -1e9


@pytest.mark.slow
def test_a_document_encoded_once_answers_as_one_encoded_with_its_question() -> None:
    settings = small.vcc(("local", "vcc", "vcc"), question_apart=True)
    model = VccT5(CONFIG, settings)
    given = small_t5.inputs(2, 27, 25)
    question = jnp.array([[1, 1, 1, 0], [1, 1, 1, 1]])
    given["attention_mask"] = given["attention_mask"].at[:, :4].set(question)
    given["vip_mask"] = jnp.pad(question, ((0, 0), (0, 23)))
    expected, trace = small_t5.encode(CONFIG, settings, PARAMS(), given)
    run = functools.partial(model.apply, {"params": PARAMS()})
    ids, mask = given["input_ids"], given["attention_mask"]
    document = jax.jit(lambda: run(ids[:, 4:], mask[:, 4:], method="encode_document"))()
    answer = jax.jit(
        lambda document, ids, mask: run(
            ids, mask, vip_mask=mask, document=document, method="encode_traced"
        )
    )
    found, again = answer(document, ids[:, :4], question)
    assert relative(found, expected) < 1e-6 and found.shape == expected.shape
    chex.assert_trees_all_equal(again["fine_blocks"], trace["fine_blocks"])
    first = jax.tree.map(lambda leaf: leaf[:1], document)  # two questions about one document
    both, _ = answer(first, ids[:, :4], question)
    assert relative(both[:1], expected[:1]) < 1e-6
    np.testing.assert_array_equal(document.behind(question), mask)


@pytest.mark.slow
def test_a_question_that_fills_slots_and_segments_is_no_different_apart() -> None:
    given = small_t5.inputs(2, 32, 30)
    given["vip_mask"] = jnp.zeros((2, 32), jnp.int32).at[:, :8].set(1)
    sizes = {"num_vip": 8, "segment_length": 8}
    found, expected = (
        small_t5.encode(
            CONFIG, small.vcc(("local", "vcc", "vcc"), question_apart=on, **sizes), PARAMS(), given
        )[0]
        for on in (True, False)
    )
    real = given["attention_mask"][..., None]
    assert relative(found * real, expected * real) < 1e-5


@pytest.mark.long
def test_a_generator_answers_from_a_document() -> None:
    settings = small.vcc(question_apart=True)
    given = small_t5.inputs(2, 28)
    given["vip_mask"] = jnp.zeros((2, 28), jnp.int32).at[:, :4].set(1)
    model = VccT5(CONFIG, settings)
    generator = decoding.Generator(model, decoding.GenerationSettings(max_new_tokens=3))
    expected = generator(PARAMS(), **given).sequences
    ids, mask = given["input_ids"], given["attention_mask"]
    document = model.apply({"params": PARAMS()}, ids[:, 4:], mask[:, 4:], method="encode_document")
    found = generator(
        PARAMS(), ids[:, :4], mask[:, :4], vip_mask=mask[:, :4], document=document
    ).sequences
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (dict(open_share=0.0), "open_share=0.0: must be above 0"),
        (dict(open_share=0.5, layout="gather"), "needs model.layout='static'"),
        (dict(open_share=0.5, selector="random"), "'static' and 'random'"),
        (dict(share_selection=0), "share_selection=0: must be at least 1"),
        (dict(cross_attention="blocks"), "use one of tokens, rows"),
        (dict(cross_attention="rows", kinds=("vcc", "dense")), "needs a VCC layer at the end"),
        (dict(question_apart=True, kinds=("vcc", "local")), "needs local layers first"),
        (dict(question_apart=True, kinds=("local",)), "needs local layers first"),
    ],
)
def test_options_that_do_not_fit_are_refused(changes: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        dataclasses.replace(small.vcc(), **changes)


def test_a_document_where_none_is_wanted_is_refused() -> None:
    ids, run = jnp.ones((1, 12), jnp.int32), {"params": PARAMS()}
    plain, apart = (VccT5(CONFIG, small.vcc(question_apart=on)) for on in (False, True))
    with pytest.raises(ValueError, match="encode_document needs model.question_apart=True"):
        jax.eval_shape(lambda: plain.apply(run, ids, method="encode_document"))
    document = jax.eval_shape(lambda: apart.apply(run, ids, method="encode_document"))
    for model, length, said in (
        (plain, 4, "a document without model.question_apart"),
        (apart, 3, "3 tokens beside a document: .*wants model.num_vip=4 tokens"),
    ):
        with pytest.raises(ValueError, match=said):
            jax.eval_shape(
                lambda document, model=model, length=length: model.apply(
                    run, ids[:, :length], vip_mask=ids[:, :length], document=document,
                    method="encode_traced",
                ),
                document,
            )  # fmt: skip
