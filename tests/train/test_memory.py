"""Bytes of one device: against hand counts, and what is suggested where they do not suffice."""

import jax
import pytest

from jaxmodels.core import partitioning
from tests.train import runs, toy
from train import state as state_lib
from train.aot import batch_shapes, memory
from train.step import make_train_step

WIDTH = 64
PARAMETERS = 4 * (2 * 64 * WIDTH + WIDTH + WIDTH * 4 + 4)  # float32: table, hidden, out


def planned(**overrides):
    """(config, layout, shape of a batch, mesh) of the toy on one device."""
    config = runs.config(**overrides)
    task = toy.make_task(config)
    mesh = partitioning.make_mesh(devices=jax.devices()[:1])
    (stage,) = batch_shapes.stages(task.datasets("train"), mesh)
    return config, state_lib.layout(task, config, mesh), stage.batch, mesh


def test_shapes_alone_give_parameters_optimiser_and_batch():
    _, plan, batch, _ = planned()
    found = memory.held(plan, batch)
    counters = found["optimiser state"] - 2 * PARAMETERS
    assert found["parameters"] == PARAMETERS
    assert 0 <= counters <= 16  # adam's two moments, and its numbers of steps
    assert found["batch"] == 16 * (8 * 4 + 8 + 4 + 4)  # int32 ids, bool mask, label, weight


def test_frozen_parameters_have_no_optimiser_state():
    _, plan, batch, _ = planned(model__frozen="embedding")
    found = memory.held(plan, batch)
    assert found["parameters"] == PARAMETERS
    assert found["optimiser state"] < 2 * (PARAMETERS - 4 * 64 * WIDTH) + 17


def test_a_donated_state_is_not_counted_twice():
    config, plan, batch, mesh = planned()
    with jax.set_mesh(mesh):
        step = make_train_step(toy.make_task(config), config, mesh, plan)
        program = step.lower(plan.abstract, batch).compile()
    found, stated = memory.usage(program, plan, batch), program.memory_analysis()
    known = memory.held(plan, batch)
    assert (found.parameters, found.optimizer, found.batch) == tuple(known.values())
    assert stated.output_size_in_bytes > 3 * PARAMETERS
    assert found.results < 1024  # metrics alone
    assert found.other < 1024
    arguments = sum(known.values()) + found.other
    assert found.total == arguments + found.temporaries + found.results + found.program
    assert found.peak == stated.peak_memory_in_bytes <= found.total


def test_batches_of_a_set_without_shapes_are_like_its_first(capsys):
    _, _, batch, _ = planned(batch_size=32)
    assert {name: array.shape[0] for name, array in batch.items()} == dict.fromkeys(batch, 32)
    assert batch["input_ids"].dtype == "int32"  # uint16 on the host
    assert batch["weight"].dtype == "float32"


def tried(state_is_large=False, times=1.0, **overrides):
    config, plan, batch, _ = planned(**overrides)
    return memory.settings(config, plan, batch, state_is_large, times)


def test_three_settings_are_suggested_for_activations():
    found = tried()
    assert len(found) == 3
    assert found[0].startswith("--config.micro_batches=2 ")
    assert found[1].startswith("--config.batch_size=8 ")


def test_parts_are_chosen_to_be_as_many_as_it_takes():
    assert tried(times=3.1)[0].startswith("--config.micro_batches=4 ")
    assert tried(times=1000.0)[0].startswith("--config.micro_batches=16 ")


def test_settings_that_are_used_up_are_not_suggested():
    found = tried(batch_size=1)
    assert not any("micro_batches" in text or "batch_size" in text for text in found)
    assert len(found) == 3


def test_a_large_state_asks_for_more_devices_first():
    found = tried(state_is_large=True)
    assert "more than 1 devices" in found[0] and "adafactor" in found[1]


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (660 * 1024, "660 KiB"), (15.75 * 2**30, "15.75 GiB"), (2**41, "2,048 GiB")],
)
def test_sizes_in_words(count, text):
    assert memory.size(count) == text
