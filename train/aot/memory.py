"""Bytes of one device by kind, and what to say and try where they are not enough."""

import dataclasses
import re
from collections.abc import Iterable

import jax
from ml_collections import ConfigDict

from configs import fields
from jaxmodels.core.task import Batch
from train.state import Layout
from train.table import bytes_per_device

_UNITS = {"": 1, "b": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}
_SIZE = r"([\d.]+) ?([KMGT]?)(?:i?[Bb](?:ytes)?)?"
# The compilers' and allocators' own words: (needed, available), then what was asked for at once.
_NEEDED = (
    re.compile(rf"required for HLO temporaries \({_SIZE}\) exceeds available HBM \({_SIZE}\)"),
    re.compile(rf"Used {_SIZE} of {_SIZE} hbm"),
)
_OVER = re.compile(rf"Exceeded hbm capacity by {_SIZE}")
_ASKED = re.compile(rf"allocat(?:e|ing)\D{{0,20}}{_SIZE}")
_FREE = re.compile(rf"There are {_SIZE} free")
_SHORT_OF_MEMORY = re.compile(
    r"out of memory|allocat|exceeds available|hbm capacity", re.IGNORECASE
)


@dataclasses.dataclass(frozen=True)
class Usage:
    """Bytes that one step needs on one device.

    Attributes:
      parameters: trainable and frozen ones.
      optimizer: the optimiser's state.
      batch: one batch.
      other: the remaining arguments (step, random key) and the padding of all of them.
      temporaries: activations, gradients and whatever else lives only during the step.
      results: those that take no argument's place; donated ones do, and are not counted twice.
      program: the instructions.
      peak: XLA's own figure for the most in use at once, where it gives one.
    """

    parameters: int
    optimizer: int
    batch: int
    other: int
    temporaries: int
    results: int
    program: int
    peak: int | None

    @property
    def total(self) -> int:
        """All of it."""
        arguments = self.parameters + self.optimizer + self.batch + self.other
        return arguments + self.temporaries + self.results + self.program


def held(plan: Layout, batch: Batch) -> dict[str, int]:
    """Returns the bytes of one device that are known from shapes alone, by kind.

    Args:
      plan: of the state.
      batch: arrays or placed shape structs.
    """
    return {
        "parameters": bytes_per_device(plan.abstract.params),
        "optimiser state": bytes_per_device(plan.abstract.opt_state),
        "batch": bytes_per_device(batch),
    }


def usage(program: jax.stages.Compiled, plan: Layout, batch: Batch) -> Usage | None:
    """Returns what a compiled step needs; None where the compiler does not say.

    Args:
      program: the compiled step.
      plan: of the state that it was compiled for.
      batch: that it was compiled for.
    """
    found = program.memory_analysis()
    if found is None:
        return None
    parameters, optimizer, rows = held(plan, batch).values()
    results = max(0, found.output_size_in_bytes - found.alias_size_in_bytes)
    temporaries = found.temp_size_in_bytes
    peak = getattr(found, "peak_memory_in_bytes", None) or None
    if peak and _mesh(plan).devices.flat[0].platform == "tpu":
        # A TPU's temporaries are listed with those that share a place; elsewhere they are one
        # block that is taken as a whole.
        at_once = peak - found.argument_size_in_bytes - results
        temporaries = min(temporaries, max(0, at_once))
    return Usage(
        parameters,
        optimizer,
        rows,
        max(0, found.argument_size_in_bytes - parameters - optimizer - rows),
        temporaries,
        results,
        found.generated_code_size_in_bytes,
        peak,
    )


def is_exhausted(error: BaseException) -> bool:
    """Whether an error says that a device's (or this machine's) memory is not enough."""
    if isinstance(error, MemoryError):
        return True
    text = str(error)
    known = isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in text
    return known and _SHORT_OF_MEMORY.search(text) is not None


def needed_and_available(error: BaseException) -> tuple[int, int] | None:
    """Returns the bytes that a compiler says a program needs, and those that a device has."""
    text = str(error)
    for pattern in _NEEDED:
        if match := pattern.search(text):
            needed, available = _parse(*match.groups()[:2]), _parse(*match.groups()[2:])
            over = _OVER.search(text)
            return (available + _parse(*over.groups()) if over else needed), available
    return None


def explain(
    error: BaseException, plan: Layout, batch: Batch, config: ConfigDict, doing: str = "running"
) -> str | None:
    """Returns one line on an out-of-memory error: who takes how much, and three settings to try.

    Args:
      error: what compiling or running the step raised.
      plan: of the state.
      batch: the batch, as arrays or placed shape structs.
      config: of the run.
      doing: "compiling" or "running" the step.

    Returns:
      None where the error is about something else.
    """
    if not is_exhausted(error):
        return None
    parts = held(plan, batch)
    known = sum(parts.values())
    found = needed_and_available(error)
    if found:
        parts["activations, gradients and the rest"] = max(0, found[0] - known)
        over = size(found[0] - found[1])
        said = f"{size(found[0])} needed of {size(found[1])}, {over} too much"
    else:
        gradients = bytes_per_device(plan.abstract.trainable)
        parts["gradients"], said = gradients, _asked(str(error))
    listed = ", ".join(f"{name} {size(count)}" for name, count in parts.items())
    rest = "" if found else " and the activations"
    most = found[0] if found else known + parts["gradients"]
    # So many times smaller must the part that is not known from shapes become.
    times = (found[0] - known) / (found[1] - known) if found and found[1] > known else 1.0
    tries = "; ".join(settings(config, plan, batch, known > most / 2, times))
    return f"out of memory on a device {doing} the step: {said} ({listed}{rest}). Try {tries}"


def settings(
    config: ConfigDict, plan: Layout, batch: Batch, state_is_large: bool, times: float = 1.0
) -> list[str]:
    """Returns three changes of settings that lower the memory, the most promising first.

    Args:
      config: of the run.
      plan: of the state.
      batch: the batch that is too large.
      state_is_large: parameters and optimiser state take more than all else.
      times: how many times smaller the activations must become, where that is known.
    """
    mesh = _mesh(plan)
    state = list(_smaller_state(config, mesh.shape["node"], mesh.size))
    step = list(_smaller_step(config, batch, mesh.size, times))
    return (state + step if state_is_large else step + state)[:3]


def _mesh(plan: Layout) -> jax.sharding.Mesh:
    return jax.tree.leaves(plan.abstract.trainable)[0].sharding.mesh


def _smaller_state(config: ConfigDict, nodes: int, devices: int) -> Iterable[str]:
    if nodes > 1:
        yield (
            f"--config.mesh.node=1 --config.mesh.device={devices} "
            "(splits parameters and optimiser state further)"
        )
    yield (
        f"more than {devices} devices: a larger mesh.device splits parameters and optimiser state "
        "further"
    )
    if config.optimizer.name in ("adam", "adamw"):
        yield "--config.optimizer.name=adafactor (a much smaller state, but another optimiser)"


def _smaller_step(config: ConfigDict, batch: Batch, devices: int, times: float) -> Iterable[str]:
    rows = next(iter(batch.values())).shape[0]
    parts = config.micro_batches
    possible = [
        more
        for more in range(parts + 1, rows // devices + 1)
        if rows % (more * devices) == 0 and config.batch_size % (more * devices) == 0
    ]
    if possible:
        more = next((n for n in possible if n >= parts * times), possible[-1])
        yield f"--config.micro_batches={more} (the same result, fewer activations at once)"
    for name, value in fields.flat(config).items():
        if name.rpartition(".")[2] == "remat" and value in ("none", False):
            chosen = "full" if value == "none" else "true"
            yield f"--config.{name}={chosen} (activations are computed again instead of kept)"
    fewer = int(config.batch_size / max(times, 2.0))
    fewer -= fewer % (parts * devices)
    if fewer:
        yield f"--config.batch_size={fewer} (changes training)"
    for name, value in fields.flat(config).items():
        if name.rpartition(".")[2] == "dtype" and value == "float32":
            yield f"--config.{name}=bfloat16 (halves the activations)"
    yield "shorter inputs, or a smaller model"


def size(count: float) -> str:
    """Returns bytes in words: `15.75 GiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024 or unit == "GiB":
            break
        count /= 1024
    return f"{count:,.0f} {unit}" if abs(count) >= 1000 else f"{count:.4g} {unit}"


def _asked(text: str) -> str:
    asked, free = _ASKED.search(text), _FREE.search(text)
    if asked is None:
        return "the allocator names no size"
    left = f", {size(_parse(*free.groups()))} were free" if free else ""
    return f"{size(_parse(*asked.groups()))} could not be had{left}"


def _parse(number: str, unit: str) -> int:
    return int(float(number.rstrip(".")) * _UNITS[unit.lower()])
