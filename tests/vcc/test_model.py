"""Heads and losses against closed forms; exact sizes and costs of the published presets."""

import math
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodels.core import params as param_tree
from jaxmodels.core import partitioning
from jaxmodels.vcc import VccConfig, VccEncoder, VccWithHead, heads, layer_kinds, losses
from jaxmodels.vcc.model import gather_tokens
from jaxmodels.vcc.task import make_task
from tests.vcc import presets, small
from train.flops import count_flops

PARAMETERS = {
    "roberta_base_4k": (166_152_537, 126_906_624),
    "roberta_large_4k": (410_685_529, 358_112_256),
    "roberta_base_4k_dense": (166_055_001, 126_809_088),
    "roberta_base_512": (163_300_953, 124_055_040),
}


def count(config: Any) -> tuple[int, int]:
    """Parameters of the whole model and of its trunk; nothing is computed."""
    shapes = jax.eval_shape(make_task(config).init, jax.random.key(0))
    shapes = partitioning.unbox(shapes)
    return param_tree.count(shapes), param_tree.count(shapes["trunk"])


@pytest.mark.parametrize("preset", PARAMETERS)
def test_presets_have_the_published_number_of_parameters(
    preset: str, tmp_path: pathlib.Path
) -> None:
    config = presets.build(preset, data__files=(presets.text_file(tmp_path),))
    assert count(config) == PARAMETERS[preset]


@pytest.mark.parametrize(
    ("preset", "changes", "total"),
    [
        ("roberta_base_512", {"model__norm_order": "pre"}, 163_302_489),
        (
            "roberta_large_4k",
            {
                "model__encoder": "dense",
                "model__num_token_types": 1,
                "model__max_positions": 512,
                "data__length": 512,
                "data__objective": "plain",
            },
            406_885_465,
        ),
    ],
)
def test_dense_baselines_have_the_published_number_of_parameters(
    preset: str, changes: dict, total: int, tmp_path: pathlib.Path
) -> None:
    changes = changes | {"data__files": (presets.text_file(tmp_path),)}
    assert count(presets.build(preset, **changes))[0] == total


@pytest.mark.parametrize(
    ("n", "kinds", "vip", "fine", "published"),
    [
        (4096, layer_kinds(4, 8), 320, 44, 0.438e12),
        (4096, layer_kinds(4, 8), 256, 80, 0.526e12),
        (4096, ("dense",) * 12, 320, 44, 1.31e12),
    ],
)
def test_flops_of_an_encoder_are_those_of_the_cost_model(
    n: int, kinds: tuple[str, ...], vip: int, fine: int, published: float
) -> None:
    d, d_ff, g, m = 768, 3072, 512, (n - vip) // 16
    r = vip + 16 * fine + m - fine

    def layer(rows: int, keys: int) -> int:
        return 8 * rows * d * d + 4 * rows * keys * d + 4 * rows * d * d_ff

    select = 2 * vip * d * d + 2 * m * d * d + 2 * vip * m * d
    costs = {"local": layer(n, g), "vcc": layer(r, r) + select, "dense": layer(n, n)}
    expected = sum(costs[kind] for kind in kinds)
    assert expected == pytest.approx(published, rel=0.01)
    config = small.trunk(d_model=d, d_ff=d_ff, num_heads=12, num_layers=12, implementation="xla")
    settings = VccConfig(
        kinds=kinds, num_vip=vip, num_fine_blocks=fine, segment_length=g, layout="gather"
    )
    module, mask = VccEncoder(config, settings), jnp.ones((1, n))
    x = jax.ShapeDtypeStruct((1, n, d), jnp.float32)
    variables = jax.eval_shape(module.init, jax.random.key(0), x, mask, mask)
    found = count_flops(
        jax.make_jaxpr(lambda v, x: module.apply(v, x, mask, mask)[0])(variables, x)
    )
    assert found == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("length", [1, 7, 33])
def test_best_span_is_the_best_of_the_whole_grid(length: int) -> None:
    start, end = np.random.default_rng(length).normal(size=(2, 40, length)).astype(np.float32)
    first, last = jax.jit(losses.best_span)(start, end)
    grid = np.where(
        np.tril(np.ones((length, length), bool), -1), -np.inf, start[:, :, None] + end[:, None, :]
    )
    expected = np.unravel_index(grid.reshape(40, -1).argmax(1), (length, length))
    assert (first == expected[0]).all() and (last == expected[1]).all()


def test_cross_entropy_counts_what_has_a_label_by_its_weight() -> None:
    logits = jnp.log(jnp.array([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1], [0.2, 0.2, 0.6]]))
    found = losses.cross_entropy(logits, jnp.array([1, 1, -100]), jnp.array([2.0, 0.5, 9.0]))
    assert float(found["loss"][0]) == pytest.approx(2 * math.log(4) + 0.5 * math.log(1.25))
    assert float(found["loss"][1]) == float(found["accuracy"][1]) == 2.5
    assert float(found["accuracy"][0]) == 0.5
    nothing = losses.cross_entropy(logits, jnp.full(3, -100))
    assert float(losses.mean(nothing["loss"])) == 0.0


def test_invalid_candidates_never_win_and_cost_nothing() -> None:
    scores = jnp.array([[1.0, 5.0, 2.0]])
    found = losses.multiple_choice(scores, jnp.array([[1, 0, 1]]), jnp.array([2]))
    assert float(found["loss"][0]) == pytest.approx(math.log(1 + math.exp(-1)))
    assert float(found["accuracy"][0]) == 1


@pytest.mark.parametrize(
    ("predicted", "labels", "expected"),
    [
        ([1, 1, 0, 1], [1, 0, 1, -100], 0.5),
        ([1, 0], [1, 0], 1.0),
        ([0, 0], [1, 1], 0.0),
        ([1, 1, 1, 0], [1, 1, 0, 0], 0.8),
    ],
)
def test_binary_f1_of_counted_labels(
    predicted: list[int], labels: list[int], expected: float
) -> None:
    found = losses.binary_f1(jnp.array(predicted), jnp.array(labels))
    assert float(found) == pytest.approx(expected, abs=1e-5)


def test_hotpotqa_loss_reads_first_answer_positions_and_no_padding() -> None:
    logits = heads.HotpotQALogits(
        *(jax.random.normal(jax.random.key(i), s)
          for i, s in enumerate([(2, 6, 2), (2, 6, 2), (2, 3), (2, 6, 2)]))
    )  # fmt: skip
    mask = jnp.array([[1] * 6, [1, 1, 1, 1, 0, 0]])
    labels = {
        "paragraph_positions": jnp.array([[1, 3], [2, 0]]),
        "paragraph_labels": jnp.array([[0, 1], [1, -100]]),
        "sentence_positions": jnp.array([[4], [3]]),
        "sentence_labels": jnp.array([[1], [0]]),
        "answer_type": jnp.array([2, 0]),
        "start": jnp.array([[2, 4], [-100, -100]]),
        "end": jnp.array([[3, 5], [-100, -100]]),
    }
    loss, named = losses.hotpotqa(logits, mask, labels)

    def nll(row: jax.Array, label: int) -> float:
        return float(jax.nn.logsumexp(row) - row[label])

    p, s, t, span = logits.paragraph, logits.sentence, logits.answer_type, logits.span
    expected = (nll(span[0, :, 0], 2) + nll(span[0, :, 1], 3)) / 2
    expected += (nll(t[0], 2) + nll(t[1], 0)) / 2 + (nll(s[0, 4], 1) + nll(s[1, 3], 0)) / 2
    expected += (nll(p[0, 1], 0) + nll(p[0, 3], 1) + nll(p[1, 2], 1)) / 3
    assert float(loss) == pytest.approx(expected, rel=1e-5)
    assert float(named["paragraph_loss"][1]) == 3 and float(named["start_loss"][1]) == 1
    start, end = losses.span_logits(logits, mask)
    assert (start[1, 4:] < -9e4).all() and (end[0] == span[0, :, 1]).all()


@pytest.mark.parametrize(
    ("head", "shape"),
    [("mlm_head", (2, 3, 50)), ("classifier", (2, 2)), ("classification", (2, 5))],
)
def test_heads_read_the_hidden_states_they_are_told_to(head: str, shape: tuple[int, ...]) -> None:
    module = VccWithHead(small.trunk(), small.vcc(), head, num_classes=5)
    ids = jax.random.randint(jax.random.key(0), (2, 28), 5, 50)
    batch = {"input_ids": ids, "attention_mask": ids * 0 + 1, "vip_mask": jnp.arange(28) * ids < 9}
    batch |= {
        "masked_positions": jnp.array([[3, 9, 1], [4, 4, 27]]),
        "candidate_positions": jnp.array([[5, 6], [0, 13]]),
    }
    params = small.drawn(module.init, batch, size=0.1)["params"]
    found = jax.jit(module.apply)({"params": params}, batch)
    assert found.shape == shape and set(params) == {"trunk", head}
    hidden, _ = module.bind({"params": params}).body(*list(batch.values())[:3])
    own = params[head]
    if head == "classifier":
        states = gather_tokens(hidden, batch["candidate_positions"])
        expected = (states @ own["kernel"])[..., 0]
    elif head == "classification":
        inner = jnp.tanh(hidden[:, 0] @ own["dense"]["kernel"])
        expected = inner @ own["out_proj"]["kernel"]
    else:
        states = jnp.stack([hidden[i, batch["masked_positions"][i]] for i in range(2)])
        inner = jax.nn.gelu(states @ own["dense"]["kernel"], approximate=False)
        inner = inner - inner.mean(-1, keepdims=True)
        inner = inner / jnp.sqrt(jnp.square(inner).mean(-1, keepdims=True) + 1e-5)
        expected = inner @ own["decoder"]["kernel"]
    np.testing.assert_allclose(found, expected, atol=2e-5)


def test_an_unknown_head_is_refused_with_the_known_ones() -> None:
    module = VccWithHead(small.trunk(), small.vcc(), "ner")
    with pytest.raises(ValueError, match="ner.*mlm_head, classifier, classification, hotpotqa"):
        jax.eval_shape(module.init, jax.random.key(0), {})
