"""How every benchmark measures and records, so that two of them can be compared.

Sides are run in turn (A B, B A, ...), so that a slow minute of the machine meets all of them; the
ratio is taken within each turn. Wall-clock time, results waited for.
"""

import csv
import dataclasses
import datetime
import json
import math
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

RESULTS = Path(__file__).parent / "results"
Sides = Mapping[str, Callable[[], Any]]


@dataclasses.dataclass(frozen=True)
class Measured:
    """What one side took.

    Attributes:
      seconds: of each counted run.
      ratio: median over turns of this side's time over the first side's; None where the first
        side, or this one, has no time.
      warm: False where time allowed for one run only, so that it counts without a warm-up.
      skipped: why there is no time; None where there is one.
    """

    seconds: tuple[float, ...] = ()
    ratio: float | None = None
    warm: bool = True
    skipped: str | None = None

    def quartile_ms(self, number: int) -> float | None:
        """Returns the first, second (the median) or third quartile in ms; None without a time."""
        if not self.seconds:
            return None
        return 1e3 * float(np.quantile(self.seconds, number / 4))

    @property
    def median_ms(self) -> float | None:
        """Milliseconds, the median; None without a time."""
        return self.quartile_ms(2)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What `compare` returns: a `Measured` a side, in the order given."""

    sides: dict[str, Measured]

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Returns {side: median_ms, lower_ms, upper_ms, rounds, ratio, warm, skipped} for JSON."""
        return {
            name: {
                "median_ms": side.median_ms,
                "lower_ms": side.quartile_ms(1),
                "upper_ms": side.quartile_ms(3),
                "rounds": len(side.seconds),
                "ratio": side.ratio,
                "warm": side.warm,
                "skipped": side.skipped,
            }
            for name, side in self.sides.items()
        }


def compare(
    sides: Sides,
    *,
    rounds: int = 20,
    warmup: int = 2,
    seconds_budget: float = 60.0,
    clock: Callable[[], float] = time.perf_counter,
) -> Comparison:
    """Times callables against each other, in turn.

    Args:
      sides: {name: callable}; the first is what the others are divided by. Compile beforehand,
        or let the warm-up do it.
      rounds: counted runs a side; fewer where the budget ends first, but at least one.
      warmup: runs before those; at most half of all runs where the budget ends first.
      seconds_budget: no turn is begun that would end after it, going by the last one. The first
        turn is always run.
      clock: seconds, for tests.

    Returns:
      the times. A side that runs out of memory is left out from then on, with the reason; every
      other error is raised.

    Raises:
      ValueError: no sides, or no rounds.
    """
    if not sides or rounds < 1 or warmup < 0:
        raise ValueError(
            f"compare: {len(sides)} sides, rounds={rounds}, warmup={warmup}; "
            "give one side or more, rounds >= 1 and warmup >= 0."
        )
    began = clock()
    times: dict[str, list[float]] = {name: [] for name in sides}
    skipped: dict[str, str] = {}
    for turn in range(warmup + rounds):
        live = [name for name in sides if name not in skipped]
        if turn and clock() - began + sum(times[name][-1] for name in live) > seconds_budget:
            break
        for name in live if turn % 2 == 0 else reversed(live):
            start = clock()
            try:
                jax.block_until_ready(sides[name]())
            except (MemoryError, jax.errors.JaxRuntimeError) as error:
                skipped[name] = _out_of_memory(error)
            else:
                times[name].append(clock() - start)
    return _summary(times, warmup, skipped)


def _out_of_memory(error: Exception) -> str:
    """The reason to record; any error but an exhausted memory is raised again."""
    text = str(error).strip()
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in text or "ut of memory" in text:
        first = text.splitlines()[0] if text else type(error).__name__
        return f"out of memory: {first[:200]}"
    raise error


def _summary(times: dict[str, list[float]], warmup: int, skipped: dict[str, str]) -> Comparison:
    base = next(iter(times))
    sides = {}
    for name, seconds in times.items():
        if name in skipped:
            sides[name] = Measured(skipped=skipped[name])
            continue
        first = min(warmup, len(seconds) // 2)
        ratio = None
        if base not in skipped:
            pairs = zip(seconds[first:], times[base][first:], strict=True)
            ratio = float(np.median([own / other for own, other in pairs]))
        sides[name] = Measured(tuple(seconds[first:]), ratio, warm=first > 0 or warmup == 0)
    return Comparison(sides)


def peak_bytes(compiled: Any) -> int | None:
    """Returns what a program needs at its peak, by the compiler's own plan.

    Args:
      compiled: of `jax.jit(f).lower(...).compile()`.

    Returns:
      temporaries + arguments + results - what they share, in bytes on one device; None where the
      backend does not tell.
    """
    plan = compiled.memory_analysis()
    if plan is None:
        return None
    held = plan.temp_size_in_bytes + plan.argument_size_in_bytes + plan.output_size_in_bytes
    return int(held - plan.alias_size_in_bytes)


def environment(config: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Returns where and when a measurement was made, and with which settings (`config`)."""
    device = jax.devices()[0]
    found = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": f"{len(jax.devices())} x {device.device_kind}",
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        "jax": jax.__version__,
        "jaxlib": jax.lib.__version__,
    }
    if os.environ.get("XLA_FLAGS"):
        found["XLA_FLAGS"] = os.environ["XLA_FLAGS"]
    return found if config is None else found | {"config": dict(config)}


def _processor() -> str:
    """The processor's name where the system tells it, else its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def save(name: str, result: Mapping[str, Any], folder: Path | str = RESULTS) -> Path:
    """Writes `<folder>/<name>.json` and returns its path; NaN and infinities become null."""
    path = Path(folder) / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(_finite(result), indent=1) + "\n")
    return path


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float | np.floating):
        return float(value) if math.isfinite(value) else None
    return int(value) if isinstance(value, np.integer) else value


def save_csv(name: str, rows: Sequence[Mapping[str, Any]], folder: Path | str = RESULTS) -> Path:
    """Writes `<folder>/<name>.csv`, one line a row, columns of the first row; returns its path."""
    path = Path(folder) / f"{name}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path
