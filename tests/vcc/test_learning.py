"""Section 13, item 10: VCC learns to look facts up in 4,096 tokens, and only because it selects."""

from pathlib import Path
from typing import Any

import pytest

from configs import fields, vcc
from train.evaluation import Evaluation
from train.loop import train
from train.trained import open_run

pytestmark = pytest.mark.slow
DOCUMENTS = {"data.validation_documents": "256"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp("quickstart")
    config = fields.build(vcc.FIELDS, vcc.PRESETS["quickstart"] | {"eval_every": 0})
    train(config, workdir, vcc.FIELDS)
    return workdir


def _evaluate(workdir: Path, **overrides: str) -> dict[str, Any]:
    run = open_run(workdir, overrides=DOCUMENTS | overrides)
    return Evaluation(run.task, run.mesh).run(run.params)["validation"]


@pytest.mark.long
def test_the_quickstart_looks_facts_up_and_opens_their_blocks(trained: Path) -> None:
    run = open_run(trained)
    length = run.config.data.length
    assert length == 4096 and length / run.task.vcc.compressed_length(length) >= 3
    found = _evaluate(trained)
    assert found["accuracy"] >= 0.95
    assert found["recall_vcc2"] > 0.95


@pytest.mark.long
@pytest.mark.parametrize("control", [{"model.num_fine_blocks": "0"}, {"model.selector": "random"}])
def test_without_its_selection_the_same_model_fails(trained: Path, control: dict[str, str]) -> None:
    assert _evaluate(trained, **control)["accuracy"] < 0.6
