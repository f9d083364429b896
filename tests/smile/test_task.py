"""The masked-LM task: its objective, its groups, its data, and what it refuses."""

import functools
import re
import types

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType

from configs import fields
from configs import smile as presets
from jaxmodels.core import params as param_tree
from jaxmodels.core import partitioning
from jaxmodels.core.losses import IGNORE
from jaxmodels.data import tokenizer
from jaxmodels.smile import task
from tests.smile import small

SMALL = {
    "batch_size": 4,
    "model.vocab_size": 300,
    "model.d_model": 16,
    "model.num_layers": 2,
    "model.num_heads": 2,
    "model.d_ff": 24,
    "model.max_positions": 32,
    "moe.num_experts": 4,
    "moe.nodes": 2,
    "moe.devices": 2,
    "data.length": 32,
}
IDS = (np.zeros((1, 2), np.int32),) * 2
quick = functools.partial(jax.jit, compiler_options=small.QUICK)


def config(**changes):
    values = {name.replace("__", "."): value for name, value in changes.items()}
    return fields.build(presets.FIELDS, presets.PRESETS["quickstart"] | SMALL | values)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A task on Python's documentation, its parameters and a batch."""
    folder = tmp_path_factory.mktemp("data")
    own = task.make_task(config(data__dir=str(folder)))
    params = small.start(own.module, *IDS)
    batch = next(iter(own.datasets("train")))
    return own, params, batch


def test_the_objective_is_cross_entropy_and_the_routers_losses(made) -> None:
    own, params, batch = made
    objective, metrics = jax.device_get(quick(own.loss)(params, batch, jax.random.key(1)))
    total, weight = metrics["loss"]
    balances = metrics["balance_inter"][0] + metrics["balance_intra"][0]  # of the only MoE layer
    assert objective == pytest.approx(float(total / weight + 0.01 * balances), rel=1e-6)
    assert balances > 1.9
    assert weight == (batch["masked_labels"] != IGNORE).sum()
    assert float(total / weight) == pytest.approx(np.log(300), rel=0.1)
    names = {"balance_inter", "balance_intra", "dropped_total", "load_max", "load_entropy"}
    assert names <= set(metrics)


def test_experts_biases_are_not_decayed(made) -> None:
    own, params, _ = made
    labels = param_tree.flatten(own.param_groups(params))
    ends = {path.rsplit("/", 1)[-1]: label for path, label in labels.items() if "experts" in path}
    assert ends == {"wi": "decay", "wo": "decay", "bi": "no_decay", "bo": "no_decay"}
    assert labels["moe_layers/moe/router_inter"] == "decay"


def test_validation_text_is_none_of_the_training_text(made) -> None:
    own, _, _ = made
    train, validation = own._windows("train"), own._windows("validation")
    assert train.tokenizer_path == validation.tokenizer_path
    bpe = tokenizer.load(train.tokenizer_path)

    def paragraphs(windows) -> set[str]:
        ids = np.concatenate([windows[i]["input_ids"][1:-1] for i in range(len(windows))])
        documents = np.split(ids, np.flatnonzero(ids == tokenizer.SEP_ID))
        texts = bpe.decode_batch([document.tolist() for document in documents])
        return {part for text in texts for part in text.split("\n\n") if part.strip()}

    seen, unseen = paragraphs(train), paragraphs(validation)
    assert len(seen) > len(unseen) > 100
    assert not seen & unseen


def test_predict_fills_every_mask_and_names_a_bad_row(made) -> None:
    own, params, _ = made
    rows = own.predict(params, [{"text": "the <mask> of a <mask>"}, {"text": "<mask>"}])
    assert [len(row["masks"]) for row in rows] == [2, 1]
    best = rows[0]["masks"][0]
    assert len(best) == 5 and best[0]["probability"] >= best[-1]["probability"] > 0
    for text in ("no mask here", "<mask> " + "word " * 99, None):
        with pytest.raises(ValueError, match="row 1"):
            own.predict(params, [{"text": text}])


def test_the_users_text_trains_a_tokenizer_and_gives_both_splits(tmp_path) -> None:
    text = "the cat sat on the mat\n\n" * 400
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "b.txt").write_text(text[:900])
    own = task.make_task(
        config(
            data__name="text_lines",
            data__dir=str(tmp_path / "cache"),
            data__files=(str(tmp_path / "a.txt"),),
            data__validation_files=(str(tmp_path / "b.txt"),),
        )
    )
    batch = next(iter(own.datasets("train")))
    assert batch["input_ids"].shape == (4, 32)
    assert (batch["input_ids"] == tokenizer.MASK_ID).any()
    assert set(own.evaluators()) == {"validation"}
    assert next(iter(own.datasets("validation")))["weight"].sum() > 0


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"data__length": 64}, "data.length=64 exceeds model.max_positions=32"),
        ({"data__name": "text_lines"}, "data.files is empty"),
        ({"data__name": "text_lines", "data__files": ("/nowhere/*.txt",)}, "no such file"),
        ({"data__name": "c4"}, "data.tokenizer"),
        ({"moe__num_experts": 6}, "num_experts=6"),
        ({"model__num_layers": 3}, "even"),
        ({"moe__transport": "flat"}, "bi_level"),
    ],
)
def test_what_cannot_work_is_refused_at_once(changes: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        task.make_task(config(**changes))


def mesh_of(owners: list[list[int]]):
    """What the task asks of a mesh; each number is the host of a GPU."""
    owners = np.array(owners)
    device = lambda place: types.SimpleNamespace(  # noqa: E731
        id=place, platform="gpu", process_index=int(owners.flat[place])
    )
    devices = np.array([device(i) for i in range(owners.size)], object).reshape(owners.shape)
    abstract = AbstractMesh(owners.shape, partitioning.AXES, axis_types=(AxisType.Auto,) * 2)
    shape = dict(zip(partitioning.AXES, owners.shape, strict=True))
    return types.SimpleNamespace(devices=devices, shape=shape, abstract_mesh=abstract)


ONE_LEVEL = {"moe__routing": "one_level"}


@pytest.mark.parametrize(
    ("changes", "owners", "says"),
    [
        ({}, [[0, 0], [1, 1]], "bi_level.* 2 nodes x 2 devices, transport two_hop .*each level"),
        (ONE_LEVEL, [[0, 0], [1, 1]], "two_hop .auto: the mesh has 2 nodes of 2 devices: fewer"),
        (ONE_LEVEL, [[0, 0]], "one_level.* flat .auto: inside one node"),
        (ONE_LEVEL, [[0], [1]], "flat .auto: nodes of one device"),
        (ONE_LEVEL | {"moe__transport": "flat"}, [[0, 1], [1, 0]], r"transport flat \(as set\)"),
        ({"moe__capacity_factor": None}, [[0, 0]], "ragged .auto: no capacity factor"),
        ({"moe__allow_mixed_nodes": True}, [[0, 1], [1, 0]], "transport two_hop"),
    ],
)
def test_the_log_says_which_transport_and_why(changes, owners, says) -> None:
    (line,) = task.make_task(config(**changes)).check_mesh(mesh_of(owners))
    assert re.search(says, line), line


@pytest.mark.parametrize(
    ("changes", "owners", "says"),
    [
        ({}, [[0, 0], [1, 0]], r"node 1 of the mesh mixes hosts.*\{2: 1, 3: 0\}.*allow_mixed_node"),
        (ONE_LEVEL, [[0, 0], [1, 0]], "mixes hosts"),
        ({}, [[0, 0], [1, 1], [2, 2]], "node=3 must divide 2"),
    ],
)
def test_a_mesh_that_the_routing_cannot_use_is_refused(changes, owners, says) -> None:
    with pytest.raises(ValueError, match=says):
        task.make_task(config(**changes)).check_mesh(mesh_of(owners))


def test_a_dense_model_runs_on_any_mesh() -> None:
    assert task.make_task(config(moe__num_experts=0)).check_mesh(mesh_of([[0, 1], [1, 0]])) == []


def test_c4_that_is_not_prepared_says_how_to(tmp_path, made) -> None:
    pytest.importorskip("tensorflow_datasets")
    path = made[0].tokenizer_path
    own = task.make_task(config(data__name="c4", data__tokenizer=path, data__dir=str(tmp_path)))
    with pytest.raises(ValueError, match="tfds build c4/en"):
        own.datasets("train")


def test_a_dense_model_reports_no_routing(made) -> None:
    own = task.make_task(config(moe__num_experts=0, data__dir=made[0].config.data.dir))
    params = small.start(own.module, *IDS)
    objective, metrics = jax.device_get(quick(own.loss)(params, made[2], jax.random.key(1)))
    assert set(metrics) == {"loss", "accuracy"}
    assert objective == pytest.approx(float(metrics["loss"][0] / metrics["loss"][1]))
