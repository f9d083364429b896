"""Kill a run again and again, and compare its end: python -m benchmarks.resume [--trials=50]

Question: does a run that is killed at any moment, and started again by the same command, end with
exactly the losses, evaluations and state of a run that was never stopped?

VCC's quickstart, cut to steps of milliseconds, runs once undisturbed. Then runs of the same config
are killed: SIGKILL, SIGTERM, or SIGTERM and SIGKILL shortly after, at seeded moments of every phase
(the start, compilation, steps, saves, evaluations, anywhere). A killed run is started again and
killed again, up to five times, then left to finish and compared bit by bit: every line of
metrics.jsonl but its times, and every leaf of the last checkpoint (weights, both moments, step,
random key) with the data position. All runs share one cache of compiled programs.

The phase in the table is the one that the kill met. SIGTERM must end with status 143 after a save,
or in the start, where there is nothing to save, by the signal itself.
"""

import argparse
import collections
import dataclasses
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import measure, plots
from benchmarks.killed_runs import Ending, Kill, Run, finish, trial
from benchmarks.same_end import differences
from train.table import aligned

CHAIN = 5  # kills of one run at most
WANTED = ("anywhere", "start", "compile", "steps", "save", "evaluation")
SIGNALS = (("SIGKILL",), ("SIGTERM",), ("SIGKILL",), ("SIGTERM", "SIGKILL"))
PHASES = ("start", "compile", "steps", "save", "evaluation", "end")
CUT: dict[str, Any] = {
    "total_steps": 60,
    "eval_every": 10,
    "checkpoint_every": 7,
    "keep_checkpoints": 2,
    "log_every": 1,
    "optimizer.warmup_steps": 4,
    "model.d_model": 32,
    "model.d_ff": 64,
    "model.num_layers": 2,
    "model.num_heads": 2,
    "model.num_fine_blocks": 4,
    "model.dropout_rate": 0.1,
    "data.length": 256,
    "data.fact_groups": 2,
    "data.train_documents": 100,
    "data.validation_documents": 32,
    "data.curriculum_lengths": "64",
    "data.curriculum_groups": "1",
    "data.curriculum_batches": "16",
    "data.curriculum_steps": "25",
}
FLAGS = (
    "--config=configs/vcc.py:quickstart",
    *(f"--config.{name}={value}" for name, value in CUT.items()),
)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """One kill, and how the run that suffered it ended.

    Attributes:
      ending: of the killed process.
      run: number of the chain of kills it belongs to.
      differences: between that run's end and the end of the run never stopped; none: equal.
    """

    ending: Ending
    run: int
    differences: tuple[str, ...]


def plan(trials: int, seed: int) -> list[Kill]:
    """Returns the kills: where, how far into it, and by which signals; equal for equal seeds."""
    draw = random.Random(seed)
    kills = [
        Kill(WANTED[i % len(WANTED)], draw.random(), SIGNALS[i // len(WANTED) % len(SIGNALS)])
        for i in range(trials)
    ]
    draw.shuffle(kills)
    return kills


def measure_resumes(
    flags: Sequence[str],
    folder: Path,
    *,
    trials: int = 50,
    seed: int = 0,
    chain: int = CHAIN,
    say: Callable[[str], None] = print,
) -> list[Outcome]:
    """Kills runs `trials` times and returns what became of each.

    Args:
      flags: of `train.main`, without workdir and cache.
      folder: for the workdirs; those that end equal are removed.
      trials: kills that met a living run.
      seed: of the moments.
      chain: kills of one run at most, before it may finish.
      say: takes a line a run.
    """
    whole = Run((*flags, f"--config.compilation_cache={folder / 'compiled'}"), folder / "whole")
    finish(whole)  # compiles and prepares data
    whole = dataclasses.replace(whole, workdir=folder / "again")
    life = finish(whole)
    first = differences(folder / "whole", whole.workdir)
    if first:
        raise RuntimeError(f"two runs never stopped differ: {first[:3]}")
    say(f"a run never stopped takes {life.seconds:.1f} s, {life.start:.1f} s of it the start")
    left, outcomes, number = plan(trials, seed), [], 0
    while left:
        number += 1
        run = dataclasses.replace(whole, workdir=folder / f"killed{number}")
        own, met = left[:chain], []
        for kill in own:
            found = trial(run, kill, life)
            if found is None:  # it had finished before its moment came
                break
            met.append(found)
            if found.status == 0:
                break
        left = [*own[len(met) :], *left[len(own) :]]
        outcomes += _compared(run, number, met, folder / "whole")
        say(_line(number, met, outcomes))
    return outcomes


def _compared(run: Run, number: int, met: list[Ending], whole: Path) -> list[Outcome]:
    """Lets a killed run finish and compares it; one that cannot finish differs."""
    try:
        finish(run)
        found = differences(whole, run.workdir)
    except RuntimeError as error:
        found = [str(error)]
    wrong = [f"{e.phase}: {e.signals[0]}: status {e.status}" for e in met if not e.as_promised]
    if not found and not wrong:
        shutil.rmtree(run.workdir)
    return [Outcome(ending, number, (*found, *wrong)) for ending in met]


def _line(number: int, met: Sequence[Ending], outcomes: Sequence[Outcome]) -> str:
    kills = ", ".join(f"{'+'.join(e.signals)} in {e.phase} (step {e.step})" for e in met)
    own = [outcome for outcome in outcomes if outcome.run == number]
    verdict = "equal" if all(not o.differences for o in own) else f"NOT EQUAL: {own[0].differences}"
    return f"run {number}, {len(outcomes)} kills in all: {kills or 'finished unharmed'}: {verdict}"


def table(outcomes: Sequence[Outcome]) -> str:
    """Returns one line a phase: kills by signal, and how many ended equal."""
    kinds = list(dict.fromkeys("+".join(signals) for signals in SIGNALS))
    rows = [("killed in", *kinds, "kills", "equal", "unequal")]
    counted = collections.Counter(
        (o.ending.phase, "+".join(o.ending.signals), not o.differences) for o in outcomes
    )
    for phase in (*(p for p in PHASES if any(key[0] == p for key in counted)), "all"):
        own = {key: n for key, n in counted.items() if phase in (key[0], "all")}
        by_kind = [sum(n for key, n in own.items() if key[1] == kind) for kind in kinds]
        equal = sum(n for key, n in own.items() if key[2])
        total = sum(own.values())
        rows.append((phase, *map(str, (*by_kind, total, equal, total - equal))))
    return aligned(rows, right=range(1, 7))


def to_dict(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Returns the counts and every kill, for JSON."""
    equal = sum(not outcome.differences for outcome in outcomes)
    return {
        "kills": len(outcomes),
        "runs": len({outcome.run for outcome in outcomes}),
        "equal": equal,
        "unequal": len(outcomes) - equal,
        "by_phase": dict(collections.Counter(outcome.ending.phase for outcome in outcomes)),
        "trials": [_record(outcome) for outcome in outcomes],
    }


def _record(outcome: Outcome) -> dict[str, Any]:
    made = dataclasses.asdict(outcome.ending)
    return made | {"run": outcome.run, "differences": list(outcome.differences)}


def figure(outcomes: Sequence[Outcome]) -> Any:
    """Returns a matplotlib figure: every kill by its moment and phase."""
    made, axes = plots.panels(1, 1)
    axis = axes[0][0]
    for place, phase in enumerate(PHASES):
        own = [o for o in outcomes if o.ending.phase == phase]
        for equal, colour, mark in ((True, plots.COLOURS[0], "o"), (False, plots.COLOURS[1], "X")):
            seconds = [o.ending.seconds for o in own if (not o.differences) == equal]
            heights = [place + 0.25 * (i % 5 - 2) / 2 for i in range(len(seconds))]
            axis.scatter(seconds, heights, s=18, color=colour, marker=mark, alpha=0.7)
    axis.set_yticks(range(len(PHASES)), PHASES)
    axis.set_ylim(len(PHASES) - 0.5, -0.5)
    axis.set_xlabel("seconds from the start to the signal", fontsize=9)
    good = sum(not outcome.differences for outcome in outcomes)
    title = f"{len(outcomes)} kills, {good} ended bit-equal"
    axis.set_title(title, loc="left", fontsize=11, fontweight="bold")
    return made


def main() -> None:
    """Measures, prints the table, writes JSON and a plot; status 1 where a run ended otherwise."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trials", type=int, default=50, help="kills")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--folder", help="for the runs, kept; else a temporary one")
    parser.add_argument("--out", default=str(measure.RESULTS), help="folder of the results")
    options = parser.parse_args()
    began = time.perf_counter()
    folder = Path(options.folder or tempfile.mkdtemp(prefix="resume"))
    outcomes = measure_resumes(FLAGS, folder, trials=options.trials, seed=options.seed)
    seconds = time.perf_counter() - began
    settings: Mapping[str, Any] = {"trials": options.trials, "seed": options.seed}
    made = to_dict(outcomes)
    result = {
        "question": "does a run killed at any moment end like one never stopped, bit by bit?",
        "environment": measure.environment(settings),
        "flags": list(FLAGS),
        "seconds": seconds,
        **made,
    }
    path = measure.save("resume", result, options.out)
    plots.save(figure(outcomes), f"{options.out}/resume.png")
    print(f"\n{table(outcomes)}")
    print(f"\n{made['runs']} runs, {path} and the same as .png; {seconds:.0f} s")
    if made["unequal"]:
        raise SystemExit(f"{made['unequal']} kills changed a run; their folders are in {folder}")
    if not options.folder:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
