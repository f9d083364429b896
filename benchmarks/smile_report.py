"""Tables and the figure of what `smile_all2all --measure` found."""

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks import plots
from train.table import aligned

Row = Mapping[str, Any]
NAMES = {
    "flat": "one level, flat",
    "two_hop": "one level, two hops",
    "bi_level": "bi-level",
}
COLOURS = dict(zip(NAMES, plots.COLOURS, strict=False))


def case_name(row: Row) -> str:
    """Returns what a row is of: "exchange, 256 B a peer", "forward, 64x64x64"."""
    size = row["size"]
    if row["kind"] == "exchange":
        return f"exchange, {plots.short(size)} B a peer"
    return f"{row['kind']}, {'x'.join(map(str, size))}"


def exchange_table(rows: Sequence[Row]) -> str:
    """Returns a line a case and form: times of one exchange (or layer), and what a node sent.

    "opened": connections to other nodes that the form's first run added; two hops before bi-level.
    """
    head = ("case", "form", "ms", "quartiles", "rounds", "gain", "least", "opened", "segments")
    lines = [(*head, "link, KB", "loopback, KB")]
    for row in rows:
        opened = row["connections_opened"]
        lines.append(
            (
                case_name(row),
                NAMES[row["form"]],
                f"{row['median_ms']:.1f}",
                f"{row['lower_ms']:.1f}-{row['upper_ms']:.1f}",
                str(row["rounds"]),
                f"{row['gain']:.2f}x",
                f"{row['gain_least']:.2f}x",
                "" if opened is None else f"{opened}",
                f"{row['segments']:.0f}",
                f"{row['link_bytes'] / 1e3:.1f}",
                f"{row['loopback_bytes'] / 1e3:.1f}",
            )
        )
    return aligned(lines, range(2, len(lines[0])))


def verdict(rows: Sequence[Row]) -> list[str]:
    """Returns a line a form other than flat: where it won, where it lost, where neither.

    Won and lost only where medians and the least disturbed runs agree, by more than 10 %.
    """
    found = []
    for form in ("two_hop", "bi_level"):
        own = [row for row in rows if row["form"] == form]
        if not own:
            continue
        groups: dict[str, list[str]] = {"faster": [], "slower": [], "not told apart": []}
        for row in own:
            both = row["gain"], row["gain_least"]
            verdict = "faster" if min(both) > 1.1 else "slower" if max(both) < 0.9 else ""
            text = f"{case_name(row)} {both[0]:.2f}x ({both[1]:.2f}x)"
            groups[verdict or "not told apart"].append(text)
        told = (f"{name}: {'; '.join(cases) or 'none'}" for name, cases in groups.items())
        found.append(f"{NAMES[form]} against flat. {'. '.join(told)}.")
    return found


def dispatch_table(rows: Sequence[Row]) -> str:
    """Returns a line a size, direction and side; the ratio is its time by the library's."""
    lines = [("tokens x d x experts", "", "dispatch", "ms", "quartiles", "ratio", "peak, MB")]
    for row in rows:
        size = "x".join(map(str, row["size"]))
        if row["skipped"]:
            lines.append((size, row["kind"], row["side"], "not run:", row["skipped"], "", ""))
            continue
        peak = "not told" if row["peak_mb"] is None else f"{row['peak_mb']:.1f}"
        span = f"{row['lower_ms']:.2f}-{row['upper_ms']:.2f}"
        ratio = "" if row["ratio"] is None else f"{row['ratio']:.1f}x"
        times = f"{row['median_ms']:.2f}", span, ratio, peak
        lines.append((size, row["kind"], row["side"], *times))
    return aligned(lines, range(3, 7))


def figure(exchanges: Sequence[Row], dispatch: Sequence[Row], note: str) -> Any:
    """Returns a matplotlib figure: exchanges by size, the gains of all cases, the dispatch."""
    made, (axes,) = plots.panels(1, 3)
    _sizes(axes[0], [row for row in exchanges if row["kind"] == "exchange"])
    _gains(axes[1], exchanges)
    _dispatch(axes[2], [row for row in dispatch if row["kind"] == "forward+backward"])
    plots.footnote(made, note)
    return made


def _sizes(axis: Any, rows: Sequence[Row]) -> None:
    axis.set_title("one exchange", loc="left", fontsize=11, fontweight="bold")
    if not rows:
        _absent(axis)
        return
    sizes = sorted({row["size"] for row in rows})
    lines = []
    for form, name in NAMES.items():
        own = sorted((row for row in rows if row["form"] == form), key=lambda row: row["size"])
        y = [row["median_ms"] for row in own]
        lines.append(plots.Line(name, COLOURS[form], sizes, y, [True] * len(y)))
    plots.scaling_chart(axis, lines, sizes, "bytes to each peer", "milliseconds, median")


def _gains(axis: Any, rows: Sequence[Row]) -> None:
    title = "time of flat by time of"
    axis.set_title(title, loc="left", fontsize=11, fontweight="bold")
    cases = list(dict.fromkeys(case_name(row) for row in rows))
    if not cases:
        _absent(axis)
        return
    for shift, form in ((-0.2, "two_hop"), (0.2, "bi_level")):
        gains = [row["gain"] for row in rows if row["form"] == form]
        places = [place + shift for place in range(len(cases))]
        bars = axis.barh(places, gains, 0.36, color=COLOURS[form], label=NAMES[form])
        axis.bar_label(bars, [f"{gain:.1f}" for gain in gains], padding=3, fontsize=8)
    axis.axvline(1, color=plots.GREY, linewidth=0.9)
    axis.set_yticks(range(len(cases)), cases)
    axis.invert_yaxis()
    axis.set_xlim(0, 1.2 * max(1.0, *(row["gain"] for row in rows)))
    axis.set_xlabel("above 1: faster than flat", fontsize=9)
    axis.legend(fontsize=8, frameon=False, loc="lower right")


def _dispatch(axis: Any, rows: Sequence[Row]) -> None:
    title = "dispatch on one device, with gradient"
    axis.set_title(title, loc="left", fontsize=11, fontweight="bold")
    own = [row for row in rows if row["median_ms"]]
    if not own:
        _absent(axis)
        return
    sizes = sorted({row["size"][0]: row["size"] for row in own}.values())
    ticks = [size[0] for size in sizes]
    lines = []
    for side, colour in zip(dict.fromkeys(row["side"] for row in own), plots.COLOURS, strict=False):
        mine = {row["size"]: row["median_ms"] for row in own if row["side"] == side}
        x = [tick for tick, size in zip(ticks, sizes, strict=True) if size in mine]
        lines.append(plots.Line(side, colour, x, list(mine.values()), [True] * len(x)))
    plots.scaling_chart(axis, lines, ticks, "tokens", "milliseconds, median")


def _absent(axis: Any) -> None:
    axis.text(0.5, 0.5, "not run", ha="center", color=plots.GREY, transform=axis.transAxes)
    axis.set_axis_off()
