"""VCC against full attention on long real documents: python -m benchmarks.vcc_demo

Question: a model has to look up one fact in 4,096 tokens of text. What do VCC and its dense twin
(every VCC layer replaced by full attention; same parameters, data and order) reach, in the same
steps and in the same seconds, and what does it cost? `make demo` sets everything up and runs this;
it ends with a table and runs/demo/report.html. Finished runs in that folder are kept: delete it to
train anew.
"""

import argparse
import html
import json
import time
from pathlib import Path
from typing import Any

from benchmarks import demo_blocks, demo_costs, demo_report, demo_runs, measure, vcc_length
from train.table import aligned

LENGTHS = (1024, 2048, 4096, 8192, 16384)
TITLE = "VCC and its dense twin on 4,096-token documents"


def main() -> None:
    """Trains, evaluates, measures, and writes the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", default="runs/demo", help="folder of the runs and the report")
    parser.add_argument("--seed", default="0", help="seed of parameters and data order")
    arguments = parser.parse_args()
    root, seed = Path(arguments.root), arguments.seed
    root.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    sides = {
        side.name: _side(side, root, {"seed": seed, "log_every": "5"}) for side in demo_runs.SIDES
    }
    print("\nmeasuring the training step, and the cost of 1K to 16K tokens ...", flush=True)
    costs = demo_costs.step_costs({"vcc": {}, "dense": {"model.encoder": "dense"}})
    lengths = vcc_length.measure_lengths(LENGTHS)
    blocks = demo_blocks.opened_blocks(root / "vcc")
    rows = result_table(sides, costs)
    findings = sentences(sides, costs)
    _write(root, rows, findings, sides, lengths, blocks)
    print("\n" + aligned(rows, right=tuple(range(1, len(rows[0])))))
    print("\n" + "\n".join(findings))
    print(f"\n{root / 'report.html'} written; {time.perf_counter() - began:.0f} s in all")


def _side(side: demo_runs.Side, root: Path, extra: dict[str, str]) -> dict[str, Any]:
    """Trains and evaluates one side."""
    print(f"\n=== {side.title}", flush=True)
    process = demo_runs.train(side, root, extra)
    workdir = root / side.name
    return {
        "title": side.title,
        "process": process,
        "curves": demo_runs.curves(workdir),
        "final": demo_runs.evaluate(workdir, {}),
        "swaps": {t: demo_runs.evaluate(workdir, over) for t, over in side.swaps.items()},
    }


def result_table(
    sides: dict[str, dict[str, Any]], costs: dict[str, dict[str, Any]]
) -> list[tuple[str, ...]]:
    """Returns the rows of the table: one a trained side, one a swapped control."""
    rows = [
        (
            "",
            "accuracy",
            "answer's block opened",
            "training s",
            "step ms",
            "step memory MiB",
            "process peak MiB",
            "step GFLOP",
            "parameters",
        )
    ]
    for name, side in sides.items():
        cost, peak = costs.get(name), side["process"]["peak_bytes"] / 2**20
        measured = ("", "", "", "")
        if cost:
            measured = (
                f"{cost['step_ms']:.0f}",
                f"{cost['step_peak_bytes'] / 2**20:.0f}",
                f"{cost['step_gflop']:.1f}",
                f"{cost['parameters']:,}",
            )
        seconds = f"{side['curves']['train'][-1]['seconds']:.0f}"
        ms, memory, gflop, count = measured
        scores = _scores(side["final"])
        rows.append((side["title"], *scores, seconds, ms, memory, f"{peak:.0f}", gflop, count))
        for title, final in side["swaps"].items():
            rows.append((title, *_scores(final), *[""] * 6))
    return rows


def _scores(final: dict[str, float]) -> tuple[str, str]:
    """Accuracy, and recall of the answer's block in each VCC layer."""
    recall = [f"{v:.1%}" for k, v in sorted(final.items()) if k.startswith("recall_")]
    return f"{final['accuracy']:.1%}", " / ".join(recall)


def sentences(sides: dict[str, dict[str, Any]], costs: dict[str, dict[str, Any]]) -> list[str]:
    """Returns what was found, in words."""
    vcc, dense = sides["vcc"], sides["dense"]
    steps = vcc["curves"]["train"][-1]["step"]
    seconds = vcc["curves"]["train"][-1]["seconds"]
    ratio = costs["dense"]["step_ms"] / costs["vcc"]["step_ms"]
    same = [x for x in dense["curves"]["validation"] if x["seconds"] <= seconds]
    then = (
        f"{same[-1]['accuracy']:.1%} (step {same[-1]['step']}, on the in-training documents)"
        if same
        else "nothing measured yet"
    )
    documents = demo_runs.EVALUATION_DOCUMENTS
    answering = [side["final"]["evaluation_seconds"] for side in (vcc, dense)]
    return [
        f"In the same {steps} steps: VCC {vcc['final']['accuracy']:.1%}, dense "
        f"{dense['final']['accuracy']:.1%} of {documents} held-out documents.",
        f"In the same {seconds:.0f} s of training: dense had reached {then}; it took "
        f"{dense['curves']['train'][-1]['seconds']:.0f} s for all steps.",
        f"A training step at 4,096 tokens: VCC {costs['vcc']['step_ms']:.0f} ms, dense "
        f"{costs['dense']['step_ms']:.0f} ms: {ratio:.1f}x.",
        f"Answering for {documents} held-out documents: VCC {answering[0]:.1f} s, dense "
        f"{answering[1]:.1f} s: {answering[1] / answering[0]:.1f}x.",
    ]


def _write(
    root: Path,
    rows: list[tuple[str, ...]],
    findings: list[str],
    sides: dict[str, dict[str, Any]],
    lengths: list[dict[str, Any]],
    blocks: dict[str, Any],
) -> None:
    """Writes demo.json and report.html."""
    numbers = {name: {k: v for k, v in s.items() if k != "curves"} for name, s in sides.items()}
    record = {"environment": measure.environment(), "table": rows, "findings": findings}
    record |= {"sides": numbers, "lengths": lengths}
    (root / "demo.json").write_text(json.dumps(record, indent=1) + "\n")
    words = "".join(f"<li>{html.escape(sentence)}</li>" for sentence in findings)
    about = (
        "<p>Each document is real text (Python's own documentation) with 32 facts planted in it, "
        "&ldquo;the code of KEY is VALUE.&rdquo;; four questions in front ask for one each. "
        "Held-out topics; 16 values, so guessing gives 6%, and guessing among the four facts of "
        "the right place 25%.</p>"
    )
    curves = demo_report.image(demo_report.curve_plots(sides))
    cost = demo_report.image(vcc_length.length_figure(lengths))
    summary = demo_report.summary_plot(sides, lengths)
    summary.savefig(root / "summary.png", dpi=110, bbox_inches="tight")
    machine = ", ".join(f"{k} {v}" for k, v in measure.environment().items())
    sections = [
        ("Result", about + f"<ul>{words}</ul>" + demo_report.table_html(rows)),
        ("Learning", curves),
        ("Cost against document length", cost),
        ("Which blocks were opened", demo_blocks.to_html(blocks)),
        ("Measured on", f"<p>{html.escape(machine)}</p><p><code>make demo</code></p>"),
    ]
    demo_report.write(root / "report.html", sections, TITLE)


if __name__ == "__main__":
    main()
