"""What one node of `benchmarks.smile_all2all --measure` runs: exchanges and MoE layers, timed.

All nodes go through the same cases in the same order, so that every collective meets its peers.
After each case a line of JSON is written: what a hang leaves behind is still read. A node ends by
itself when its time is up or when the process that started it is gone.
"""

import dataclasses
import faulthandler
import functools
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from benchmarks import smile_counters
from jaxmodels.core import partitioning
from jaxmodels.smile import exchange, moe
from jaxmodels.smile import grid as grids
from jaxmodels.smile.settings import MoeConfig

Array = jax.Array
FORMS = ("flat", "two_hop", "bi_level")
CELLS, EXPERTS = PartitionSpec(*partitioning.AXES), PartitionSpec(partitioning.AXES)
MOST_TRIPS, LAYER_TRIPS = 10, {"forward": 4, "forward+backward": 2}
LEAST_ROUNDS = 5  # whatever the time they take
COUNTED = 3  # runs that the counters are read over
LEARNING_RATE = 1e-3


@dataclasses.dataclass(frozen=True)
class Job:
    """What to measure.

    Attributes:
      nodes: n, processes.
      devices: m a node.
      sizes: bytes that a device sends to each other device in one exchange.
      layers: (tokens a device, d_model, d_ff) of MoE layers.
      rounds: counted runs of a form at most.
      case_s: seconds for the rounds of one case; `LEAST_ROUNDS` are made in any case.
      timeout_s: seconds after which a node ends itself, with the stacks of its threads.
    """

    nodes: int
    devices: int
    sizes: tuple[int, ...]
    layers: tuple[tuple[int, int, int], ...] = ()
    rounds: int = 30
    case_s: float = 15.0
    timeout_s: float = 300.0

    @property
    def grid(self) -> grids.Grid:
        """n x m."""
        return grids.Grid(self.nodes, self.devices)


@dataclasses.dataclass(frozen=True)
class Case:
    """One comparison: a program a form, all of the same state.

    Attributes:
      kind: "exchange", "forward" or "forward+backward".
      size: what tells it from others of its kind.
      trips: exchanges (or layers) in one run of a program.
      programs: {form: state -> state}.
      state: arrays over the mesh.
    """

    kind: str
    size: Any
    trips: int
    programs: Mapping[str, Callable[[Any], Any]]
    state: Any


def there_and_back(form: str, where: grids.Placement, state: dict[str, Array]) -> dict[str, Array]:
    """Runs the exchanges of one MoE layer in the forward pass on one cell.

    Args:
      form: "flat" or "two_hop", of one-level routing; "bi_level" sends between nodes first, with
        the counts of filled rows, then inside the node, and back the other way.
      where: of the cell.
      state: `x` [n, m, s], blocks by receiver; `filled` int32 [n].

    Returns:
      the same state: every block is back at its sender.
    """
    x, filled = state["x"], state["filled"]
    if form != "bi_level":
        swap = exchange.TRANSPORTS[form]
        return {"x": swap(where, swap(where, x)), "filled": filled}
    x, filled = exchange.over(where.node, x), exchange.over(where.node, filled)
    x = exchange.over(where.device, x.swapaxes(0, 1))
    x = exchange.over(where.device, x).swapaxes(0, 1)
    return {"x": exchange.over(where.node, x), "filled": filled}


def trips_of(size: int) -> int:
    """Returns how often a run goes there and back: large messages less often."""
    return max(1, min(MOST_TRIPS, 40960 // size))


def exchange_case(job: Job, size: int) -> Case:
    """Returns the case of exchanges of `size` bytes a peer."""
    trips = trips_of(size)
    lead = (job.nodes, job.devices)

    def program(form: str) -> Callable[[Any], Any]:
        def cell(where: grids.Placement, _: Any, own: Any) -> Any:
            once = lambda _, state: there_and_back(form, where, state)  # noqa: E731
            return jax.lax.fori_loop(0, trips, once, own)

        return lambda state: grids.run(cell, job.grid, {}, state)

    values = np.random.default_rng(0).standard_normal((*lead, *lead, size // 4), np.float32)
    filled = np.arange(np.prod(lead) * job.nodes, dtype=np.int32).reshape(*lead, job.nodes)
    state = {"x": placed(values, CELLS), "filled": placed(filled, CELLS)}
    return Case("exchange", size, 2 * trips, _compiled(program, state), state)


def layer_config(job: Job, form: str, d_ff: int) -> MoeConfig:
    """Returns the layer of a form: capacity factor 1 and one expert a device, so equal buffers."""
    bi_level = form == "bi_level"
    return MoeConfig(
        num_experts=job.grid.size,
        d_ff=d_ff,
        grid=job.grid,
        routing="bi_level" if bi_level else "one_level",
        transport="two_hop" if bi_level else form,
        capacity_factor=1.0,
        eval_capacity_factor=1.0,
    )


def layer_cases(job: Job, layer: tuple[int, int, int]) -> Iterator[Case]:
    """Yields the cases of an MoE layer: forward, and SGD steps."""
    tokens, d_model, d_ff = layer
    draw = np.random.default_rng(1)
    shapes = layer_config(job, "flat", d_ff).router_shapes(d_model)
    shapes |= layer_config(job, "bi_level", d_ff).router_shapes(d_model)
    normal = lambda *shape: 0.1 * draw.standard_normal(shape, np.float32)  # noqa: E731
    params = {name: placed(normal(*shape), PartitionSpec()) for name, shape in shapes.items()}
    wide = {"wi": (d_model, d_ff), "bi": (d_ff,), "wo": (d_ff, d_model), "bo": (d_model,)}
    params["experts"] = {
        name: placed(normal(job.grid.size, *shape), EXPERTS) for name, shape in wide.items()
    }
    x = placed(10 * normal(job.nodes, job.devices, tokens, d_model), CELLS)

    def loss(state: Any, config: MoeConfig) -> Array:
        y, report = moe.apply(state["params"], state["x"], config)
        return (y**2).mean() + moe.auxiliary_loss(report, config)

    def forward(state: Any, config: MoeConfig) -> Any:
        y, _ = moe.apply(state["params"], state["x"], config)
        return state | {"x": state["x"] + y}

    def step(state: Any, config: MoeConfig) -> Any:
        gradients = jax.grad(loss)(state, config)
        return jax.tree.map(lambda p, g: p - LEARNING_RATE * g, state, gradients)

    bodies = {"forward": forward, "forward+backward": step}

    def looped(kind: str, form: str) -> Callable[[Any], Any]:
        once = functools.partial(bodies[kind], config=layer_config(job, form, d_ff))
        return lambda start: jax.lax.fori_loop(0, LAYER_TRIPS[kind], lambda _, s: once(s), start)

    state = {"params": params, "x": x}
    for kind in bodies:
        programs = _compiled(functools.partial(looped, kind), state)
        yield Case(kind, layer, LAYER_TRIPS[kind], programs, state)


def placed(value: np.ndarray, spec: PartitionSpec) -> Array:
    """Returns a value that all processes have as one array over the mesh in scope."""
    where = NamedSharding(jax.sharding.get_mesh(), spec)
    return jax.make_array_from_callback(value.shape, where, lambda index: value[index])


def _compiled(program: Callable[[str], Callable[[Any], Any]], state: Any) -> dict[str, Any]:
    layouts = jax.tree.map(lambda leaf: leaf.sharding, state)
    return {
        form: jax.jit(program(form), out_shardings=layouts).lower(state).compile() for form in FORMS
    }


def run(job: Job, say: Callable[[dict[str, Any]], None], without_port: int = 0) -> None:
    """Measures all cases on the mesh in scope.

    Args:
      job: what.
      say: takes a record a case.
      without_port: see `smile_counters.connections`.
    """
    together = _meeting()
    made = None
    for size in job.sizes:
        case = exchange_case(job, size)
        made = made or _connections(case, without_port)
        say(measured(case, job, together) | {"connections": made})
    for layer in job.layers:
        for case in layer_cases(job, layer):
            say(measured(case, job, together))


def _meeting() -> Callable[[bool], bool]:
    """Returns a function that waits for all nodes and tells whether any said True."""

    def any_true(flags: Array) -> Array:
        return flags.any()

    spec = PartitionSpec(partitioning.AXES)
    sharding = NamedSharding(jax.sharding.get_mesh(), spec)
    count = len(jax.devices())
    compiled = jax.jit(any_true, out_shardings=NamedSharding(sharding.mesh, PartitionSpec()))

    def meet(flag: bool) -> bool:
        flags = jax.make_array_from_callback((count,), sharding, lambda _: np.array([flag]))
        return bool(compiled(flags).addressable_data(0))

    return meet


def _connections(case: Case, without_port: int) -> dict[str, int]:
    """Returns how many connections to other nodes each form opened on its first run.

    Those of few peers first: gloo keeps the connections of a group of devices, so that bi_level
    finds those of two_hop. Before any meeting, whose group is the one of all devices.
    """
    opened, before = {}, 0
    for form in ("two_hop", "bi_level", "flat"):
        jax.block_until_ready(case.programs[form](case.state))
        now = smile_counters.connections(Path("/proc/net/tcp").read_text(), without_port)
        opened[form], before = now - before, now
    return opened


def measured(case: Case, job: Job, together: Callable[[bool], bool]) -> dict[str, Any]:
    """Returns the record of a case: seconds of every run, and the counters, by form.

    Seconds and counters are those of one exchange (or layer) of this node.

    Raises:
      RuntimeError: the forms disagree, where they must not.
    """
    _check(case)
    counters = {form: _counted(case, form, together) for form in FORMS}
    seconds: dict[str, list[float]] = {form: [] for form in FORMS}
    began = time.perf_counter()
    for turn in range(job.rounds):
        for form in FORMS if turn % 2 == 0 else reversed(FORMS):
            together(False)
            start = time.perf_counter()
            jax.block_until_ready(case.programs[form](case.state))
            seconds[form].append((time.perf_counter() - start) / case.trips)
        late = time.perf_counter() - began > job.case_s and turn + 1 >= LEAST_ROUNDS
        if together(late):
            break
    named = {"kind": case.kind, "size": case.size, "trips": case.trips}
    return named | {"seconds": seconds, "counters": counters}


def _counted(case: Case, form: str, together: Callable[[bool], bool]) -> dict[str, float]:
    together(False)
    time.sleep(0.1)  # what the meeting still sends is not to be counted
    before = smile_counters.read()
    for _ in range(COUNTED):
        jax.block_until_ready(case.programs[form](case.state))
    time.sleep(0.1)
    return smile_counters.read().since(before, COUNTED * case.trips)


def _check(case: Case) -> None:
    """Also the warm-up: an exchange must undo itself; layers of one level must agree."""
    found = {form: case.programs[form](case.state)["x"] for form in FORMS}
    if case.kind == "exchange":
        differ = max(_differing(x, case.state["x"], 0.0) for x in found.values())
    else:
        # Layers agree to the bit; sums fused around them may round otherwise, and the choice of a
        # token that was near a tie may then differ in the next layer of the run.
        differ = _differing(found["flat"], found["two_hop"], 1e-4)
    if differ > (0 if case.kind == "exchange" else 0.01):
        raise RuntimeError(f"{case.kind} {case.size}: {differ:.2%} of the values are not equal.")


def _differing(one: Array, other: Array, tolerance: float) -> float:
    """The largest share, over the devices of this node, of values that differ."""
    pairs = zip(one.addressable_shards, other.addressable_shards, strict=True)
    close = (np.isclose(a.data, b.data, rtol=tolerance, atol=tolerance) for a, b in pairs)
    return max(1 - equal.mean() for equal in close)


def _end_with(parent: int) -> None:
    while os.read(parent, 1):  # ends when the other side is closed, however that came
        pass
    os._exit(4)


def main(text: str, coordinator: str, index: int, out: str) -> None:
    """Joins the others and measures.

    Args:
      text: the `Job` as JSON.
      coordinator: address:port of node 0.
      index: of this node.
      out: file that records are written to, a line each.
    """
    told = json.loads(text)
    layers = tuple(map(tuple, told.pop("layers")))
    job = Job(**told | {"sizes": tuple(told["sizes"]), "layers": layers})
    faulthandler.dump_traceback_later(job.timeout_s, exit=True)
    threading.Thread(target=_end_with, args=(sys.stdin.fileno(),), daemon=True).start()
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(coordinator, job.nodes, index, initialization_timeout=120)
    control = Path("/proc/sys/net/ipv4/tcp_congestion_control").read_text().strip()
    mesh = partitioning.make_mesh(job.nodes, job.devices)
    with Path(out).open("w") as file, jax.set_mesh(mesh):

        def say(record: dict[str, Any]) -> None:
            own = {"node": index, "load": os.getloadavg()[0], "congestion_control": control}
            print(json.dumps(record | own), file=file, flush=True)
            print(f"{socket.gethostname()} {index}: {record['kind']} {record['size']}", flush=True)

        run(job, say, int(coordinator.rpartition(":")[2]))
    jax.distributed.shutdown()
