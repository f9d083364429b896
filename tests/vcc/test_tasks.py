"""The two tasks as the trainer sees them: gradients, metrics that add up, and predictions."""

import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodels.core import params as param_tree
from jaxmodels.core import partitioning
from jaxmodels.core.task import Task
from jaxmodels.data import facts_text, tokenizer
from jaxmodels.vcc import VccRoberta, initialization, losses, settings
from jaxmodels.vcc.facts_task import FactsTask
from jaxmodels.vcc.task import make_task
from tests.vcc import presets, small

Started = tuple[Any, Any]


def start(task: Task) -> Any:
    return partitioning.unbox(jax.jit(task.init)(jax.random.key(0)))


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("facts"))


@pytest.fixture(scope="module")
def facts(data_dir: str) -> Started:
    task = make_task(presets.tiny_facts(data__dir=data_dir))
    return task, start(task)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Started:
    folder = tmp_path_factory.mktemp("text")
    files = (presets.text_file(folder, 60),)
    task = make_task(presets.tiny_text(folder, data__validation_files=files))
    return task, start(task)


@pytest.fixture(params=["facts", "text"])
def started(request: pytest.FixtureRequest) -> Started:
    return request.getfixturevalue(request.param)


def batches(task: Task, split: str) -> Any:
    return ({name: jnp.asarray(x) for name, x in b.items()} for b in iter(task.datasets(split)))


def test_every_parameter_gets_a_finite_gradient(started: Started) -> None:
    task, params = started
    batch = next(batches(task, "train"))

    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    @functools.partial(jax.value_and_grad, has_aux=True)
    def gradient(params: Any) -> Any:
        return task.loss(params, batch, jax.random.key(1))

    (loss, metrics), bars = gradient(params)
    total, weight = metrics["loss"]
    assert float(loss) == pytest.approx(float(total) / float(weight), rel=1e-4)
    assert 0 < float(loss) < 20
    unused = {"trunk/encoder/layers/attention/key/bias"}  # a softmax does not see it
    for path, bar in param_tree.flatten(bars).items():
        assert jnp.isfinite(bar).all(), path
        assert path in unused or float(jnp.abs(bar).max()) > 0, path
    groups = param_tree.flatten(task.param_groups(params))
    assert groups["trunk/encoder/layers/ffn/wi/kernel"] == "decay"
    assert groups["trunk/encoder/layers/ffn_norm/scale"] == "no_decay"


def test_metrics_of_split_batches_add_up_and_padded_rows_count_nothing(started: Started) -> None:
    task, params = started
    evaluator = task.evaluators()["validation"]
    run = jax.jit(evaluator.metrics)
    batch = {name: jnp.asarray(x) for name, x in next(iter(evaluator.dataset())).items()}
    rows = len(batch["weight"])
    whole = run(params, batch)
    parts = []
    for row in range(rows):  # the same rows, one at a time; the others padded
        alone = jnp.zeros(rows).at[row].set(1.0)
        junk = jnp.where(alone[:, None] > 0, batch["input_ids"], 7)
        parts.append(run(params, batch | {"weight": alone, "input_ids": junk}))
    for name, (total, weight) in whole.items():
        sums = [sum(float(part[name][i]) for part in parts) for i in (0, 1)]
        assert sums[0] == pytest.approx(float(total), rel=1e-4, abs=1e-5), name
        assert sums[1] == float(weight), name


def test_recall_counts_answers_whose_block_was_opened(facts: Started) -> None:
    task, params = facts
    batch = next(batches(task, "validation"))
    opened = jax.jit(task.logits)(params, batch)[1]
    found = jax.jit(task.metrics)(params, batch)
    for layer in range(2):
        hits = 0
        for row in range(4):
            order = opened["order"][row].tolist()
            block = (order.index(int(batch["answer_positions"][row, 0])) - 16) // 16
            hits += block in opened["fine_blocks"][layer, row].tolist()
        assert [float(x) for x in found[f"recall_vcc{layer + 1}"]] == [hits, 4]


def recall(data_dir: str, init: str) -> list[float]:
    """Share of answers opened by each VCC layer at the start: 8 of 62 blocks a document."""
    sizes = {"data__length": 1008, "data__fact_groups": 8, "model__num_fine_blocks": 8}
    sizes |= {"batch_size": 24}
    task = make_task(presets.tiny_facts(data__dir=data_dir, model__init=init, **sizes))
    metrics = jax.jit(task.metrics)(start(task), next(batches(task, "validation")))
    return [float(a / b) for a, b in (metrics["recall_vcc1"], metrics["recall_vcc2"])]


def test_copying_start_opens_the_block_with_the_key_before_any_training(data_dir: str) -> None:
    copying, normal = recall(data_dir, "copying"), recall(data_dir, "normal")
    assert max(copying) > 0.5 and min(copying) > 8 / 62
    assert max(normal) < 0.5 < max(copying) - max(normal) + 0.25


def test_copying_start_looks_near_in_local_layers_and_at_its_like_elsewhere() -> None:
    kinds = ("local", "vcc")
    trunk = small.trunk(vocab_size=40, d_model=64, num_heads=4, max_positions=64, num_layers=2)
    module = VccRoberta(trunk, small.vcc(kinds))

    @jax.jit
    def init(rng: jax.Array) -> Any:
        return initialization.copying_params(rng, settings.init(module, rng), kinds, trunk)

    flat = param_tree.flatten(partitioning.unbox(init(jax.random.key(0))))
    query, key = (flat[f"encoder/layers/attention/{n}/kernel"] for n in ("query", "key"))
    np.testing.assert_array_equal(query, key)
    words, places = flat["embeddings/word/embedding"], flat["embeddings/position/embedding"]
    words = 7 * words / jnp.linalg.norm(words, axis=1, keepdims=True)
    x = words[jnp.arange(32) % 8] + places[2 : 2 + 32]  # each word four times
    scores = [x @ query[i] @ key[i].T @ x.T for i in (0, 1)]
    distance = jnp.abs(jnp.arange(32)[:, None] - jnp.arange(32))
    near, far = (scores[0][where].mean() for where in (distance <= 2, distance == 8))
    assert float(near) > float(far) + 1
    best = jnp.where(distance == 0, -jnp.inf, scores[1]).argmax(-1)
    assert float((best % 8 == jnp.arange(32) % 8).mean()) >= 0.9
    out = (
        flat["encoder/layers/attention/value/kernel"] @ flat["encoder/layers/attention/out/kernel"]
    )
    gains = jnp.array([3.0, 1.0])[:, None, None]
    np.testing.assert_allclose(out, gains * jnp.eye(64), atol=1e-4)  # attention copies


def test_curriculum_comes_first_then_full_length_without_end(data_dir: str) -> None:
    changes = {"data__curriculum_lengths": (64,), "data__curriculum_groups": (1,)}
    changes |= {"data__curriculum_batches": (8,), "data__curriculum_steps": (2,)}
    task = make_task(presets.tiny_facts(data__dir=data_dir, **changes))
    stream = batches(task, "train")
    shapes = [next(stream)["input_ids"].shape for _ in range(7)]
    assert shapes == [(8, 64)] * 2 + [(4, 128)] * 5


def a_document(value: str = "red") -> dict[str, str]:
    key = facts_text.KEYS[0]
    fact = " ".join({"KEY": key, "VALUE": value}.get(word, word) for word in facts_text.FACT)
    question = " ".join(key if word == "KEY" else word for word in facts_text.QUESTION)
    return {"question": question, "document": "a function returns a value . " * 3 + fact}


def test_answers_are_values_with_their_probability_and_opened_ranges(facts: Started) -> None:
    task, params = facts
    (found,) = task.predict(params, [a_document(facts_text.VALUES[3])])
    assert found["answer"] in facts_text.VALUES and 1 / 16 <= found["probability"] <= 1
    assert len(found["opened_blocks"]) == 2  # a list for each VCC layer
    ranges = found["opened_blocks"][0]
    assert len(ranges) == 3 and all(first + 15 == last for first, last in ranges)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"document": 3}, "row 2.*'question' and 'document'"),
        ({"question": None}, "row 2.*'question' and 'document'"),
        ({"question": "what is the code of nobody ?"}, "row 2.*names 0 keys.*exactly one"),
        ({"question": " ".join(facts_text.KEYS[:2])}, "row 2.*names 2 keys"),
        ({"document": "returns a value " * 90}, "row 2.*tokens.*takes 128 tokens"),
        ({"question": "what is the code of " * 4 + facts_text.KEYS[0]}, "questions of 15"),
    ],
)
def test_rows_that_cannot_be_answered_are_named(
    facts: Started, change: dict[str, Any], words: str
) -> None:
    task, params = facts
    with pytest.raises(ValueError, match=words):
        task.predict(params, [a_document(), a_document() | change])


def test_masks_are_filled_in_order_with_likeliest_tokens_first(text: Started) -> None:
    task, params = text
    row = {"text": "A first <mask> here. The <mask> one."}
    (found,) = task.predict(params, [row])
    assert len(found["masks"]) == 2
    ids = [tokenizer.CLS_ID, *task.bpe.encode(row["text"], add_special_tokens=False).ids]
    ids = jnp.asarray([*ids, tokenizer.SEP_ID])[None]
    at = jnp.nonzero(ids[0] == tokenizer.MASK_ID)[0]
    padded = jnp.pad(ids, ((0, 0), (0, 96 - ids.shape[1])), constant_values=tokenizer.PAD_ID)
    batch = {"input_ids": padded, "attention_mask": (padded != tokenizer.PAD_ID).astype(int)}
    batch |= {"vip_mask": (padded == tokenizer.MASK_ID).astype(int)}
    logits = task.logits(params, batch | {"masked_positions": at[None]})
    for mask, chances in zip(found["masks"], jax.nn.softmax(logits[0]), strict=True):
        best = [entry["probability"] for entry in mask]
        np.testing.assert_allclose(best, jnp.sort(chances)[::-1][:5], atol=2e-6)
        assert mask[0]["token"] == task.bpe.decode([int(chances.argmax())])


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"text": "no mask in it"}, "row 1.*holds <mask>"),
        ({"words": "<mask>"}, "row 1.*'text'"),
        ({"text": "<mask> " * 9}, "9 masks; at most 96 tokens and 8 masks"),
        ({"text": "<mask>" + " paragraph speaks" * 90}, "at most 96 tokens"),
    ],
)
def test_rows_without_a_fitting_mask_are_named(
    text: Started, row: dict[str, str], words: str
) -> None:
    task, params = text
    with pytest.raises(ValueError, match=words):
        task.predict(params, [row])


@pytest.mark.parametrize("objective", ["plain", "clustered", "permuted", "cluster_permuted"])
def test_masked_tokens_are_the_vips_and_the_only_labels(
    text: Started, objective: str, tmp_path: pathlib.Path
) -> None:
    config = presets.tiny_text(tmp_path, data__objective=objective)
    batch = next(iter(make_task(config).datasets("train")))
    at, labels = batch["masked_positions"], batch["masked_labels"]
    assert at.shape == (2, 8) and (np.diff(at) > 0).all()
    for row in range(2):
        kept = at[row][labels[row] != losses.IGNORE]
        assert set(np.nonzero(batch["vip_mask"][row])[0]) == set(kept.tolist())
    assert (batch["token_type_ids"].max() > 0) == objective.endswith("permuted")


def test_a_tokenizer_larger_than_the_model_is_refused(
    text: Started, tmp_path: pathlib.Path
) -> None:
    path = text[0].tokenizer_path
    config = presets.tiny_text(tmp_path, data__tokenizer=str(path), model__vocab_size=310)
    with pytest.raises(ValueError, match=r"has 320 ids, model.vocab_size is 310"):
        make_task(config)
    assert isinstance(make_task(presets.tiny_facts()), FactsTask)
