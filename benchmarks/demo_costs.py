"""What one training step costs: the trainer's own step, VCC against its dense twin, interleaved."""

from typing import Any

import jax
import numpy as np

from benchmarks import measure
from configs import fields, vcc
from jaxmodels.core import params as param_tree
from train import devices, flops
from train import state as state_lib
from train.step import make_train_step
from train.tasks import load_task


def step_costs(overrides: dict[str, dict[str, Any]], rounds: int = 5) -> dict[str, dict[str, Any]]:
    """Measures the full training step at the preset's document length and batch size.

    Args:
      overrides: {side: what differs from the quickstart preset}.
      rounds: interleaved rounds, after one to warm up.

    Returns:
      a side each: `step_ms` (median), `step_gflop`, `step_peak_bytes` (the compiler's temporaries
      and arguments), `parameters`.
    """
    costs: dict[str, dict[str, Any]] = {}
    sides: dict[str, Any] = {}
    for name, changed in overrides.items():
        config = fields.build(vcc.FIELDS, vcc.PRESETS["quickstart"] | changed)
        mesh = devices.start(config)
        task = load_task(config)
        with jax.set_mesh(mesh):
            plan = state_lib.layout(task, config, mesh)
            state = state_lib.create(task, config, mesh, plan)
            batch = _batch(task, config)
            traced = make_train_step(task, config, mesh, plan).trace(state, batch)
            program = traced.lower().compile()
        costs[name] = {
            "parameters": param_tree.count(plan.abstract.params),
            "step_gflop": flops.count_flops(traced.jaxpr) / 1e9,
            "step_peak_bytes": measure.peak_bytes(program),
        }
        sides[name] = _Repeated(program, state, batch)
    for name, result in measure.compare(sides, rounds=rounds, warmup=1).sides.items():
        costs[name]["step_ms"] = result.median_ms
    return costs


class _Repeated:
    """A step on one batch over and over; the state is donated, so it is kept here."""

    def __init__(self, program: Any, state: Any, batch: Any):
        self.program, self.state, self.batch = program, state, batch

    def __call__(self) -> Any:
        self.state, metrics, _ = self.program(self.state, self.batch)
        return metrics


def _batch(task: Any, config: Any) -> dict[str, jax.Array]:
    """One full-length batch of the task's held-out documents, without the evaluation weight."""
    batch = next(iter(task.datasets("validation")))
    batch.pop("weight")
    return {name: jax.numpy.asarray(np.asarray(value)) for name, value in batch.items()}
