"""What the trainer costs beside its step: python -m benchmarks.trainer_overhead [--quick]

Questions, on VCC's quickstart cut to steps of about 50 ms on two CPU cores:
  loop    how much longer is a step of `train.loop` on one repeated batch than the bare compiled
          step on it? Target: below 3 %.
  input   how much longer is a step on real data than one on a repeated batch? At most 1.03x.
  save    how long does an asynchronous save of a large state hold the loop, when is it on disk,
          and what do the steps meanwhile lose?
  start   how many seconds from the command to the first step, without and with a compilation cache?

Loop and input: a block of the loop's own steps, then as many bare ones, in turn within one run;
each ratio is of one turn. `input` divides the ratio with real data by that with the repeated
batch, runs in the order repeated, real, real, repeated. On a CPU data and steps share the cores, so
that making a batch costs what an accelerator would hide.
"""

import argparse
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import measure, overhead_loop, overhead_saves, overhead_starts, plots
from benchmarks.overhead_loop import Blocks
from configs import fields as config_fields
from configs import vcc
from train.table import aligned

PARTS = ("loop", "saves", "starts")
LOOP_TARGET, INPUT_TARGET = 1.03, 1.03
Rows = list[tuple[str, str, str]]

_CUT: dict[str, Any] = {
    "optimizer.warmup_steps": 0,
    "data.curriculum_lengths": (),
    "data.curriculum_groups": (),
    "data.curriculum_batches": (),
    "data.curriculum_steps": (),
    "data.validation_documents": 8,
}
LOOP = vcc.PRESETS["quickstart"] | _CUT | {"data.length": 512, "data.fact_groups": 2}
# 12.6 million parameters, with both moments of Adam about 150 MB; short documents, short steps.
SAVES = LOOP | {
    "batch_size": 1,
    "data.length": 64,
    "data.fact_groups": 1,
    "data.train_documents": 8,
    "model.d_model": 512,
    "model.d_ff": 2048,
    "model.num_layers": 4,
    "model.num_heads": 8,
}


def measure_loop(
    fields: config_fields.Fields,
    settings: Mapping[str, Any],
    repeated: str,
    folder: Path,
    *,
    turns: int = 10,
    block: int = 20,
    runs: int = 2,
) -> dict[str, Any]:
    """Returns {"repeated": ..., "real": ..., "input": {ratio}, "summaries": last lines of runs}.

    Args:
      fields: of the config.
      settings: {dotted field: value}.
      repeated: the method whose data are one batch repeated.
      folder: for workdirs.
      turns: of one run.
      block: steps of a turn, of each side.
      runs: of each kind.
    """
    found: dict[str, Blocks] = {"repeated": Blocks((), ()), "real": Blocks((), ())}
    summaries = []
    order = (["repeated", "real", "real", "repeated"] * runs)[: 2 * runs]
    for number, kind in enumerate(order):
        own = dict(settings) | ({"method": repeated} if kind == "repeated" else {})
        workdir = folder / f"loop{number}"
        blocks, summary = overhead_loop.measure_run(fields, own, workdir, turns=turns, block=block)
        found[kind] += blocks
        summaries.append(f"{kind}: {summary}")
    ratio = float(np.median(found["real"].ratios) / np.median(found["repeated"].ratios))
    made = {kind: blocks.to_dict() for kind, blocks in found.items()}
    return made | {"input": {"ratio": ratio}, "summaries": summaries}


def measure_starts(flags: Sequence[str], folder: Path, rounds: int) -> dict[str, Any]:
    """Returns {"first": {seconds, parts}, "second": ..., "ratio": second over first}; medians."""
    starts = overhead_starts.measure_starts(flags, folder, rounds)
    found: dict[str, Any] = {}
    for name, own in starts.items():
        parts = {p: float(np.median([s.parts[p] for s in own])) for p in own[0].parts}
        seconds = [start.seconds for start in own]
        found[name] = {"seconds": float(np.median(seconds)), "all": seconds, "parts": parts}
    pairs = zip(starts["first"], starts["second"], strict=True)
    found["ratio"] = float(np.median([second.seconds / first.seconds for first, second in pairs]))
    return found


def table(found: Mapping[str, Any]) -> str:
    """Returns the table of what was measured, each line with its target where it has one."""
    rows: Rows = []
    if "loop" in found:
        rows += _loop_rows(found["loop"])
    if "saves" in found:
        rows += _save_rows(found["saves"])
    if "starts" in found:
        rows += _start_rows(found["starts"])
    return aligned([("", "measured", "target"), *rows], right=())


def _loop_rows(loop: Mapping[str, Any]) -> Rows:
    rows: Rows = []
    for kind, name in (("repeated", "repeated batch"), ("real", "real data")):
        one = loop[kind]
        cost = f"{one['ratio'] - 1:+.1%} ({one['lower'] - 1:+.1%} to {one['upper'] - 1:+.1%})"
        times = f"{one['bare_ms']:.1f} -> {one['loop_ms']:.1f} ms, {one['turns']} turns"
        target = _judged(one["ratio"] < LOOP_TARGET, "< 3 %") if kind == "repeated" else ""
        rows.append((f"loop beside its step, {name}", f"{cost}, {times}", target))
    ratio = loop["input"]["ratio"]
    met = _judged(ratio <= INPUT_TARGET, f"<= {INPUT_TARGET:g}x")
    return [*rows, ("real data against a repeated batch", f"{ratio:.3f}x", met)]


def _save_rows(saves: Mapping[str, Any]) -> Rows:
    size, step = saves["megabytes"], saves["step_ms"]
    return [
        (f"save of {size:,.0f} MB: the loop is held", f"{1e3 * saves['held_s']:,.0f} ms", ""),
        ("  on disk, training going on, after", f"{1e3 * saves['on_disk_s']:,.0f} ms", ""),
        (f"  lost in all, steps of {step:.0f} ms", f"{1e3 * saves['lost_s']:,.0f} ms", ""),
    ]


def _start_rows(starts: Mapping[str, Any]) -> Rows:
    rows: Rows = []
    for name, text in (("first", "without compiled programs"), ("second", "with those of before")):
        parts = ", ".join(f"{part} {s:.1f}" for part, s in starts[name]["parts"].items())
        rows.append((f"first step, {text}", f"{starts[name]['seconds']:.1f} s ({parts})", ""))
    return [*rows, ("second start against the first", f"{starts['ratio']:.2f}x", "")]


def _judged(met: bool, target: str) -> str:
    return f"{target}: {'met' if met else 'MISSED'}"


def figure(found: Mapping[str, Any]) -> Any:
    """Returns a matplotlib figure: turns of the loop, a save, and the two starts."""
    names = [name for name in PARTS if name in found]
    made, axes = plots.panels(1, len(names))
    draw = {"loop": _draw_loop, "saves": _draw_saves, "starts": _draw_starts}
    for axis, name in zip(axes[0], names, strict=True):
        draw[name](axis, found[name])
    return made


def _draw_loop(axis: Any, loop: Mapping[str, Any]) -> None:
    kinds = {"repeated": "repeated batch", "real": "real data"}
    for place, (kind, colour) in enumerate(zip(kinds, plots.COLOURS, strict=False)):
        costs = [100 * (ratio - 1) for ratio in loop[kind]["ratios"]]
        spread = np.linspace(-0.2, 0.2, len(costs))
        axis.scatter(place + spread, costs, s=14, color=colour, alpha=0.6)
        middle = 100 * (loop[kind]["ratio"] - 1)
        axis.plot([place - 0.3, place + 0.3], [middle] * 2, color=colour, linewidth=2)
    axis.axhline(100 * (LOOP_TARGET - 1), color=plots.GREY, linewidth=0.9, linestyle="--")
    axis.set_xticks(range(len(kinds)), kinds.values())
    axis.set_ylabel("step of the loop against the bare step, %", fontsize=9)
    axis.set_title(f"Loop, steps of {loop['repeated']['bare_ms']:.0f} ms", loc="left", fontsize=11)


def _draw_saves(axis: Any, saves: Mapping[str, Any]) -> None:
    labels = {"held_s": "loop held", "lost_s": "training lost", "on_disk_s": "on disk"}
    values = [1e3 * saves[name] for name in labels]
    bars = axis.barh(range(len(labels)), values, color=plots.COLOURS[: len(labels)], height=0.6)
    axis.bar_label(bars, [f"{value:,.0f} ms" for value in values], padding=4, fontsize=9)
    axis.set_yticks(range(len(labels)), labels.values())
    axis.invert_yaxis()
    axis.set_xlim(0, 1.25 * max(*values, 1e-3))
    axis.set_xlabel("ms", fontsize=9)
    axis.set_title(f"A save of {saves['megabytes']:,.0f} MB", loc="left", fontsize=11)


def _draw_starts(axis: Any, starts: Mapping[str, Any]) -> None:
    names = ("first", "second")
    left = np.zeros(len(names))
    for part, colour in zip(starts["first"]["parts"], plots.COLOURS, strict=False):
        seconds = [starts[name]["parts"][part] for name in names]
        axis.barh(range(len(names)), seconds, left=left, color=colour, height=0.6, label=part)
        left = left + seconds
    axis.set_yticks(range(len(names)), ["no cache", "cache"])
    axis.invert_yaxis()
    axis.set_xlabel("seconds from the command to the first step", fontsize=9)
    axis.legend(fontsize=8, frameon=False, ncols=2, loc="lower right")
    axis.set_title("Start", loc="left", fontsize=11)


def flags(settings: Mapping[str, Any]) -> list[str]:
    """Returns the command-line form of settings on top of VCC's quickstart."""
    made = ["--config=configs/vcc.py:quickstart"]
    for name, value in settings.items():
        if vcc.PRESETS["quickstart"].get(name, vcc.FIELDS[name].default) != value:
            text = ",".join(map(str, value)) if isinstance(value, tuple) else value
            made.append(f"--config.{name}={text}")
    return made


def main() -> None:
    """Measures, prints the table, and writes JSON and a plot."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a few turns: a look, no result")
    parser.add_argument("--parts", default=",".join(PARTS), help="which of them")
    parser.add_argument("--length", type=int, default=LOOP["data.length"], help="tokens")
    parser.add_argument("--batch_size", type=int, default=LOOP["batch_size"], help="documents")
    parser.add_argument("--out", default=str(measure.RESULTS), help="folder of the results")
    options = parser.parse_args()
    began, parts = time.perf_counter(), options.parts.split(",")
    loop = LOOP | {"data.length": options.length, "batch_size": options.batch_size}
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="trainer_overhead") as place:
        folder = Path(place)
        if "loop" in parts:
            few = {"turns": 3, "runs": 1} if options.quick else {}
            found["loop"] = measure_loop(
                vcc.FIELDS, loop, "benchmarks.repeated_batch", folder, **few
            )
        if "saves" in parts:
            rounds = 2 if options.quick else 7
            saves = overhead_saves.measure_saves(vcc.FIELDS, SAVES, folder / "s", rounds=rounds)
            found["saves"] = saves.to_dict()
        if "starts" in parts:
            rounds = 1 if options.quick else 3
            found["starts"] = measure_starts(flags(loop), folder, rounds)
    result = {
        "question": __doc__,
        "environment": measure.environment({k: v for k, v in vars(options).items() if k != "out"}),
        "settings": {"loop": loop, "saves": SAVES},
        **found,
    }
    name = "trainer_overhead_quick" if options.quick else "trainer_overhead"
    path = measure.save(name, result, options.out)
    plots.save(figure(found), f"{options.out}/{name}.png")
    print(table(found))
    print(f"\n{path} and the same as .png; {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
