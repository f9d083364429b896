"""The sequence-to-sequence task as the trainer sees it: gradients, metrics, predictions."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import fields, vcc_t5
from jaxmodels.core import params as param_tree
from jaxmodels.core import partitioning
from jaxmodels.core.losses import IGNORE
from jaxmodels.data import facts_text, tokenizer
from jaxmodels.trunks import t5
from jaxmodels.vcc import seq2seq_task
from jaxmodels.vcc.seq2seq_task import Seq2SeqTask
from jaxmodels.vcc.task import make_task

QUICK = {"xla_backend_optimization_level": 0}


def build(preset: str = "quickstart", **changes: Any) -> Any:
    """A preset's config; `__` in a keyword stands for the dot of a field's name."""
    changes = {name.replace("__", "."): value for name, value in changes.items()}
    return fields.build(vcc_t5.FIELDS, vcc_t5.PRESETS[preset] | changes)


def tiny(**changes: Any) -> Any:
    """The quickstart on documents of 128 tokens with one question."""
    small = {"data__length": 128, "data__fact_groups": 3, "data__questions": 1}
    small |= {"data__train_documents": 8, "data__validation_documents": 6, "batch_size": 4}
    small |= {"data__target_length": 3, "model__num_vip": 16, "model__num_fine_blocks": 3}
    small |= {"model__d_model": 16, "model__num_heads": 2, "model__head_dim": 8}
    small |= {"model__num_decoder_layers": 1, "model__d_ff": 16, "data__facts_per_group": 4}
    small |= {f"data__curriculum_{name}": () for name in ("lengths", "groups", "batches", "steps")}
    return build(**(small | changes))


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> tuple[Seq2SeqTask, Any]:
    task = make_task(tiny(data__dir=str(tmp_path_factory.mktemp("facts"))))
    assert isinstance(task, Seq2SeqTask)
    return task, partitioning.unbox(jax.jit(task.init, compiler_options=QUICK)(jax.random.key(0)))


def first(task: Seq2SeqTask, split: str) -> dict[str, jax.Array]:
    return {name: jnp.asarray(x) for name, x in next(iter(task.datasets(split))).items()}


def test_batches_keep_the_contract(started: tuple) -> None:
    task, _ = started
    batch = first(task, "train")
    shapes = {name: (x.shape, str(x.dtype)) for name, x in batch.items()}
    wide, words = ((4, 128), "int32"), task.data.facts.vocabulary
    names = ("input_ids", "attention_mask", "vip_mask")
    assert shapes == dict.fromkeys(names, wide) | {"labels": ((4, 3), "int32")}
    assert (batch["vip_mask"].sum(1) == 8).all() and (batch["vip_mask"][:, :8] == 1).all()
    assert jnp.isin(batch["labels"][:, 0], jnp.asarray(words.value_ids)).all()
    assert (batch["labels"][:, 1:] == jnp.array([tokenizer.SEP_ID, IGNORE])).all()
    # The answer stands in the document, once more than the question does.
    assert (batch["input_ids"] == batch["labels"][:, :1]).any(1).all()


def test_every_parameter_gets_a_finite_gradient(started: tuple) -> None:
    task, params = started
    batch = first(task, "train")

    @functools.partial(jax.jit, compiler_options=QUICK)
    @functools.partial(jax.value_and_grad, has_aux=True)
    def loss(params: Any) -> Any:
        return task.loss(params, batch, jax.random.key(0))

    (value, metrics), bar = loss(params)
    total, weight = metrics["loss"]
    assert float(weight) == 8 and float(value) == pytest.approx(float(total) / 8)
    for name, leaf in param_tree.flatten(bar).items():
        assert np.isfinite(leaf).all() and np.abs(leaf).max() > 0, name
    groups = param_tree.flatten(task.param_groups(params))
    exempt = {"relative_bias/embedding", "/scale"}
    for name, group in groups.items():
        assert (group == "no_decay") == name.endswith(tuple(exempt)), name


def test_labels_that_do_not_count_change_no_loss(started: tuple) -> None:
    task, params = started
    batch = first(task, "train")
    run = jax.jit(lambda batch: task.logits(params, batch), compiler_options=QUICK)
    logits = run(batch)
    inputs = t5.shift_right(batch["labels"], 0, tokenizer.PAD_ID)
    assert (inputs[:, 0] == 0).all() and (inputs[:, 1] == batch["labels"][:, 0]).all()
    longer = batch | {"labels": batch["labels"].at[:, 1].set(IGNORE)}
    np.testing.assert_allclose(run(longer)[:, :2], logits[:, :2], atol=1e-5)


def test_metrics_count_rows_by_weight_and_exact_answers(started: tuple) -> None:
    task, params = started
    assert task.evaluators().keys() == {"validation"}
    batches = list(task.datasets("validation"))
    assert [b["weight"].tolist() for b in batches] == [[1, 1, 1, 1], [1, 1, 0, 0]]
    run = jax.jit(lambda batch: task.metrics(params, batch), compiler_options=QUICK)
    found = run(batches[1])
    assert float(found["loss"][1]) == 4 and float(found["exact_match"][1]) == 2
    told = task.generate(params, {k: jnp.asarray(v) for k, v in batches[1].items()}).sequences
    labels = np.where(np.arange(3) < 2, np.asarray(told)[:, 1:], IGNORE)
    right = run(batches[1] | {"labels": labels.astype(np.int32)})["exact_match"]
    expected = np.asarray(told)[:2, 3] == tokenizer.PAD_ID
    assert float(right[0]) == expected.sum()


def test_exactly_wants_every_token_and_the_end() -> None:
    labels = jnp.array([[5, 2, IGNORE], [5, 2, IGNORE], [5, 2, IGNORE], [5, 6, 2]])
    tokens = jnp.array([[5, 2, 1], [5, 2, 7], [6, 2, 1], [5, 6, 2]])
    assert seq2seq_task.exactly(tokens, labels, (2, 1)).tolist() == [1, 0, 0, 1]


def test_predictions_are_words_with_the_blocks_that_were_opened(started: tuple) -> None:
    task, params = started
    key, value = facts_text.KEYS[0], facts_text.VALUES[0]
    row = {"query": f"what is the code of {key} ?", "context": f"the code of {key} is {value} ."}
    (found,) = task.predict(params, [row])
    assert isinstance(found["answer"], str) and len(found["opened_blocks"]) == 2
    assert all(len(layer) == 3 for layer in found["opened_blocks"])
    for bad, words in (
        ({"query": "x"}, "row 1: the text fields 'query' and 'context'"),
        (row | {"context": "the code " * 200}, "row 1: .* tokens"),
    ):
        with pytest.raises(ValueError, match=words):
            task.predict(params, [bad])


def test_dense_layers_alone_are_plain_t5(started: tuple) -> None:
    task, params = started
    dense = make_task(tiny(model__layer_kinds=("dense",) * 3, data__dir=task.config.data.dir))
    assert type(dense.model) is t5.T5
    batch = first(task, "train")
    found, ours = (
        jax.jit(model.logits, compiler_options=QUICK)(params, batch) for model in (dense, task)
    )
    assert found.shape == (4, 3, 2000)
    assert float(jnp.abs(found - ours).max()) > 1e-4


@pytest.mark.parametrize(
    ("preset", "change", "words"),
    [
        ("quickstart", {"model__num_local_layers": 4}, "num_local_layers=4 exceeds"),
        ("quickstart", {"model__layer_kinds": ("vcc",)}, "names 1 layers"),
        ("quickstart", {"data__questions": 2, "data__facts_per_group": 4}, "data.target_length=2"),
        ("quickstart", {"model__num_vip": 7}, "8 VIP tokens"),
        ("quickstart", {"data__fact_groups": 40}, "fact_groups"),
        ("t5_base_pretrain", {}, "data.files is empty"),
        ("t5_base_pretrain", {"data__tfds": "wikipedia/20220620.en"}, "data.tokenizer"),
    ],
)
def test_settings_that_cannot_work_are_refused_at_once(
    preset: str, change: dict, words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        make_task(build(preset, **change))


@pytest.mark.parametrize("preset", [name for name in vcc_t5.PRESETS if "pretrain" not in name])
def test_every_preset_makes_its_task_without_data(preset: str) -> None:
    task = make_task(build(preset))
    assert task.config.data.target_length >= 2 and task.vcc.num_vip >= 16
