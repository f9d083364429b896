"""Cost against length on a TPU that is not there: python -m benchmarks.vcc_length_tpu

Question: what do forward + backward of an encoder take on a TPU up to 131,072 tokens, VCC against
dense and the sparse baselines, by the TPU's own compiler?

Each program of `vcc_programs` is compiled for one chip of --topology and never run. Peak memory and
bytes moved (loops counted once, so a lower bound) are the compiler's; FLOPs are counted in the
traced program, as in `vcc_length`. A program that the chip has no memory for is told by what it
would need. Writes JSON and CSV after each program, so that a stopped run keeps what it has. Needs
jax[tpu].
"""

import argparse
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax

from benchmarks import measure, vcc_programs
from jaxmodels.core import partitioning
from train.aot import memory
from train.aot.topology import environment, mesh_for, parse
from train.flops import count_flops
from train.table import aligned

LENGTHS = (4096, 8192, 16384, 32768, 65536, 131072)
SIDES = ("vcc", "dense", "window", "longt5", "bigbird")
Row = dict[str, Any]


def compile_lengths(
    topology: str = "v5e:1x1",
    preset: str = "t5_base_narrative_qa",
    lengths: Sequence[int] = LENGTHS,
    sides: Sequence[str] = SIDES,
    budget_s: float = 3600.0,
    told: Callable[[list[Row]], None] | None = None,
) -> list[Row]:
    """Compiles the encoder of a preset at several lengths, shortest first.

    Args:
      topology: as for `train.compile`; one chip of it is compiled for.
      preset: of configs/vcc.py or configs/vcc_t5.py.
      lengths: tokens.
      sides: of `vcc_programs.PARTS["encoder"]`.
      budget_s: seconds after which no further program is compiled.
      told: called with all rows after each program.

    Returns:
      one row a length and side: `preset`, `side`, `label`, `n`, `rows`, `gflop`, `peak_mib`,
      `moved_mib`, `compile_s` and `reason`, why the compiler gave up or was not asked.
    """
    place = partitioning.replicated(mesh_for(parse(topology)))
    began, rows = time.perf_counter(), []
    for n in sorted(lengths):
        for side in sides:
            left = budget_s - (time.perf_counter() - began)
            rows.append(_row(preset, side, n, place, left > 0))
            if told:
                told(rows)
    return rows


def _row(preset: str, side: str, n: int, place: Any, in_time: bool) -> Row:
    trunk, vcc = vcc_programs.sizes(preset, n)
    program = vcc_programs.make_program("encoder", side, trunk, vcc, n)
    shapes = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), program.shapes
    )
    traced = jax.jit(program.step).trace(*shapes)
    row: Row = {
        **{"preset": preset, "side": side, "label": vcc_programs.PARTS["encoder"][side]},
        **{"n": n, "rows": program.rows, "gflop": count_flops(traced.jaxpr) / 1e9},
        **dict.fromkeys(("peak_mib", "moved_mib", "compile_s", "reason")),
    }
    if not in_time:
        return row | {"reason": "no time was left"}
    started = time.perf_counter()
    try:
        compiled = traced.lower(lowering_platforms=("tpu",)).compile()
    except jax.errors.JaxRuntimeError as error:
        needed = memory.needed_and_available(error)
        row["peak_mib"] = needed[0] / 2**20 if needed else None
        return row | {"reason": " ".join(str(error).split())[:200]}
    peak = measure.peak_bytes(compiled)
    return row | {
        "compile_s": time.perf_counter() - started,
        "peak_mib": None if peak is None else peak / 2**20,
        "moved_mib": (compiled.cost_analysis() or {}).get("bytes accessed", 0) / 2**20 or None,
    }


def table(rows: Sequence[Row]) -> str:
    """Returns a line a length and side."""
    lines = [("tokens", "encoder", "rows", "GFLOP", "peak MiB", "moved MiB", "compile s", "")]
    for row in rows:
        numbers = (row["gflop"], row["peak_mib"], row["moved_mib"], row["compile_s"])
        cells = ["?" if x is None else f"{x:,.0f}" for x in numbers]
        reason = (row["reason"] or "")[:60]
        lines.append((f"{row['n']:,}", row["label"], f"{row['rows']:,}", *cells, reason))
    return aligned(lines, right=(0, 2, 3, 4, 5, 6))


def main() -> None:
    """Compiles, prints the table, and writes JSON and CSV."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--topology", default="v5e:1x1", help="as for train.compile")
    parser.add_argument("--preset", default="t5_base_narrative_qa", help="of configs/vcc*.py")
    parser.add_argument("--lengths", default=",".join(map(str, LENGTHS)))
    parser.add_argument("--sides", default=",".join(SIDES))
    parser.add_argument("--budget_s", type=float, default=3600.0)
    parser.add_argument("--out", default=str(measure.RESULTS), help="folder of the results")
    options = parser.parse_args()
    settings = {name: value for name, value in vars(options).items() if name != "out"}
    os.environ.update(environment(parse(options.topology)))  # before the compiler is loaded

    def keep(rows: list[Row]) -> None:
        question = "what would forward + backward take on a TPU, by its compiler?"
        result = {"question": question, "environment": measure.environment(settings), "rows": rows}
        measure.save("vcc_length_tpu", result, options.out)
        measure.save_csv("vcc_length_tpu", rows, options.out)

    rows = compile_lengths(
        options.topology,
        options.preset,
        [int(n) for n in options.lengths.split(",")],
        options.sides.split(","),
        options.budget_s,
        keep,
    )
    print(table(rows))


if __name__ == "__main__":
    main()
