"""One flag puts any attention into the encoder of a run, and refuses what then has no meaning."""

import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import pytest

from configs import fields
from configs import vcc as roberta_configs
from configs import vcc_t5 as t5_configs
from jaxmodels.vcc.baseline_attentions import PATTERNS, SparseRoberta, SparseT5
from jaxmodels.vcc.task import make_task
from tests.train import runs
from train import cli, main

SIZES = {
    "window": {"window": 16},
    "longt5": {"radius": 7, "global_block_size": 8},
    "longt5_local": {"radius": 7},
    "bigbird": {"block_size": 4, "num_random_blocks": 1},
}
TINY = {
    **{f"data.curriculum_{name}": "" for name in ("lengths", "groups", "batches", "steps")},
    **{"data.length": 128, "data.fact_groups": 2, "data.questions": 1, "batch_size": 4},
    **{"data.train_documents": 8, "data.validation_documents": 4, "log_every": 1},
    **{"model.d_model": 16, "model.num_layers": 2, "model.num_heads": 2, "model.d_ff": 16},
    **{"total_steps": 2, "optimizer.warmup_steps": 1, "eval_every": 0},
}
TRUNKS = {
    "roberta": ("vcc", {"model.d_model": 32}),
    "t5": (
        "vcc_t5",
        {"model.head_dim": 8, "model.num_decoder_layers": 1, "data.target_length": 2},
    ),
}


def flags(values: dict[str, Any]) -> list[str]:
    return [f"--config.{name}={value}" for name, value in values.items()]


def test_the_flags_names_and_sizes_are_those_of_the_patterns() -> None:
    assert roberta_configs.SPARSE.keys() == PATTERNS.keys()
    for config, changed in ((roberta_configs, {}), (t5_configs, {"window": 1024})):
        for name, pattern in PATTERNS.items():
            for size in roberta_configs.SPARSE[name]:
                default = config.FIELDS[f"model.sparse.{size}"].default
                assert default == changed.get(size, getattr(pattern, size)), (name, size)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return tmp_path_factory.mktemp("facts")


@pytest.fixture
def quick_compiles() -> Iterator[None]:
    """Compiles without optimisation: runs of two steps spend their time there."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("encoder", "trunk"),
    [
        ("bigbird", "roberta"),
        pytest.param("longt5", "t5", marks=pytest.mark.long),
        pytest.param("window", "t5", marks=pytest.mark.long),
        pytest.param("longt5", "roberta", marks=pytest.mark.long),
    ],
)
@pytest.mark.usefixtures("quick_compiles")
def test_a_run_trains_with_each_sparse_attention(
    encoder: str, trunk: str, tmp_path: pathlib.Path, data_dir: pathlib.Path
) -> None:
    file, more = TRUNKS[trunk]
    sizes = {f"model.sparse.{name}": value for name, value in SIZES[encoder].items()}
    values = TINY | more | sizes | {"model.encoder": encoder, "data.dir": data_dir}
    main.main([f"--config=configs/{file}.py:quickstart", f"--workdir={tmp_path}", *flags(values)])
    losses = [record["loss"] for record in runs.lines(tmp_path)]
    assert len(losses) == 2 and losses[0] > 0
    (found,) = runs.lines(tmp_path, "validation")
    assert found["loss"] > 0 and "recall_vcc1" not in found


@pytest.mark.parametrize("encoder", PATTERNS)
def test_sizes_reach_the_pattern_of_both_trunks(encoder: str) -> None:
    sizes = {f"model.sparse.{name}": value for name, value in SIZES[encoder].items()}
    for config, kind in ((roberta_configs, SparseRoberta), (t5_configs, SparseT5)):
        quick = config.PRESETS["quickstart"] | sizes | {"model.encoder": encoder}
        task = make_task(fields.build(config.FIELDS, quick))
        model = task.module if kind is SparseRoberta else task.model
        assert isinstance(model, kind) and type(model.pattern) is type(PATTERNS[encoder])
        assert {name: getattr(model.pattern, name) for name in SIZES[encoder]} == SIZES[encoder]
        if encoder == "longt5_local":
            assert not model.pattern.summarises


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"model.encoder": "bigbrd"}, "accepted is vcc | dense | local | window | longt5"),
        (
            {"model.encoder": "window", "model.block_size": "8"},
            "model.block_size says nothing to model.encoder=window, which takes model.sparse.",
        ),
        ({"model.encoder": "bigbird", "model.selector": "random"}, "belongs to model.encoder=vcc"),
        ({"model.encoder": "longt5", "model.sparse.window": "8"}, "to model.encoder=window"),
        ({"model.sparse.radius": "8"}, "model.encoder=vcc, which has no sparse attention"),
        ({"model.encoder": "dense", "model.sparse.radius": "8"}, "model.encoder=longt5"),
    ],
)
@pytest.mark.parametrize("file", ["vcc", "vcc_t5"])
def test_fields_that_say_nothing_to_the_encoder_are_refused(
    file: str, overrides: dict[str, str], words: str
) -> None:
    with pytest.raises(cli.UsageError) as refusal:
        cli.read_config(f"configs/{file}.py", overrides)
    assert words in str(refusal.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model.sparse.window": 7}, "model.sparse: window=7: give a positive even number"),
        ({"model.layer_kinds": ("local",) * 3}, "with model.encoder=window every layer has"),
    ],
)
@pytest.mark.parametrize("config", [roberta_configs, t5_configs], ids=["roberta", "t5"])
def test_settings_of_a_sparse_encoder_that_cannot_work_are_refused(
    config: Any, change: dict[str, Any], words: str
) -> None:
    quick = config.PRESETS["quickstart"] | {"model.encoder": "window"} | change
    with pytest.raises(ValueError, match=words):
        make_task(fields.build(config.FIELDS, quick))
