"""Generating text: python -m benchmarks.decoding [--batch 8 --length 64 --new 64 --rounds 7]

Question: how many tokens a second does a T5 of t5-small's size generate, greedily and with four
beams, beside Hugging Face transformers (PyTorch, CPU) with the same random weights?

Both sides read the same ids and generate the same number of new tokens (no end-of-sequence token,
so that neither stops early); the sequences are compared before anything is timed. A third side
decodes again from the start at every token, as generation without a cache does. Ours is compiled
beforehand; how long that took stands beside the times. Sides run in turn, medians are kept.
"""

import argparse
import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import measure, plots
from jaxmodels import decoding, weights
from jaxmodels.trunks import t5
from jaxmodels.weights.tensor_file import as_tensor_file
from train.table import aligned

SMALL = {"d_model": 32, "d_ff": 64, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 2}
BEAMS = (1, 4)


@dataclasses.dataclass(frozen=True)
class Work:
    """What is generated: rows, input tokens a row, new tokens a row."""

    batch: int
    length: int
    new: int


def sizes(tiny: bool) -> t5.T5Config:
    """Returns t5-small's sizes, or far smaller ones for tests."""
    small = t5.SIZES["t5_small"]
    return dataclasses.replace(small, **SMALL, head_dim=8, vocab_size=96) if tiny else small


def hugging_face(config: t5.T5Config) -> Any:
    """Returns transformers' model of these sizes with random weights.

    Raises:
      ImportError: torch or transformers is not installed.
    """
    import torch
    import transformers

    torch.manual_seed(0)
    settings = transformers.T5Config(
        vocab_size=config.vocab_size,
        d_model=config.d_model,
        d_kv=config.head_dim,
        d_ff=config.d_ff,
        num_layers=config.num_layers,
        num_decoder_layers=config.num_decoder_layers,
        num_heads=config.num_heads,
        decoder_start_token_id=config.start_id,
    )
    model = transformers.T5ForConditionalGeneration(settings).eval()
    model.generation_config.eos_token_id = None
    return model


def import_params(model: Any) -> Any:
    """Returns our parameters of a PyTorch model, on the device."""
    tensors = {name: value.detach().numpy() for name, value in model.state_dict().items()}
    file = as_tensor_file(tensors)
    return jax.tree.map(jnp.asarray, weights.import_tree(file, weights.detect(file).rules(file)))


def inputs(config: t5.T5Config, work: Work) -> tuple[np.ndarray, np.ndarray]:
    """Returns random ids and a mask [batch, length] whose rows have several lengths."""
    rng = np.random.default_rng(0)
    ids = rng.integers(2, config.vocab_size, (work.batch, work.length)).astype(np.int32)
    used = rng.integers(work.length // 2, work.length + 1, work.batch)
    mask = (np.arange(work.length) < used[:, None]).astype(np.int32)
    return ids * mask, mask


def ours(
    config: t5.T5Config, params: Any, given: tuple[Any, Any], work: Work, beams: int
) -> tuple[Callable[[], Any], float]:
    """Returns a call that generates, and the seconds that compiling it took."""
    settings = decoding.GenerationSettings(max_new_tokens=work.new, pad_token_id=0, num_beams=beams)
    generator = decoding.Generator(t5.T5(config), settings)
    began = time.perf_counter()
    generator.lower(params, *given).compile()
    seconds = time.perf_counter() - began
    return lambda: generator(params, *given).sequences, seconds


def theirs(model: Any, given: tuple[Any, Any], work: Work, beams: int) -> Callable[[], Any]:
    """Returns a call of transformers' `generate`."""
    import torch

    ids, mask = (torch.from_numpy(x).long() for x in given)

    def generate() -> np.ndarray:
        with torch.inference_mode():
            found = model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=work.new,
                num_beams=beams,
                do_sample=False,
                eos_token_id=None,
            )
        return found.numpy()

    return generate


def again_from_the_start(
    config: t5.T5Config, params: Any, given: tuple[Any, Any], work: Work
) -> Callable[[], Any]:
    """Returns a greedy loop, compiled, that decodes the whole prefix at every token."""
    model = t5.T5(config)

    @jax.jit
    def run(params: Any, ids: jax.Array, mask: jax.Array) -> jax.Array:
        apply = functools.partial(model.apply, {"params": params})
        encoded = apply(ids, mask, method="encode")
        start = jnp.full((ids.shape[0], work.new + 1), config.start_id, jnp.int32)

        def body(i: jax.Array, tokens: jax.Array) -> jax.Array:
            hidden = apply(tokens[:, :-1], encoded, mask, method="decode")
            logits = apply(hidden[:, i], method="head")
            return tokens.at[:, i + 1].set(logits.argmax(-1).astype(jnp.int32))

        return jax.lax.fori_loop(0, work.new, body, start)

    jax.block_until_ready(run(params, *given))
    return lambda: run(params, *given)


def compare(config: t5.T5Config, work: Work, rounds: int, budget: float) -> list[dict[str, Any]]:
    """Returns a row a search and side: median ms, tokens a second, ratio to ours.

    Raises:
      RuntimeError: the sides generate different tokens.
    """
    model, given = hugging_face(config), inputs(config, work)
    params, rows = import_params(model), []
    for beams in BEAMS:
        own, seconds = ours(config, params, given, work, beams)
        sides = {"ours": own, "transformers": theirs(model, given, work, beams)}
        if beams == 1:
            sides["ours, no cache"] = again_from_the_start(config, params, given, work)
        first = {name: np.asarray(side()) for name, side in sides.items()}
        for name, tokens in first.items():
            if not np.array_equal(tokens, first["ours"]):
                raise RuntimeError(f"{name} and ours generate different tokens with {beams} beams")
        found = measure.compare(sides, rounds=rounds, warmup=1, seconds_budget=budget)
        for name, side in found.to_dict().items():
            per_second = work.batch * work.new / (side["median_ms"] / 1e3)
            row = {"search": "greedy" if beams == 1 else f"{beams} beams", "side": name}
            row |= {"tokens_per_s": per_second, "compile_s": seconds if name == "ours" else None}
            rows.append(row | side)
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Returns the rows as text."""
    head = ("search", "side", "ms", "tokens/s", "times ours", "compile s")
    lines = [
        (
            *(row["search"], row["side"], f"{row['median_ms']:,.0f}"),
            *(f"{row['tokens_per_s']:,.0f}", f"{row['ratio']:.2f}"),
            "" if row["compile_s"] is None else f"{row['compile_s']:.1f}",
        )
        for row in rows
    ]
    return aligned([head, *lines], right=range(2, 6))


def draw(rows: Sequence[dict[str, Any]], path: Any) -> None:
    """Writes a bar chart of tokens a second."""
    figure, ((axis,),) = plots.panels(1, 1)
    names = [f"{row['search']}\n{row['side']}" for row in rows]
    values = [row["tokens_per_s"] for row in rows]
    own = [row["side"] == "ours" for row in rows]
    colours = [plots.COLOURS[0] if mine else plots.GREY for mine in own]
    bars = axis.barh(names[::-1], values[::-1], color=colours[::-1], height=0.62)
    axis.bar_label(bars, fmt="{:,.0f}", padding=3, fontsize=9)
    axis.set_xlabel("tokens a second, t5-small's size", fontsize=9)
    axis.set_xlim(0, 1.18 * max(values))
    figure.savefig(path, dpi=150)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, prints, and writes results/decoding.json and .png."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.decoding", description=__doc__)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=64, help="input tokens a row")
    parser.add_argument("--new", type=int, default=64, help="new tokens a row")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--budget_s", type=float, default=240.0, help="seconds a search at most")
    parser.add_argument("--tiny", action="store_true", help="a far smaller model, for tests")
    parser.add_argument("--output", default=str(measure.RESULTS), help="folder of the results")
    chosen = parser.parse_args(arguments)
    work = Work(chosen.batch, chosen.length, chosen.new)
    rows = compare(sizes(chosen.tiny), work, chosen.rounds, chosen.budget_s)
    print(table(rows))
    config = {key: value for key, value in vars(chosen).items() if key != "output"}
    result = {"question": __doc__.splitlines()[2:4], "environment": measure.environment(config)}
    import torch
    import transformers

    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    path = measure.save("decoding", result | {"versions": versions, "rows": rows}, chosen.output)
    draw(rows, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
