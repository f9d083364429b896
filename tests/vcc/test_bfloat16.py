"""Section 13, item 11: training in bfloat16 keeps within 1% of the losses of float32."""

import pathlib
from typing import Any

import numpy as np
import pytest

from configs import fields, vcc, vcc_t5
from tests.train import runs
from train.loop import train

STEPS = 500
SMALL = {
    "total_steps": STEPS,
    "batch_size": 8,
    "eval_every": 0,
    "checkpoint_every": STEPS,
    "log_every": 1,
    "data.train_documents": 256,
    "data.validation_documents": 8,
    "data.curriculum_lengths": (),
    "data.curriculum_groups": (),
    "data.curriculum_batches": (),
    "data.curriculum_steps": (),
}
CASES = {
    "roberta": (vcc, {"data.length": 256, "data.fact_groups": 2, "model.num_fine_blocks": 4}),
    "t5": (vcc_t5, {"data.length": 256, "model.num_fine_blocks": 4}),
}


@pytest.mark.long
@pytest.mark.parametrize("name", CASES)
def test_losses_of_500_steps_stay_within_a_hundredth(name: str, tmp_path: pathlib.Path) -> None:
    file, changes = CASES[name]
    means = {}
    for dtype in ("float32", "bfloat16"):
        settings: dict[str, Any] = SMALL | changes | {"model.dtype": dtype}
        settings["data.dir"] = str(tmp_path / "data")
        config = fields.build(file.FIELDS, file.PRESETS["quickstart"] | settings)
        train(config, tmp_path / dtype, file.FIELDS)
        losses = [loss for loss, *_ in runs.curve(tmp_path / dtype).values()]
        assert len(losses) == STEPS and losses[-1] < losses[0]
        means[dtype] = np.mean(losses)
    assert means["bfloat16"] == pytest.approx(means["float32"], rel=0.01)
    assert means["bfloat16"] != means["float32"]  # the products were of bfloat16
