"""Cost against document length, VCC and dense: python -m benchmarks.vcc_length [--quick]

Question: how do time, peak memory and FLOPs of forward + backward grow with the length of the
document, for one layer and for a whole encoder, VCC against dense? Batch 1, float32, two sizes:
the quickstart's (width 64) and RoBERTa base (width 768). Long attention is chunked on both sides
(`core.attention.chunking`), so that dense memory is linear in the length: the rival one would use.

A VCC layer is timed as it runs within a stack: selection, refining, both branches, write-back; the
bank of differences is copied once more than in a stack, where it is updated in place. What is too
dear for memory or for the time left is compiled only: FLOPs and peak memory are then known, and the
table says "not run".

Columns: `rows` are those that a VCC layer runs on, of `tokens`; `ms` medians of interleaved runs;
`MiB` the compiler's own plan; `GFLOP` counted in the program; `ratio` dense over VCC; the last one
compares the counted forward FLOPs with `vcc_cost_model` (the side that is furthest off).
"""

import argparse
import dataclasses
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax

from benchmarks import measure, plots, vcc_programs
from jaxmodels.core import attention
from train import devices
from train.flops import count_flops
from train.table import aligned

LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768, 65536)
PRESETS = {"quickstart": "quickstart size, d = 64", "roberta_base_4k": "RoBERTa base, d = 768"}
TITLED = PRESETS | {"t5_base_narrative_qa": "T5 base, d = 768"}
MAX_ROUNDS, WARMUP = 20, 2
FIRST_GUESS = 2e10  # FLOP/s, before anything has been measured
Row = dict[str, Any]


class Budget:
    """Says what may still be run in the time given, from the speed of what has been run.

    Attributes:
      compiling: seconds that each compilation took.
    """

    def __init__(self, seconds: float, costs: Sequence[float]):
        """Starts the clock; `costs` are the FLOPs of the points to come, cheapest first."""
        self.seconds, self.began = seconds, time.perf_counter()
        self.weights = [cost**0.75 for cost in costs]  # a dear point gets more time, fewer rounds
        self.compiling: list[float] = []
        self.speeds: dict[tuple[str, str], float] = {}

    def left(self) -> float:
        """Returns the seconds that are left."""
        return self.seconds - (time.perf_counter() - self.began)

    def compile_time(self) -> float:
        """Returns the mean seconds of a compilation so far; 0 before the first."""
        return sum(self.compiling) / max(1, len(self.compiling))

    def allowed(self, programs_to_come: int) -> float:
        """Returns the seconds for running now; up to half of what is left is kept to compile."""
        return self.left() - min(self.compile_time() * programs_to_come, self.left() / 2)

    def share(self, point: int, allowed: float) -> float:
        """Returns the seconds for all rounds of a point."""
        part = self.weights[point] / sum(self.weights[point:])
        return max(allowed * part, min(allowed, self.seconds / 25))

    def expected(self, part: str, side: str, flops: float) -> float:
        """Returns the seconds that one run should take, from the last run of its kind."""
        speed = self.speeds.get((part, side)) or min(self.speeds.values(), default=FIRST_GUESS)
        return flops / speed


def measure_lengths(
    lengths: Sequence[int] = LENGTHS,
    *,
    preset: str = "quickstart",
    budget_s: float = 45.0,
    parts: Sequence[str] = ("layer",),
    sides: Sequence[str] = ("vcc", "dense"),
    max_gib: float = 12.0,
    progress: Callable[[str], None] | None = None,
) -> list[Row]:
    """Measures one size at several lengths, cheapest points first.

    Args:
      lengths: tokens.
      preset: of configs/vcc.py.
      budget_s: seconds in all, compilation included; ends a few seconds off.
      parts: "layer", "encoder" (which takes about three times as long to compile).
      sides: "vcc" and others of `vcc_programs.PARTS`; the first is what the others are divided by.
      max_gib: programs whose peak is above are not run.
      progress: called with one line a point.

    Returns:
      one row a part, length and side: `preset`, `part`, `side`, `label`, `n` (tokens), `rows` (that
      its VCC layers run on), `num_vip`, `block_size`, `num_fine_blocks`, `status` ("measured" or
      "not run"), `reason`, `ms` (median), `ms_lower`, `ms_upper` (quartiles), `rounds`, `ratio`
      (its time over the first side's), `peak_mib`, `gflop` (forward + backward, counted in the
      program), `moved_mib` (to and from memory, by the compiler: loops count once),
      `gflop_forward` (counted), `gflop_formula` (forward, `vcc_cost_model`). What is not known is
      None.
    """
    points = [_Point(preset, part, n, tuple(sides)) for part in parts for n in lengths]
    points.sort(key=lambda point: point.cost())
    budget = Budget(budget_s, [point.cost() for point in points])
    rows: list[Row] = []
    for index, point in enumerate(points):
        to_come = sum(len(later.sides) for later in points[index + 1 :])
        found = _measure_point(point, budget, index, to_come, max_gib)
        if progress:
            progress(_line(point, found))
        rows += found
    order = {part: i for i, part in enumerate(parts)}
    return sorted(rows, key=lambda row: (order[row["part"]], row["n"]))


@dataclasses.dataclass(frozen=True)
class _Point:
    """One part at one length: the programs that are compared with each other."""

    preset: str
    part: str
    n: int
    wanted: tuple[str, ...]

    @property
    def sides(self) -> tuple[str, ...]:
        return tuple(side for side in self.wanted if side in vcc_programs.PARTS[self.part])

    def program(self, side: str) -> vcc_programs.Program:
        trunk, vcc = vcc_programs.sizes(self.preset, self.n)
        return vcc_programs.make_program(self.part, side, trunk, vcc, self.n)

    def cost(self) -> float:
        return sum(self.program(side).formula for side in self.sides)


def _measure_point(
    point: _Point, budget: Budget, index: int, to_come: int, max_gib: float
) -> list[Row]:
    rows, compiled = {}, {}
    for side in point.sides:
        program = point.program(side)
        rows[side], compiled[side] = _compile(point, side, program, budget)
    allowed, spent, runs = budget.allowed(to_come), 0.0, {}
    for side, row in rows.items():
        expected = budget.expected(point.part, side, 1e9 * row["gflop"])
        if row["reason"]:
            continue
        if row["peak_mib"] is not None and row["peak_mib"] > 1024 * max_gib:
            row["reason"] = f"needs {row['peak_mib'] / 1024:.0f} GiB, {max_gib:g} allowed"
        elif spent + expected > allowed:
            row["reason"] = f"about {expected:.0f} s a run, {max(0, allowed - spent):.0f} s left"
        else:
            spent += expected
            runs[side] = _Run(compiled[side], point.program(side).arguments())
    if runs:
        share = budget.share(index, allowed)
        timed = measure.compare(runs, rounds=MAX_ROUNDS, warmup=WARMUP, seconds_budget=share)
        for side, result in timed.to_dict().items():
            _fill(rows[side], result, with_ratio=point.sides[0] in runs)
            if result["median_ms"]:
                speed = 1e12 * rows[side]["gflop"] / result["median_ms"]
                budget.speeds[point.part, side] = speed
    return list(rows.values())


@dataclasses.dataclass(frozen=True)
class _Run:
    """A compiled program and what it runs on."""

    compiled: Any
    arguments: tuple[Any, ...]

    def __call__(self) -> Any:
        return self.compiled(*self.arguments)


def _compile(
    point: _Point, side: str, program: vcc_programs.Program, budget: Budget
) -> tuple[Row, Any]:
    """Counts a program's FLOPs, and compiles it if there is time."""
    vcc = program.vcc
    traced = jax.jit(program.step).trace(*program.shapes)
    forward = count_flops(jax.make_jaxpr(program.forward)(*program.shapes))
    row = {
        "preset": point.preset,
        "part": point.part,
        "side": side,
        "label": vcc_programs.PARTS[point.part][side],
        "n": point.n,
        "rows": program.rows,
        "num_vip": vcc.num_vip,
        "block_size": vcc.block_size,
        "num_fine_blocks": vcc.num_fine_blocks,
        "status": "not run",
        "reason": None,
        **dict.fromkeys(("ms", "ms_lower", "ms_upper", "rounds", "ratio", "peak_mib", "moved_mib")),
        "gflop": count_flops(traced.jaxpr) / 1e9,
        "gflop_forward": forward / 1e9,
        "gflop_formula": program.formula / 1e9,
    }
    if budget.left() <= budget.compile_time():
        row["reason"] = f"the {budget.seconds:.0f} s were spent"
        return row, None
    began = time.perf_counter()
    compiled = traced.lower().compile()
    budget.compiling.append(time.perf_counter() - began)
    peak = measure.peak_bytes(compiled)
    row["peak_mib"] = None if peak is None else peak / 2**20
    row["moved_mib"] = (compiled.cost_analysis() or {}).get("bytes accessed", 0) / 2**20 or None
    return row, compiled


def _fill(row: Row, result: dict[str, Any], with_ratio: bool) -> None:
    if result["skipped"]:
        row["reason"] = result["skipped"]
        return
    row |= {
        "status": "measured",
        "ms": result["median_ms"],
        "ms_lower": result["lower_ms"],
        "ms_upper": result["upper_ms"],
        "rounds": result["rounds"],
        "ratio": result["ratio"] if with_ratio else None,
    }


def _line(point: _Point, rows: Iterable[Row]) -> str:
    cells = [
        f"{row['label']} {row['ms']:,.0f} ms" if row["ms"] else f"{row['label']} not run"
        for row in rows
    ]
    return f"{point.preset} {point.part} {point.n:,} tokens: {', '.join(cells)}"


def table(rows: Sequence[Row]) -> str:
    """Returns one table for each preset and part in `rows`: a line a length."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["preset"], row["part"]), []).append(row)
    texts = []
    for (preset, part), group in groups.items():
        title = f"{TITLED.get(preset, preset)}, {TITLES[part]}: forward + backward"
        texts.append(f"{title}\n{_group_table(group)}")
    return "\n\n".join(texts)


TITLES = {"layer": "one layer", "encoder": "whole encoder"}
_HEADINGS = {"vcc": "VCC", "dense": "dense", "all_dense": "only dense"}
_HEADINGS |= {side: vcc_programs.PARTS["encoder"][side] for side in ("window", "longt5", "bigbird")}
_METRICS = (("ms", "ms"), ("MiB", "peak_mib"), ("GFLOP", "gflop"))


def _group_table(rows: Sequence[Row]) -> str:
    sides = list(dict.fromkeys(row["side"] for row in rows))
    head = ["tokens", "rows", "p,b,k"]
    for unit, _ in _METRICS:
        head += [f"{unit} {_HEADINGS[sides[0]]}", *(_HEADINGS[side] for side in sides[1:]), "ratio"]
    lines = [(*head, "counted/formula")]
    for n in sorted({row["n"] for row in rows}):
        at = [row for row in rows if row["n"] == n]
        settings = ",".join(str(at[0][x]) for x in ("num_vip", "block_size", "num_fine_blocks"))
        cells = [f"{n:,}", f"{at[0]['rows']:,}", settings]
        for _, name in _METRICS:
            cells += _compared(at, name)
        off = [row["gflop_forward"] / row["gflop_formula"] for row in at]
        lines.append((*cells, f"{max(off, key=lambda ratio: abs(ratio - 1)):.3f}"))
    return "\n".join([aligned(lines, right=range(len(head) + 1)), *_reasons(rows)])


def _compared(rows: Sequence[Row], name: str) -> list[str]:
    """One cell a side, and the second side over the first (of times: within each turn)."""
    missing = "not run" if name == "ms" else "?"
    values = [row[name] for row in rows]
    cells = [missing if value is None else _rounded(value) for value in values]
    ratio = ""
    if len(rows) > 1 and None not in values[:2]:
        ratio = f"{rows[1]['ratio'] if name == 'ms' else values[1] / values[0]:.2f}"
    return [*cells, ratio]


def _rounded(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _reasons(rows: Iterable[Row]) -> list[str]:
    """One line a reason why programs were not run."""
    found: dict[str, list[str]] = {}
    for row in rows:
        if row["reason"]:
            found.setdefault(row["reason"], []).append(f"{row['label']} {plots.short(row['n'])}")
    return [f"  not run: {', '.join(which)}: {reason}" for reason, which in found.items()]


def length_figure(rows: Sequence[Row]) -> Any:
    """Returns a matplotlib figure of `measure_lengths` rows: time, memory and FLOPs by length."""
    parts = list(dict.fromkeys(row["part"] for row in rows))
    size = TITLED.get(rows[0]["preset"], rows[0]["preset"])
    drawn = (("ms", "time, ms"), ("peak_mib", "peak memory, MiB"), ("gflop", "GFLOP"))
    figure, axes = plots.panels(len(parts), len(drawn))
    lengths = sorted({row["n"] for row in rows})
    for line_of_axes, part in zip(axes, parts, strict=True):
        for axis, (name, ylabel) in zip(line_of_axes, drawn, strict=True):
            lines = _lines([row for row in rows if row["part"] == part], name)
            plots.scaling_chart(axis, lines, lengths, "document length, tokens", ylabel)
        title = f"{TITLES[part].capitalize()}, {size}: forward + backward of one document"
        line_of_axes[0].set_title(title, loc="left", fontsize=11, fontweight="bold")
    notes = [f"attention over {attention.chunking()[0]:,} rows or more is chunked"]
    if any(row["ms"] is None for row in rows):
        notes.insert(0, "hollow points: compiled or counted, not run")
    plots.footnote(figure, "; ".join(notes))
    return figure


def _lines(rows: Sequence[Row], name: str) -> list[plots.Line]:
    found = []
    labels = {row["side"]: row["label"] for row in rows}
    for colour, (side, label) in zip(plots.COLOURS, labels.items(), strict=False):
        own = [row for row in rows if row["side"] == side and row[name] is not None]
        x, y = [row["n"] for row in own], [row[name] for row in own]
        found.append(plots.Line(label, colour, x, y, [row["ms"] is not None for row in own]))
    return found


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a command measures; pairs are for the first preset and for the later ones."""

    lengths: tuple[Sequence[int], Sequence[int]]
    parts: tuple[Sequence[str], Sequence[str]]
    sides: Sequence[str]
    first_share: float


FULL = Plan((LENGTHS,) * 2, (("layer", "encoder"),) * 2, ("vcc", "dense", "all_dense"), 0.4)
QUICK = Plan((LENGTHS[:4], LENGTHS[:2]), (("layer", "encoder"), ("layer",)), ("vcc", "dense"), 0.75)


def main() -> None:
    """Measures, prints the tables, and writes JSON, CSV and one PNG a size."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--budget_s", type=float, help="seconds in all (600; --quick: 60)")
    parser.add_argument("--quick", action="store_true", help="short documents only")
    parser.add_argument("--lengths", help="tokens, comma-separated")
    parser.add_argument("--presets", default=",".join(PRESETS), help="of configs/vcc*.py")
    parser.add_argument("--sides", help=f"comma-separated, of {', '.join(_HEADINGS)}")
    parser.add_argument("--max_gib", type=float, default=12.0, help="run no program above")
    parser.add_argument("--out", default=str(measure.RESULTS), help="folder of the results")
    options = parser.parse_args()
    devices.use_compilation_cache(None)
    began = time.perf_counter()
    seconds = options.budget_s or (60.0 if options.quick else 600.0)
    plan = QUICK if options.quick else FULL
    name = "vcc_length_quick" if options.quick else "vcc_length"
    lengths = [int(n) for n in options.lengths.split(",")] if options.lengths else None
    presets, rows = options.presets.split(","), []
    for i, preset in enumerate(presets):
        left = seconds - (time.perf_counter() - began)
        kept = plan.first_share if i + 1 < len(presets) else 1.0
        own = measure_lengths(
            lengths or plan.lengths[i > 0],
            preset=preset,
            budget_s=left * kept,
            parts=("encoder",) if preset.startswith("t5_") else plan.parts[i > 0],
            sides=options.sides.split(",") if options.sides else plan.sides,
            max_gib=options.max_gib,
            progress=lambda line: print(line, flush=True),
        )
        rows += own
        plots.save(length_figure(own), f"{options.out}/{name}_{preset}.png")
    settings = {name: value for name, value in vars(options).items() if name != "out"}
    result = {
        "question": "how do time, memory and FLOPs of forward + backward grow with the length?",
        "environment": measure.environment(settings),
        "rows": rows,
    }
    path = measure.save(name, result, options.out)
    measure.save_csv(name, rows, options.out)
    print("\n" + table(rows))
    print(f"\n{path} and the same as .csv and .png; {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
