"""Options beyond the paper against the exact method: python -m benchmarks.vcc_options [--quick]

Question: what do time and memory gain from each option of `VccConfig` that changes the method, on
a T5 of the small size (2 local layers, 4 VCC layers), batch 1, float32, random weights?

    training   forward + backward of the encoder: one selection for 2 or 4 layers; blocks opened
               until they have half of the attention (shapes stay, so this saves no time by itself:
               `opened` says what a program of that size would)
    answering  encoder once and 16 tokens: the decoder attends to all tokens, or to compressed rows
    questions  the encoder, question and document at once, or the document encoded before

Whether answers stay as good is not measured here: weights are random.
"""

import argparse
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import measure, plots
from jaxmodels import decoding
from jaxmodels.core import partitioning
from jaxmodels.trunks import t5
from jaxmodels.vcc import VccConfig, VccT5, layer_kinds
from train import devices
from train.table import aligned

TRUNK = dataclasses.replace(t5.SIZES["t5_small"], dropout_rate=0.0)
EXACT = VccConfig(layer_kinds(2, 4), num_vip=64, block_size=16, num_fine_blocks=40)
NEW_TOKENS, ROUNDS, WARMUP = 16, 15, 2
Program = tuple[Callable[..., Any], tuple[Any, ...]]
Row = dict[str, Any]

# Part: side: what differs from the exact method, which is the first side.
SIDES: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "training": {
        "exact": {},
        "selection for 2 layers": {"share_selection": 2},
        "selection for 4 layers": {"share_selection": 4},
        "half of the attention": {"open_share": 0.5},
    },
    "answering": {"to tokens (exact)": {}, "to rows": {"cross_attention": "rows"}},
    "questions": {"together": {"question_apart": True}, "document kept": {"question_apart": True}},
}


@functools.lru_cache
def parameters(trunk: t5.T5Config) -> Any:
    """Random parameters, alike for all sides: no cost depends on them, what is opened does."""
    init = functools.partial(t5.T5(trunk).init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
    rng = np.random.default_rng(0)

    def draw(leaf: Any) -> jax.Array:
        scale = 1.0 if leaf.ndim < 2 else leaf.shape[-2] ** -0.5
        return jnp.asarray(scale * np.resize(rng.standard_normal(65537, np.float32), leaf.shape))

    return jax.tree.map(draw, partitioning.unbox(jax.eval_shape(init)["params"]))


def inputs(trunk: t5.T5Config, n: int, question: int) -> dict[str, jax.Array]:
    """A question of so many tokens, and a document behind it; n tokens in all."""
    ids = np.random.default_rng(1).integers(2, min(trunk.vocab_size, 32000), (1, n))
    vip = np.arange(n)[None] < question
    return {
        "input_ids": jnp.asarray(ids, jnp.int32),
        "attention_mask": jnp.ones((1, n), jnp.int32),
        "vip_mask": jnp.asarray(vip, jnp.int32),
    }


def make_program(part: str, side: str, trunk: t5.T5Config, vcc: VccConfig, n: int) -> Program:
    """Returns a function and its arguments.

    Raises:
      ValueError: a part or side that is not in `SIDES`.
    """
    if side not in SIDES.get(part, {}):
        raise ValueError(f"part {part!r}, side {side!r}: use one of {SIDES}.")
    model = VccT5(trunk, dataclasses.replace(vcc, **SIDES[part][side]))
    params, given = parameters(trunk), inputs(trunk, n, vcc.num_vip)

    def encode(params: Any, given: Any) -> tuple[jax.Array, Any]:
        return model.apply({"params": params}, **given, method="encode_traced")

    if part == "training":

        def step(params: Any, given: Any) -> Any:
            y, pull, opened = jax.vjp(lambda params: encode(params, given), params, has_aux=True)
            return pull(y)[0]["encoder"], opened["fine_blocks"]

        return step, (params, given)
    if part == "answering":
        wanted = decoding.GenerationSettings(max_new_tokens=NEW_TOKENS)
        generator = decoding.Generator(model, wanted)
        return lambda params, given: generator(params, **given).sequences, (params, given)
    if side == "together":
        return lambda params, given: encode(params, given)[0], (params, given)
    question = {name: x[:, : vcc.num_vip] for name, x in given.items()}
    behind = (given[name][:, vcc.num_vip :] for name in ("input_ids", "attention_mask"))
    kept = functools.partial(model.apply, {"params": params}, method="encode_document")
    question["document"] = jax.jit(kept)(*behind)
    return lambda params, question: encode(params, question)[0], (params, question)


def measure_options(
    n: int,
    *,
    trunk: t5.T5Config = TRUNK,
    vcc: VccConfig = EXACT,
    parts: Sequence[str] = tuple(SIDES),
    rounds: int = ROUNDS,
    seconds: float = 60.0,
) -> list[Row]:
    """Measures every side of the parts.

    Args:
      n: tokens of question and document.
      trunk: sizes of T5.
      vcc: the exact method.
      parts: of `SIDES`.
      rounds: counted runs a side.
      seconds: a part.

    Returns:
      one row a side: `part`, `side`, `n`, `ms` (median), `ms_lower`, `ms_upper` (quartiles),
      `rounds`, `ratio` (its time over the first side's), `peak_mib` and `opened` (share of the k
      slots that held a block; training alone). What is not known is None.
    """
    rows = []
    for part in parts:
        runs, found = {}, {}
        for side in SIDES[part]:
            function, arguments = make_program(part, side, trunk, vcc, n)
            compiled = jax.jit(function).lower(*arguments).compile()
            peak, opened = measure.peak_bytes(compiled), None
            if part == "training":
                opened = float((np.asarray(compiled(*arguments)[1]) >= 0).mean())
            found[side] = {"peak_mib": None if peak is None else peak / 2**20, "opened": opened}
            runs[side] = functools.partial(compiled, *arguments)
        timed = measure.compare(runs, rounds=rounds, warmup=WARMUP, seconds_budget=seconds)
        for side, result in timed.to_dict().items():
            times = {
                "ms": result["median_ms"],
                "ms_lower": result["lower_ms"],
                "ms_upper": result["upper_ms"],
                "rounds": result["rounds"],
                "ratio": result["ratio"],
            }
            rows.append({"part": part, "side": side, "n": n, **times, **found[side]})
    return rows


def table(rows: Sequence[Row]) -> str:
    """Returns the rows as aligned text."""
    lines = [("part", "side", "ms", "ratio", "peak MiB", "opened")]
    for row in rows:
        numbers = [("ms", "{:,.0f}"), ("ratio", "{:.2f}"), ("peak_mib", "{:,.0f}")]
        cells = ["?" if row[key] is None else text.format(row[key]) for key, text in numbers]
        opened = "" if row["opened"] is None else f"{row['opened']:.0%}"
        lines.append((row["part"], row["side"], *cells, opened))
    return aligned(lines, right=range(2, 6))


def options_figure(rows: Sequence[Row]) -> Any:
    """Returns a matplotlib figure: a panel a part, a bar a side, with its ratio to the first."""
    parts = list(dict.fromkeys(row["part"] for row in rows))
    figure, axes = plots.panels(1, len(parts))
    for axis, part in zip(axes[0], parts, strict=True):
        own = [row for row in rows if row["part"] == part and row["ms"]]
        bars = axis.barh(
            [row["side"] for row in own],
            [row["ms"] for row in own],
            color=[plots.COLOURS[0], *[plots.COLOURS[1]] * (len(own) - 1)],
        )
        axis.bar_label(bars, [f"{row['ratio']:.2f}x" for row in own], padding=3, fontsize=9)
        axis.invert_yaxis()
        axis.margins(x=0.18)
        axis.set_xlabel("time, ms", fontsize=9)
        axis.set_title(f"{part.capitalize()}, {plots.short(rows[0]['n'])} tokens", loc="left")
    plots.footnote(figure, "median of interleaved runs; beside each bar its time over the first's")
    return figure


def main() -> None:
    """Measures, prints the table, and writes JSON and PNG."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="2K tokens")
    parser.add_argument("--tokens", type=int, help="of question and document (8192; --quick: 2048)")
    parser.add_argument("--seconds", type=float, default=60.0, help="a part, compilation aside")
    parser.add_argument("--out", default=str(measure.RESULTS), help="folder of the results")
    options = parser.parse_args()
    devices.use_compilation_cache(None)
    name = "vcc_options_quick" if options.quick else "vcc_options"
    rows = measure_options(
        options.tokens or (2048 if options.quick else 8192), seconds=options.seconds
    )
    settings = {key: value for key, value in vars(options).items() if key != "out"}
    result = {
        "question": "what does each option beyond the paper gain in time and memory?",
        "environment": measure.environment(settings),
        "rows": rows,
    }
    path = measure.save(name, result, options.out)
    plots.save(options_figure(rows), f"{options.out}/{name}.png")
    print(table(rows))
    print(f"\n{path} and the same as .png")


if __name__ == "__main__":
    main()
