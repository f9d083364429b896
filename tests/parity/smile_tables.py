"""Adapters of SMILE's tables: parameter counts, predicted exchange times, drops at random."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from jaxmodels.smile import Grid, MoeConfig, cost_model, drop_rate, sizes

from .fixtures import Case

Arrays = dict[str, Any]
_ROUTINGS = ("one_level", "bi_level")


def expected_counts(case: Case) -> Arrays:
    """Reference numbers by model and name."""
    return dict(_leaves(case.meta["models"]))


def presets(case: Case) -> Arrays:
    """Parameter counts of the presets that the file names ("3.7B bi_level" is smile_3_7b)."""
    found = {}
    for title in case.meta["models"]:
        label, routing = title.rsplit(" ", 1)
        size = label.split()[0].replace(".", "_").lower()
        name = f"dense_{size}" if label.endswith("dense") else f"smile_{size}"
        found[title] = sizes.SIZES[name].counts(routing)
    return dict(_leaves(found))


def _leaves(models: Mapping[str, Mapping[str, int]]) -> Iterator[tuple[str, np.ndarray]]:
    for model, numbers in models.items():
        for name, value in numbers.items():
            yield f"outputs/{model}/{name}", np.asarray(value, np.int64)


def expected_costs(case: Case) -> Arrays:
    """Reference predictions by kind of machine, number of the row, and name."""
    return {
        f"outputs/{kind}/{i}/{name}": np.asarray(value, np.float64)
        for kind in _MACHINES
        for i, row in enumerate(case.meta.get(kind, ()))
        for name, value in row["outputs"].items()
    }


def cost_model_of(kind: str, given: Mapping[str, Any]) -> Mapping[str, float]:
    """The prediction for the inputs of one row."""
    names = ("tokens_per_device", "d_model", "bytes_per_element", "capacity_factor")
    buffer = cost_model.Buffer(*(given[name] for name in names))
    return _MACHINES[kind](given).predict(buffer)


def _gpu(given: Mapping[str, Any]) -> cost_model.GpuCluster:
    rates = ("nvlink_oneway", "nic_per_gpu", "alpha_msg", "alpha_nvlink", "s_half")
    return cost_model.GpuCluster(given["n"], given["m"], **{name: given[name] for name in rates})


def _torus(given: Mapping[str, Any]) -> cost_model.Torus:
    node_axes = given.get("node_axes", 1)
    return cost_model.Torus(
        tuple(given["dims"]), tuple(given["wrap"]), given["link_oneway"], node_axes
    )


def _multislice(given: Mapping[str, Any]) -> cost_model.Multislice:
    rates = (given["dcn_per_chip"], given["pcie_per_chip"])
    return cost_model.Multislice(given["slices"], _torus(given), *rates)


_MACHINES = {"gpu": _gpu, "tpu_torus": _torus, "tpu_multislice": _multislice}


def cost_model_rows(case: Case) -> Arrays:
    """Predictions for every row of the file."""
    return {
        f"outputs/{kind}/{i}/{name}": np.asarray(value, np.float64)
        for kind in _MACHINES
        for i, row in enumerate(case.meta.get(kind, ()))
        for name, value in cost_model_of(kind, row["inputs"]).items()
    }


def expected_drops(case: Case) -> Arrays:
    """Reference capacities and dropped shares by row."""
    found = {}
    for i, row in enumerate(case.meta["rows"]):
        for name, value in row["capacities"].items():
            found[f"outputs/{i}/capacity/{name}"] = np.asarray(value, np.int64)
        for routing in _ROUTINGS:
            found[f"outputs/{i}/{routing}"] = np.asarray(row[routing])
    return found


def drops(case: Case) -> Arrays:
    """Simulated shares; one within what the file allows (0.004 and 10 percent) counts as equal."""
    found = {}
    for i, row in enumerate(case.meta["rows"]):
        grid, tokens = Grid(row["n"], row["m"]), row["tokens_per_device"]
        for routing in _ROUTINGS:
            config = MoeConfig(
                num_experts=grid.size * row.get("e", 1),
                d_ff=1,
                grid=grid,
                routing=routing,
                capacity_factor=row["capacity_factor"],
            )
            names = ("one_level",) if routing == "one_level" else ("inter", "intra")
            for name, value in zip(names, config.capacities(tokens), strict=True):
                found[f"outputs/{i}/capacity/{name}"] = np.asarray(value, np.int64)
            share, wanted = drop_rate.simulate(config, tokens)["total"], row[routing]
            close = abs(share - wanted) <= 0.004 + 0.1 * wanted
            found[f"outputs/{i}/{routing}"] = np.asarray(wanted if close else share)
    return found
