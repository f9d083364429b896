"""The demo's report: one HTML file with its plots inside."""

import base64
import html
import io
from pathlib import Path
from typing import Any

import numpy as np

COLOURS = {"vcc": "#0072B2", "dense": "#D55E00", "k0": "#999999", "random": "#009E73"}
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem;
       color: #222; }
h1 { font-size: 1.5rem; } h2 { margin-top: 2.2rem; font-size: 1.2rem; } h3 { font-size: 1rem; }
table { border-collapse: collapse; } th, td { padding: .3rem .8rem; text-align: right;
       border-bottom: 1px solid #ddd; } th:first-child, td:first-child { text-align: left; }
img { max-width: 100%; } code { background: #f3f3f3; padding: 0 .2rem; }
.map { display: flex; flex-wrap: wrap; gap: 2px; }
.cell { width: 11px; height: 11px; background: #e6e6e6; display: inline-block; }
.open { background: #0072B2; } .holds { outline: 2px solid #E69F00; }
ol { font-size: .85rem; } .answer { background: #fdebc8; }
"""


def table_html(rows: list[tuple[str, ...]]) -> str:
    """Returns an HTML table; the first row is the head."""
    head, *body = [[html.escape(cell) for cell in row] for row in rows]
    lines = ["<tr>" + "".join(f"<th>{cell}</th>" for cell in head) + "</tr>"]
    lines += ["<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in body]
    return "<table>" + "".join(lines) + "</table>"


def image(figure: Any) -> str:
    """Returns a matplotlib figure as an <img> that needs no other file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, bbox_inches="tight")
    encoded = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="plot" src="data:image/png;base64,{encoded}">'


def _axes(rows: int, columns: int) -> tuple[Any, Any]:
    """Returns a figure and its axes, row by row."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2 * columns, 3.6 * rows))
    axes = figure.subplots(rows, columns).ravel()
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.subplots_adjust(wspace=0.28, hspace=0.3)
    return figure, axes


def curve_plots(sides: dict[str, dict[str, Any]]) -> Any:
    """Returns a figure: training loss, and held-out accuracy, against steps and seconds.

    Args:
      sides: {name: {"title", "curves"}} with curves as of `demo_runs.curves`.
    """
    figure, axes = _axes(2, 2)
    for axis, (split, against) in zip(
        axes,
        [(split, against) for split in ("train", "validation") for against in ("step", "seconds")],
        strict=True,
    ):
        _curves(axis, sides, split, against)
    axes[0].legend(frameon=False, fontsize=8)
    return figure


def summary_plot(sides: dict[str, dict[str, Any]], lengths: list[dict[str, Any]]) -> Any:
    """Returns the demo in one picture: accuracy by steps, by seconds, and time against length.

    Args:
      sides: as for `curve_plots`.
      lengths: rows of `vcc_length.measure_lengths`.
    """
    figure, axes = _axes(1, 3)
    _curves(axes[0], sides, "validation", "step")
    _curves(axes[1], sides, "validation", "seconds")
    axes[0].legend(frameon=False, fontsize=8)
    for name in ("vcc", "dense"):
        rows = [row for row in lengths if row["side"] == name and row["ms"]]
        axes[2].plot(
            [row["n"] for row in rows],
            [row["ms"] for row in rows],
            color=COLOURS[name],
            marker="o",
            markersize=4,
        )
        label = {"vcc": "VCC layer", "dense": "dense layer"}[name]
        end = (rows[-1]["n"], rows[-1]["ms"])
        axes[2].annotate(
            label, end, (-6, 6), textcoords="offset points", ha="right", color=COLOURS[name]
        )
    ticks = sorted({row["n"] for row in lengths})
    axes[2].set(xscale="log", yscale="log", xlabel="tokens in the document")
    axes[2].set_xticks(ticks, [f"{n // 1024}K" for n in ticks])
    axes[2].minorticks_off()
    axes[2].set_ylabel("ms, forward + backward of a document")
    return figure


def _curves(axis: Any, sides: dict[str, dict[str, Any]], split: str, against: str) -> None:
    """Draws training loss or held-out accuracy of every side against steps or seconds."""
    metric = "loss" if split == "train" else "accuracy"
    for name, side in sides.items():
        lines = side["curves"].get(split, [])
        x, y = [line[against] for line in lines], [line[metric] for line in lines]
        if split == "train":
            axis.plot(x, _smooth(y), color=COLOURS[name], label=side["title"])
        else:
            axis.plot(x, y, color=COLOURS[name], marker="o", markersize=4, label=side["title"])
    if split == "train":
        axis.set_ylabel("training loss (mean of 5 logged)")
    else:
        axis.set_ylabel("held-out accuracy, 4,096 tokens")
        axis.set_ylim(0, 1.02)
    axis.set_xlabel("steps" if against == "step" else "seconds of training")
    if against == "seconds":
        axis.set_xscale("log")


def _smooth(values: list[float], window: int = 5) -> list[float]:
    return [float(np.mean(values[max(0, i - window + 1) : i + 1])) for i in range(len(values))]


def write(path: Path, sections: list[tuple[str, str]], title: str) -> None:
    """Writes the report: (heading, HTML) sections under a title."""
    body = "\n".join(f"<h2>{html.escape(name)}</h2>\n{content}" for name, content in sections)
    path.write_text(
        f"<!doctype html><html lang='en'><meta charset='utf-8'><title>{html.escape(title)}</title>"
        f"<style>{STYLE}</style><h1>{html.escape(title)}</h1>\n{body}</html>\n"
    )
