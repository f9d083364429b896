"""Line charts of a cost against a size, readable without their text; needs matplotlib.

Colours are told apart by colour-blind readers (Okabe and Ito); lines are labelled at their end.
Figures are made without pyplot: no window, no global state.
"""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

COLOURS = ("#0072B2", "#D55E00", "#CC79A7", "#009E73", "#E69F00", "#56B4E9")
GREY = "#666666"
LABEL_GAP = 0.085  # of the axis height: the least distance between two labels


@dataclasses.dataclass(frozen=True)
class Line:
    """One line of a chart.

    Attributes:
      label: written at its end.
      colour: of the line and the label.
      x: sizes, ascending.
      y: costs; all positive.
      run: a point each: True where the program was run, False (hollow) where it was not.
    """

    label: str
    colour: str
    x: Sequence[float]
    y: Sequence[float]
    run: Sequence[bool]


def panels(rows: int, columns: int) -> tuple[Any, list[list[Any]]]:
    """Returns a figure and its axes [rows][columns], with bare frames."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.9 * columns, 3.5 * rows), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.1)
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=9, colors="#333333")
    return figure, [list(row) for row in axes]


def scaling_chart(
    axis: Any, lines: Sequence[Line], sizes: Sequence[float], xlabel: str, ylabel: str
) -> None:
    """Draws lines on two logarithmic axes, and how far the second is above the first.

    Args:
      axis: of `panels`.
      lines: empty ones are left out.
      sizes: the ticks of the horizontal axis, ascending.
      xlabel: with its unit.
      ylabel: with its unit.
    """
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xlabel(xlabel, fontsize=9)
    axis.set_ylabel(ylabel, fontsize=9)
    drawn = [line for line in lines if line.x]
    for line in drawn:
        _draw(axis, line)
    _ticks(axis, sizes)
    _end_labels(axis, drawn)
    if len(drawn) > 1:
        _ratio(axis, drawn[0], drawn[1])


def _draw(axis: Any, line: Line) -> None:
    axis.plot(line.x, line.y, color=line.colour, linewidth=1.6, zorder=2)
    for run, fill in ((True, line.colour), (False, "white")):
        points = [(x, y) for x, y, was in zip(line.x, line.y, line.run, strict=True) if was == run]
        if points:
            x, y = zip(*points, strict=True)
            axis.scatter(x, y, s=26, facecolor=fill, edgecolor=line.colour, linewidth=1.4, zorder=3)


def _ticks(axis: Any, sizes: Sequence[float]) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axis.set_xticks(sizes, [short(size) for size in sizes])
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set_xlim(sizes[0] / 1.2, sizes[-1] * 1.2)
    low, high = axis.get_ylim()
    if high < 10 * low:  # a power of ten at least, so that small differences look small
        widen = math.sqrt(10 * low / high)
        low, high = axis.set_ylim(low / widen, high * widen)
    if math.log10(high / low) < 1.5:  # fewer than two powers of ten: mark 2 and 5 as well
        axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axis.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: ""))
    axis.grid(axis="y", color="#e5e5e5", linewidth=0.7, zorder=0)


def _end_labels(axis: Any, lines: Sequence[Line]) -> None:
    """Writes each label right of its line's end; where two would overlap, the upper one rises."""
    low, high = (math.log(limit) for limit in axis.get_ylim())
    last = -1.0
    for line in sorted(lines, key=lambda line: line.y[-1]):
        height = max((math.log(line.y[-1]) - low) / (high - low), last + LABEL_GAP)
        last = height
        axis.annotate(
            line.label,
            (line.x[-1], height),
            xycoords=axis.get_xaxis_transform(),
            xytext=(8, 0),
            textcoords="offset points",
            color=line.colour,
            fontsize=9,
            va="center",
        )


def _ratio(axis: Any, base: Line, other: Line) -> None:
    """Spans the distance of two lines at the last size they share, if wide, with their ratio."""
    common = sorted(set(base.x) & set(other.x))
    if not common:
        return
    at = common[-1]
    low, high = base.y[list(base.x).index(at)], other.y[list(other.x).index(at)]
    bottom, top = axis.get_ylim()
    if abs(math.log(high / low)) < 0.2 * math.log(top / bottom):  # no room for the text
        return
    arrow = {"arrowstyle": "<->", "color": GREY, "linewidth": 0.9, "shrinkA": 5, "shrinkB": 5}
    axis.annotate("", (at, low), (at, high), arrowprops=arrow)
    ratio = high / low
    side = 1 if at == min((*base.x, *other.x)) else -1  # inside the frame
    axis.annotate(
        f"{ratio:.0f}x" if ratio >= 10 else f"{ratio:.1f}x",
        (at, math.sqrt(low * high)),
        xytext=(5 * side, 0),
        textcoords="offset points",
        ha="left" if side > 0 else "right",
        va="center",
        color=GREY,
        fontsize=9,
    )


def footnote(figure: Any, text: str) -> None:
    """Writes a line below the panels."""
    figure.supxlabel(text, x=0.01, ha="left", fontsize=8.5, color=GREY)


def short(size: float) -> str:
    """Returns 1024 as "1K", and what is no multiple of 1,024 as it is."""
    return f"{size // 1024:.0f}K" if size >= 1024 and size % 1024 == 0 else f"{size:g}"


def save(figure: Any, path: Path | str) -> Path:
    """Writes a figure as PNG and returns its path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, facecolor="white")
    return path
