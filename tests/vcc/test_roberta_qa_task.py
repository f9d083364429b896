"""RoBERTa's question-answering tasks as the trainer sees them, on tiny published files."""

import functools
import json
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import fields
from configs import vcc as configs
from jaxmodels.data.records import RecordError
from jaxmodels.vcc.heads import HotpotQALogits
from jaxmodels.vcc.roberta_qa_task import TASKS, ChoiceTask, HotpotQATask
from jaxmodels.vcc.task import make_task
from tests.train import runs
from tests.vcc import published_files, small
from train import main

WORDS = "rome paris river old stone bridge north south market tower".split()


TINY = {
    **{"model.d_model": 16, "model.num_layers": 1, "model.layer_kinds": ("vcc",)},
    **{"model.num_heads": 2, "model.d_ff": 32, "model.max_positions": 96, "model.num_vip": 48},
    **{"model.num_fine_blocks": 2, "model.segment_length": 32, "model.vocab_size": 330},
    **{"model.overflow": "error", "data.length": 96, "data.max_choices": 4, "batch_size": 3},
}


def tiny(folder: pathlib.Path, name: str) -> dict[str, Any]:
    """Fields that make a preset of questions small, on the files in `folder`."""
    return TINY | {"data.path": str(folder), "data.dir": str(folder / "data"), "data.name": name}


def a_config(folder: pathlib.Path, name: str, **changes: Any) -> Any:
    """The WikiHop preset of those sizes; `__` in a keyword stands for the dot of a name."""
    changes = {name.replace("__", "."): value for name, value in changes.items()}
    small = configs.PRESETS["roberta_base_wikihop"] | tiny(folder, name) | {"data.part_types": True}
    return fields.build(configs.FIELDS, small | changes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("published")
    rng = np.random.default_rng(0)
    rows = [
        published_files.WIKIHOP
        | {"supports": [" ".join(rng.choice(WORDS, 9)) for _ in range(3)], "id": str(i)}
        for i in range(5)
    ]
    for name in ("train.json", "dev.json"):
        (folder / name).write_text(json.dumps(rows))
    rows = [published_files.HOTPOTQA | {"answer": a} for a in ("In Rome.", "yes", "no")]
    for name in ("hotpot_train_v1.1.json", "hotpot_dev_distractor_v1.json"):
        (folder / name).write_text(json.dumps(rows))
    question = {"question": "Who ran?", "options": list("abcd"), "gold_label": 2}
    article = {"article": "A dog ran.", "questions": [question] * 3}
    for split in ("train", "dev"):
        file = folder / f"QuALITY.v1.0.1.htmlstripped.{split}"
        file.write_text(json.dumps(article) + "\n")
    return folder


@pytest.fixture(scope="module")
def choice(folder: pathlib.Path) -> tuple[ChoiceTask, Any]:
    task = TASKS["wikihop"](a_config(folder, "wikihop"))
    return task, small.drawn(task.init, size=0.02)


@pytest.fixture(scope="module")
def hotpotqa(folder: pathlib.Path) -> tuple[HotpotQATask, Any]:
    task = TASKS["hotpotqa"](a_config(folder, "hotpotqa"))
    return task, small.drawn(task.init, size=0.02)


# The quickest to compile, for tests that run a function once.
compiled = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def summed(task: Any, params: Any) -> dict[str, tuple[float, float]]:
    run, total = compiled(task.metrics), {}
    for batch in task.datasets("validation"):
        for name, pair in run(params, batch).items():
            before = total.get(name, (0.0, 0.0))
            total[name] = tuple(float(a) + float(b) for a, b in zip(before, pair, strict=True))
    return total


def gradient(task: Any, params: Any) -> tuple[float, Any]:
    batch = next(iter(task.datasets("train")))
    found = compiled(jax.value_and_grad(lambda p: task.loss(p, batch, jax.random.key(1))[0]))
    loss, grads = found(params)
    return float(loss), grads


@pytest.mark.slow
def test_choices_are_learnt_from(choice: Any) -> None:
    loss, grads = gradient(*choice)
    assert np.isclose(loss, np.log(2), atol=0.1)  # two candidates, and nothing known
    assert set(grads) == {"trunk", "classifier"}
    assert np.abs(grads["classifier"]["kernel"]).max() > 0
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))


def test_each_record_counts_once_in_an_evaluation(choice: Any) -> None:
    found = summed(*choice)
    assert found["accuracy"][1] == found["loss"][1] == 5.0
    assert np.isclose(found["loss"][0] / 5, np.log(2), atol=0.1)


@pytest.mark.slow
def test_a_chosen_candidate_comes_with_all_probabilities(choice: Any) -> None:
    task, params = choice
    rows = [{"question": "where", "candidates": ["rome", "paris", "old"], "supports": ["river"]}]
    (made,) = task.predict(params, rows)
    assert made["answer"] == rows[0]["candidates"][int(np.argmax(made["probabilities"]))]
    assert np.isclose(sum(made["probabilities"]), 1, atol=1e-5) and len(made["probabilities"]) == 3
    with pytest.raises(ValueError, match="row 2: 'question', 'candidates' and 'supports'"):
        task.predict(params, [rows[0], {"question": "where"}])


@pytest.mark.slow
def test_all_heads_of_hotpotqa_learn(hotpotqa: Any) -> None:
    loss, grads = gradient(*hotpotqa)
    assert np.isfinite(loss)
    heads = grads["hotpotqa"]
    assert set(heads) == {"paragraph", "sentence", "answer_type", "span"}
    assert all(np.abs(head["out_proj"]["kernel"]).max() > 0 for head in heads.values())


@pytest.mark.slow
def test_padded_rows_of_hotpotqa_count_nothing(folder: pathlib.Path, hotpotqa: Any) -> None:
    task = HotpotQATask(a_config(folder, "hotpotqa", batch_size=2))
    found = summed(task, hotpotqa[1])
    assert found["answer_accuracy"][1] == found["answer_type_accuracy"][1] == 3.0
    assert found["paragraph_accuracy"][1] == 6.0 and found["sentence_accuracy"][1] == 9.0
    assert found["start_accuracy"][1] == 1.0  # one of the three answers is a span


def test_an_answer_is_right_where_type_and_both_ends_are(hotpotqa: Any, monkeypatch: Any) -> None:
    task, params = hotpotqa
    (batch, *_) = task.datasets("validation")  # "In Rome.", "yes", "no"
    start, end = (int(batch[name][0, 0]) for name in ("start", "end"))
    assert task.example.decode(batch["input_ids"][0], 2, start, end) == "In Rome."
    shape = batch["input_ids"].shape
    flat = HotpotQALogits(*(jnp.zeros((*shape, 2)),) * 2, jnp.zeros((3, 3)), jnp.zeros((*shape, 2)))
    monkeypatch.setattr(task, "logits", lambda *args: flat)

    @compiled
    def right(kinds: jax.Array, last: jax.Array) -> tuple[jax.Array, jax.Array]:
        ends = jnp.full(3, start), jnp.full(3, last)
        monkeypatch.setattr(task, "answers", lambda *args: (kinds, *ends))
        return task.metrics(params, batch)["answer_accuracy"]

    for kinds, last, wanted in (
        ((2, 1, 0), end, 3),
        ((2, 2, 0), end, 2),
        ((2, 1, 1), end + 1, 1),
        ((0, 0, 1), end, 0),
    ):
        assert [int(x) for x in right(jnp.asarray(kinds), last)] == [wanted, 3]


@pytest.mark.slow
def test_an_answer_is_a_type_or_the_text_of_a_span(hotpotqa: Any) -> None:
    task, params = hotpotqa
    row = {"question": "Where is it?", "paragraphs": [["One", ["It is.", " In Rome."]]]}
    (made,) = task.predict(params, [row])
    text = "Where is it? One It is. In Rome."
    assert made["answer"] in ("yes", "no") or made["answer"].split()[0] in text
    with pytest.raises(ValueError, match="row 1: 'question' and 'paragraphs'"):
        task.predict(params, [{"question": "Where?"}])


def test_settings_that_cannot_work_are_refused(folder: pathlib.Path) -> None:
    with pytest.raises(ValueError, match="data.length=96 exceeds model.max_positions=64"):
        ChoiceTask(a_config(folder, "wikihop", model__max_positions=64))
    with pytest.raises(ValueError, match="wikihop needs 'text'"):
        ChoiceTask(a_config(folder, "wikihop", model__positions="segment"))
    config = a_config(folder, "wikihop")
    config.model.vocab_size = 300
    config.data.tokenizer = ChoiceTask(a_config(folder, "wikihop")).example.tokenizer_path
    with pytest.raises(ValueError, match="ids with the marks of wikihop, model.vocab_size is 300"):
        _ = ChoiceTask(config).example
    config = a_config(folder, "wikihop")
    config.model.num_vip = 4
    with pytest.raises(RecordError, match="VIP tokens, but num_vip=4"):
        ChoiceTask(config).datasets("train")
    config.data.path = None
    with pytest.raises(ValueError, match="wikihop is read from its published files"):
        ChoiceTask(config).datasets("train")


@pytest.fixture
def quick_compiles() -> Iterator[None]:
    """Compiles without optimisation: runs of two steps spend their time there."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.mark.slow
@pytest.mark.usefixtures("quick_compiles")
def test_a_run_trains_on_the_users_files(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    steps = {"total_steps": 2, "optimizer.warmup_steps": 1, "log_every": 1, "eval_every": 0}
    values = tiny(folder, "hotpotqa") | steps | {"checkpoint_every": 0, "model.layer_kinds": "vcc"}
    flags = [f"--config.{field}={value}" for field, value in values.items()]
    main.main(["--config=configs/vcc.py:roberta_base_hotpotqa", f"--workdir={tmp_path}", *flags])
    assert [record["loss"] > 0 for record in runs.lines(tmp_path)] == [True, True]
    (found,) = runs.lines(tmp_path, "validation")
    assert 0 <= found["answer_accuracy"] <= 1 and found["sentence_loss"] > 0


@pytest.mark.parametrize("preset", ["wikihop", "quality", "hotpotqa"])
def test_presets_make_their_task_with_room_for_the_marks(folder: pathlib.Path, preset: str) -> None:
    whole = configs.PRESETS[f"roberta_base_{preset}"]
    task = make_task(fields.build(configs.FIELDS, whole))
    marks = 6 if preset == "hotpotqa" else 4
    assert task.trunk.vocab_size == 50_265 + marks
    small = make_task(fields.build(configs.FIELDS, whole | tiny(folder, whole["data.name"])))
    added = small.example.tokenizer.get_vocab_size(), small.trunk.vocab_size
    assert added[0] <= added[1]
    assert small.example.tokenizer.get_added_tokens_decoder().keys() >= set(
        range(added[0] - marks, added[0])
    )


def test_vip_tokens_beyond_the_slots_are_demoted_as_in_the_official_code(
    folder: pathlib.Path,
) -> None:
    config = a_config(folder, "wikihop", model__num_vip=6, model__overflow="demote")
    batch = next(iter(ChoiceTask(config).datasets("train")))
    assert (batch["vip_mask"].sum(1) > 6).all()  # the model keeps the first six
    assert configs.get_config("roberta_base_wikihop").model.overflow == "demote"
