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


def _axes(columns: int, height: float = 3.4) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, columns, figsize=(5.2 * columns, height))
    for axis in np.atleast_1d(axes):
        axis.spines[["top", "right"]].set_visible(False)
    figure.subplots_adjust(wspace=0.28)
    return figure, np.atleast_1d(axes)


def curve_plots(sides: dict[str, dict[str, Any]]) -> Any:
    """Returns a figure: training loss, and held-out accuracy, against steps and seconds.

    Args:
      sides: {name: {"title", "curves"}} with curves as of `demo_runs.curves`.
    """
    figure, axes = _axes(4, height=3.6)
    drawn = (("train", "loss"), ("validation", "accuracy"))
    for row, (split, metric) in enumerate(drawn):
        for column, against in enumerate(("step", "seconds")):
            axis = axes[2 * row + column]
            for name, side in sides.items():
                lines = side["curves"].get(split, [])
                x, y = [line[against] for line in lines], [line[metric] for line in lines]
                y = _smooth(y) if split == "train" else y
                marker = None if split == "train" else "o"
                axis.plot(
                    x, y, color=COLOURS[name], marker=marker, markersize=4, label=side["title"]
                )
            axis.set_xlabel("steps" if against == "step" else "seconds of training")
            if against == "seconds":
                axis.set_xscale("log")
        axes[2 * row].set_ylabel(
            "training loss (mean of 5 logged)" if split == "train" else "accuracy, 4,096 tokens"
        )
    axes[2].set_ylim(0, 1.02)
    axes[3].set_ylim(0, 1.02)
    axes[0].legend(frameon=False, fontsize=8)
    return figure


def _smooth(values: list[float], window: int = 5) -> list[float]:
    return [float(np.mean(values[max(0, i - window + 1) : i + 1])) for i in range(len(values))]


def write(path: Path, sections: list[tuple[str, str]], title: str) -> None:
    """Writes the report: (heading, HTML) sections under a title."""
    body = "\n".join(f"<h2>{html.escape(name)}</h2>\n{content}" for name, content in sections)
    path.write_text(
        f"<!doctype html><html lang='en'><meta charset='utf-8'><title>{html.escape(title)}</title>"
        f"<style>{STYLE}</style><h1>{html.escape(title)}</h1>\n{body}</html>\n"
    )
