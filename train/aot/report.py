"""Compiles the training step for devices that need not be there, and reports what it would take."""

import dataclasses
import hashlib
import time
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from jaxmodels.core.task import Batch, Task
from train import cli, devices, table
from train import state as state_lib
from train.aot import batch_shapes, collectives, memory
from train.aot.batch_shapes import Stage
from train.aot.collectives import Traffic
from train.aot.memory import Usage, size
from train.aot.topology import Topology, mesh_for, slice_of
from train.compiled import shapes
from train.errors import UsageError
from train.flops import count_flops, peak_flops
from train.state import Layout
from train.step import make_train_step
from train.tasks import check_mesh, load_task


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What compiling the step for one shape of batch showed.

    Attributes:
      batch: the shape in words.
      steps: of the run that have this shape; None: to its end.
      digest: of the program given to the compiler: equal where training runs the same one.
      seconds: spent compiling.
      usage: memory of one device; None where the compiler gave up or does not say.
      held: bytes of one device known from shapes alone.
      needed: bytes of one device in all; None where not known.
      available: bytes of one device that a program can have; None where not known.
      flops: of one step, all devices; from the traced program.
      flops_by_compiler: of one device; None where the compiler gives none.
      bytes_moved: to and from the memory of one device, as the compiler counts.
      traffic: collectives; None where there is no program.
      failure: why the compiler gave up, in one line; empty where it did not.
      advice: settings to try where it compiles and yet does not fit.
    """

    batch: str
    steps: int | None
    digest: str
    seconds: float
    usage: Usage | None
    held: dict[str, int]
    needed: int | None
    available: int | None
    flops: int
    flops_by_compiler: float | None
    bytes_moved: float | None
    traffic: tuple[Traffic, ...] | None
    failure: str
    advice: tuple[str, ...]

    @property
    def fits(self) -> bool:
        """Whether the step fits, as far as known."""
        if self.failure:
            return False
        return None in (self.needed, self.available) or self.needed <= self.available


@dataclasses.dataclass(frozen=True)
class Report:
    """Everything that `python -m train.compile` prints.

    Attributes:
      topology: what was compiled for.
      devices: kinds, number and mesh in words.
      notes: what the task says of training on that mesh.
      programs: one a shape of batch that was compiled.
      left_out: shapes that were not.
      peak: FLOP/s of all devices; None where not known.
    """

    topology: Topology
    devices: str
    notes: tuple[str, ...]
    programs: tuple[Compiled, ...]
    left_out: tuple[str, ...]
    peak: float | None

    @property
    def fits(self) -> bool:
        """Whether every program fits."""
        return all(program.fits for program in self.programs)

    def as_json(self) -> dict[str, Any]:
        """Returns all figures as JSON values."""
        found = dataclasses.asdict(self)
        for values, program in zip(found["programs"], self.programs, strict=True):
            values["fits"] = program.fits
        return found | {"topology": str(self.topology), "fits": self.fits}

    def __str__(self) -> str:
        lines = [f"{self.topology}: {self.devices}", *(f"  {note}" for note in self.notes)]
        for program in self.programs:
            lines += ["", *_lines(program, self)]
        if self.left_out:
            lines += ["", f"not compiled (--all_shapes does): {'; '.join(self.left_out)}"]
        return "\n".join(lines)


def prepare() -> None:
    """Turns the cache of compiled programs off: those read from it do not say what they need."""
    jax.config.update("jax_enable_compilation_cache", False)


def compile_for(config: ConfigDict, topology: Topology, all_shapes: bool = False) -> Report:
    """Compiles the step that training runs with `config` on `topology`.

    Args:
      config: of the run.
      topology: from `topology.parse`; its environment must be in place.
      all_shapes: compile for every shape of batch, not for the largest alone.

    Raises:
      UsageError: settings, mesh or data cannot be used; nothing was compiled.
    """
    mesh = mesh_for(topology, config.mesh.node, config.mesh.device)
    cli.check_sizes(config, mesh.size)
    task = load_task(config)
    notes = check_mesh(task, mesh)
    plan = _layout(task, config, mesh)
    found = _stages(task, mesh)
    chosen = found if all_shapes else [max(found, key=lambda stage: stage.bytes)]
    peak = peak_flops(mesh.devices.flat[0].device_kind)
    return Report(
        topology,
        devices.describe(mesh),
        tuple(notes),
        tuple(_compile(task, config, mesh, plan, stage, topology) for stage in chosen),
        tuple(shapes(stage.batch) for stage in found if stage not in chosen),
        peak * mesh.size if peak else None,
    )


def dry_run(config: ConfigDict, mesh: Mesh) -> str:
    """Returns what a run would train, from shapes alone: nothing is compiled.

    Parameters, bytes of one device by kind, batches of each stage, FLOPs. The data set is opened
    (made, where it does not exist yet), its first record read.

    Args:
      config: of the run.
      mesh: that it would run on.

    Raises:
      UsageError: settings or data cannot be used.
    """
    task = load_task(config)
    notes = check_mesh(task, mesh)
    plan = _layout(task, config, mesh)
    found = _stages(task, mesh)
    rows = [("steps", "batch", "bytes a device", "GFLOP a step")]
    total, left = 0, config.total_steps
    for stage in found:
        with jax.set_mesh(mesh):
            step = make_train_step(task, config, mesh, plan)
            flops = count_flops(step.trace(plan.abstract, stage.batch).jaxpr)
        steps = min(left, left if stage.steps is None else stage.steps)
        total, left = total + steps * flops, left - steps
        shape = ", ".join(f"{name} {list(a.shape)}" for name, a in stage.batch.items())
        held = size(table.bytes_per_device(stage.batch))
        rows.append((f"{steps:,}", shape, held, f"{flops / 1e9:,.4g}"))
    gradients = size(table.bytes_per_device(plan.abstract.trainable))
    largest = max(found, key=lambda stage: stage.bytes)
    lines = [
        f"{config.method} for {config.total_steps:,} steps: {devices.describe(mesh)}",
        *(f"  {note}" for note in notes),
        table.parameter_table(plan),
        *(f"{name}: {size(n)} a device" for name, n in memory.held(plan, largest.batch).items()),
        f"gradients: {gradients} a device while a step runs; activations are known once compiled: "
        "python -m train.compile",
        "",
        table.aligned(rows, right=(0, 2, 3)),
        f"all steps: {total:.4g} FLOP",
    ]
    peak = peak_flops(mesh.devices.flat[0].device_kind)
    if peak:
        lines.append(f"at least {total / peak / mesh.size / 3600:.3g} hours, at the devices' peak")
    return "\n".join(lines)


def _layout(task: Task, config: ConfigDict, mesh: Mesh) -> Layout:
    # Not under the mesh: making the random key would ask devices that may not be there.
    try:
        return state_lib.layout(task, config, mesh)
    except ValueError as error:
        raise UsageError(str(error)) from error


def _stages(task: Task, mesh: Mesh) -> list[Stage]:
    try:
        return batch_shapes.stages(task.datasets("train"), mesh)
    except ValueError as error:
        raise UsageError(str(error)) from error


def _compile(
    task: Task, config: ConfigDict, mesh: Mesh, plan: Layout, stage: Stage, topology: Topology
) -> Compiled:
    """Traces, lowers and compiles as `compiled.PerShape` does, and reads off what came out."""
    batch, start = stage.batch, time.perf_counter()
    program, failure = None, None
    with jax.set_mesh(mesh):
        traced = make_train_step(task, config, mesh, plan).trace(plan.abstract, batch)
        lowered = traced.lower()
        try:
            program = _compiled(lowered, topology)
        except jax.errors.JaxRuntimeError as error:
            if not memory.is_exhausted(error):
                raise
            failure = error
    seconds = time.perf_counter() - start
    usage = memory.usage(program, plan, batch) if program else None
    needed, available = usage.total if usage else None, topology.memory
    said = ""
    if failure:
        said = memory.explain(failure, plan, batch, config, "compiling") or ""
        needed, available = memory.needed_and_available(failure) or (None, available)
    costs = (program.cost_analysis() if program else None) or {}
    return Compiled(
        shapes(batch),
        stage.steps,
        hashlib.sha256(lowered.as_text().encode()).hexdigest()[:16],
        seconds,
        usage,
        memory.held(plan, batch),
        needed,
        available,
        count_flops(traced.jaxpr),
        costs.get("flops"),
        costs.get("bytes accessed"),
        _traffic(program, mesh, topology) if program else None,
        said,
        _advice(config, plan, batch, needed, available) if usage else (),
    )


def _advice(
    config: ConfigDict, plan: Layout, batch: Batch, needed: int, available: int | None
) -> tuple[str, ...]:
    """Settings to try; none where the step fits."""
    if available is None or needed <= available:
        return ()
    known = sum(memory.held(plan, batch).values())
    times = (needed - known) / (available - known) if available > known else 1.0
    return tuple(memory.settings(config, plan, batch, known > needed / 2, times))


def _compiled(lowered: jax.stages.Lowered, topology: Topology) -> jax.stages.Compiled:
    """Compiles; for a GPU that is not there, without Triton's products where they fail.

    Their tiles are chosen by measuring on the device; without one, the guess may not work out.
    """
    try:
        return lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if topology.chip.platform != "gpu" or "tile sizes" not in str(error):
            raise
    return lowered.compile({"xla_gpu_enable_triton_gemm": False})


def _traffic(program: jax.stages.Compiled, mesh: Mesh, topology: Topology) -> tuple[Traffic, ...]:
    slices = slice_of(topology, mesh)
    ids = [device.id for device in mesh.devices.flat]
    found = collectives.read(program.as_text(), slices, ids)
    shape = (mesh.shape["node"], mesh.shape["device"])
    return tuple(collectives.summarise(found, shape, slices, topology.chip.networks))


def _lines(program: Compiled, report: Report) -> list[str]:
    """The text of one program, line by line."""
    steps = "" if program.steps is None else f" (for {program.steps:,} steps)"
    lines = [
        f"batch {program.batch}{steps}; program {program.digest}, "
        f"{program.seconds:.1f} s to compile",
        "",
        "memory of one device",
        *(f"  {name:<42}{count:>12}" for name, count in _memory_rows(program)),
        f"  {_verdict(program)}",
    ]
    if program.failure:
        lines.append(f"  {program.failure}")
    if program.advice:
        lines.append(f"  Try {'; '.join(program.advice)}")
    if report.topology.chip.platform == "gpu":
        lines.append(f"  {_gpu_note(report.topology)}")
    lines += ["", "one step", *(f"  {line}" for line in _cost_lines(program, report))]
    if program.traffic is not None:
        lines += ["", "collectives of one step, one device", *_traffic_lines(program.traffic)]
    return lines


def _memory_rows(program: Compiled) -> list[tuple[str, str]]:
    usage = program.usage
    if usage is None:
        rows = list(program.held.items())
        if program.needed is not None:
            rest = program.needed - sum(program.held.values())
            rows += [("activations, gradients and the rest", rest), ("total", program.needed)]
        return [(name, size(count)) for name, count in rows]
    rows = [
        ("parameters", usage.parameters),
        ("optimiser state", usage.optimizer),
        ("batch", usage.batch),
        ("step, random key, padding", usage.other),
        ("activations, gradients, other temporaries", usage.temporaries),
        ("results beside the donated state", usage.results),
        ("program", usage.program),
        ("total", usage.total),
    ]
    if usage.peak:
        rows.append(("(in use at once, by the compiler)", usage.peak))
    return [(name, size(count)) for name, count in rows]


def _verdict(program: Compiled) -> str:
    if program.available is None:
        return "no limit known"
    if program.needed is None:
        return f"does not fit into {size(program.available)}"
    free = program.available - program.needed
    if program.fits:
        return f"fits, {free / 2**30:.2f} GiB free of {size(program.available)}"
    return f"does not fit by {-free / 2**30:.2f} GiB: {size(program.available)} available"


def _gpu_note(topology: Topology) -> str:
    share = topology.memory / topology.chip.memory
    return (
        f"{share:.0%} of {size(topology.chip.memory)}: what jax takes; "
        "XLA_CLIENT_MEM_FRACTION=0.9 gives it more"
    )


def _cost_lines(program: Compiled, report: Report) -> list[str]:
    """FLOPs and bytes, and the shortest time that they allow."""
    lines = [f"FLOPs: {program.flops:.4g} on all devices, by the traced program"]
    if program.flops_by_compiler and program.flops_by_compiler > 0:
        lines[0] += f" (the compiler, loop bodies once: {program.flops_by_compiler:.4g} a device)"
    least = {}
    if report.peak:
        least["computing at the bfloat16 peak"] = program.flops / report.peak
    if program.bytes_moved:
        moved = size(program.bytes_moved)
        lines.append(f"bytes moved: {moved} a device, by the compiler (loop bodies once)")
        bandwidth = report.topology.chip.bandwidth
        if bandwidth:
            least["moving these bytes"] = program.bytes_moved / bandwidth
    if least:
        parts = ", ".join(f"{1e3 * s:.4g} ms {what}" for what, s in least.items())
        lines.append(f"at least {1e3 * max(least.values()):.4g} ms: {parts}")
    return lines


def _traffic_lines(traffic: tuple[Traffic, ...]) -> list[str]:
    if not traffic:
        return ["  none"]
    rows = [("collective", "mesh axis", "network", "count", "arrays", "sent")]
    for row in traffic:
        count = f"{row.count:,}{'' if row.certain else '+'}"
        rows.append((row.kind, row.axes, row.network, count, size(row.bytes), size(row.sent)))
    lines = [f"  {line}" for line in table.aligned(rows, right=(3, 4, 5)).splitlines()]
    if not all(row.certain for row in traffic):
        lines.append("  +: some are in loops whose turns are not known, counted as one turn")
    return lines
