"""VCC beside a dense PyTorch model: python -m benchmarks.vcc_vs_torch [--lengths 1024,4096]

Question: how long do forward + backward of a T5 encoder take on this CPU, ours with VCC and ours
dense, beside transformers' dense encoder (PyTorch) of the same sizes?

One document without padding, float32, no dropout, gradients of every parameter of the layers;
embeddings are given, so that no side pays for a word table. Before anything is timed, both dense
encoders run on the same weights and must agree. Sides run in turn, medians are kept. What does
not fit into the time left is told as not run.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from benchmarks import measure, vcc_programs
from jaxmodels import weights
from jaxmodels.trunks.t5 import T5Config
from train.flops import count_flops
from train.table import aligned

LENGTHS = (1024, 2048, 4096, 8192)
AGREE = 1e-3  # largest difference of the two dense encoders, of the largest state
_CHECKED = 64  # tokens of that comparison
FIRST_GUESS = 1e10  # FLOP/s, before anything has been measured
Row = dict[str, Any]


class TorchEncoder:
    """transformers' T5 encoder of our sizes, with random weights.

    Attributes:
      model: the PyTorch module, in evaluation mode (no dropout), gradients on.
    """

    def __init__(self, trunk: T5Config) -> None:
        """Builds it.

        Raises:
          ImportError: torch or transformers is not installed.
        """
        import torch
        import transformers

        torch.manual_seed(0)
        settings = transformers.T5Config(
            vocab_size=8,
            d_model=trunk.d_model,
            d_kv=trunk.head_dim,
            d_ff=trunk.d_ff,
            num_layers=trunk.num_layers,
            num_heads=trunk.num_heads,
            relative_attention_num_buckets=trunk.num_buckets,
            relative_attention_max_distance=trunk.max_distance,
            feed_forward_proj="gated-gelu" if trunk.gated else trunk.activation,
            dropout_rate=0.0,
        )
        self.model = transformers.T5EncoderModel(settings).eval()

    def states(self, x: np.ndarray) -> np.ndarray:
        """Returns the states of embeddings [1, n, d_model]."""
        import torch

        with torch.no_grad():
            return self.model(inputs_embeds=torch.from_numpy(x)).last_hidden_state.numpy()

    def step(self, x: np.ndarray) -> Callable[[], None]:
        """Returns one forward + backward on embeddings [1, n, d_model]."""
        import torch

        given = torch.from_numpy(x)

        def run() -> None:
            self.model.zero_grad(set_to_none=True)
            self.model(inputs_embeds=given).last_hidden_state.sum().backward()

        return run

    def params(self) -> Any:
        """Returns the same weights as the parameters of our encoder."""
        from jaxmodels.weights.tensor_file import as_tensor_file

        tensors = {name: x.detach().numpy() for name, x in self.model.state_dict().items()}
        file = as_tensor_file(tensors)
        rules = weights.detect(file).rules(file)
        return weights.import_weights(weights.tree_of(file, rules), file, rules)["encoder"]


def compare_lengths(
    lengths: Sequence[int] = LENGTHS,
    *,
    preset: str = "t5_base_narrative_qa",
    budget_s: float = 300.0,
    rounds: int = 5,
) -> list[Row]:
    """Times the three sides at several lengths, shortest first.

    Args:
      lengths: tokens of the document.
      preset: of configs/vcc_t5.py.
      budget_s: seconds in all, compilation included; ends a few seconds off.
      rounds: timed turns at most.

    Returns:
      one row a length and side ("vcc", "dense", "torch"): `n`, `side`, `rows`, `gflop`, `ms`,
      `ms_lower`, `ms_upper`, `rounds`, `ratio` (its time over VCC's) and `reason` where not run.

    Raises:
      ValueError: the dense encoders do not agree.
    """
    trunk, _ = vcc_programs.sizes(preset, max(lengths))
    torch_side, began, speed = TorchEncoder(trunk), time.perf_counter(), FIRST_GUESS
    params = jax.tree.map(jax.numpy.asarray, torch_side.params())
    _check(torch_side, preset, params)
    rows: list[Row] = []
    for n in sorted(lengths):
        left = budget_s - (time.perf_counter() - began)
        found, speed = _at(n, preset, torch_side, params, (left, rounds, speed))
        rows += found
    return rows


def _check(torch_side: TorchEncoder, preset: str, params: Any) -> None:
    trunk, vcc = vcc_programs.sizes(preset, _CHECKED)
    x = np.random.default_rng(0).normal(size=(1, _CHECKED, trunk.d_model)).astype(np.float32)
    program = vcc_programs.make_program("encoder", "all_dense", trunk, vcc, _CHECKED)
    ours = jax.jit(program.forward)(params, x, np.ones((1, _CHECKED), np.float32))
    wanted = torch_side.states(x)
    difference = float(np.abs(np.asarray(ours) - wanted).max() / np.abs(wanted).max())
    if not difference < AGREE:
        raise ValueError(f"the dense encoders differ by {difference:.1e}: nothing to compare")


def _at(
    n: int, preset: str, torch_side: TorchEncoder, params: Any, limits: tuple[float, int, float]
) -> tuple[list[Row], float]:
    left, rounds, speed = limits
    began = time.perf_counter()
    trunk, vcc = vcc_programs.sizes(preset, n)
    x = np.random.default_rng(n).normal(size=(1, n, trunk.d_model)).astype(np.float32)
    mask, rows, runs, spent = np.ones((1, n), np.float32), [], {}, 0.0
    for side, name in (("vcc", "vcc"), ("dense", "all_dense"), ("torch", "all_dense")):
        program = vcc_programs.make_program("encoder", name, trunk, vcc, n)
        traced = jax.jit(program.step).trace(*program.shapes)
        flops = count_flops(traced.jaxpr)
        row: Row = {"n": n, "side": side, "rows": program.rows, "gflop": flops / 1e9}
        row |= dict.fromkeys(("ms", "ms_lower", "ms_upper", "rounds", "ratio", "reason"))
        rows.append(row)
        spent += 2 * flops / speed
        if spent > left - (time.perf_counter() - began):
            row["reason"] = f"about {flops / speed:.0f} s a run, {max(left, 0):.0f} s left"
        elif side == "torch":
            runs[side] = torch_side.step(x)
        else:
            compiled = traced.lower().compile()
            runs[side] = lambda compiled=compiled: compiled(params, x, mask)
    if runs:
        seconds = max(1.0, (left - (time.perf_counter() - began)) / 2)
        timed = measure.compare(runs, rounds=rounds, warmup=1, seconds_budget=seconds).to_dict()
        for row in rows:
            if row["side"] in timed:
                speed = _fill(row, timed[row["side"]]) or speed
    return rows, speed


def _fill(row: Row, result: dict[str, Any]) -> float | None:
    if result["skipped"]:
        row["reason"] = result["skipped"]
        return None
    row |= {
        f"ms{end}": result[f"{name}_ms"] for end, name in (("_lower", "lower"), ("_upper", "upper"))
    }
    row |= {"ms": result["median_ms"], "rounds": result["rounds"], "ratio": result["ratio"]}
    return 1e12 * row["gflop"] / row["ms"]


def table(rows: Sequence[Row]) -> str:
    """Returns a line a length and side."""
    labels = {"vcc": "VCC", "dense": "dense", "torch": "dense, PyTorch"}
    lines = [("tokens", "encoder", "rows", "GFLOP", "ms", "of VCC", "")]
    for row in rows:
        times = (
            ("not run", "") if row["ms"] is None else (f"{row['ms']:,.0f}", f"{row['ratio']:.2f}")
        )
        cells = (f"{row['n']:,}", labels[row["side"]], f"{row['rows']:,}", f"{row['gflop']:,.0f}")
        lines.append((*cells, *times, row["reason"] or ""))
    return aligned(lines, right=(0, 2, 3, 4, 5))


def main() -> None:
    """Measures, prints the table, and writes JSON and CSV."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", default=",".join(map(str, LENGTHS)))
    parser.add_argument("--preset", default="t5_base_narrative_qa", help="of configs/vcc_t5.py")
    parser.add_argument("--budget_s", type=float, default=300.0, help="seconds in all")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", default=str(measure.RESULTS), help="folder of the results")
    options = parser.parse_args()
    lengths = [int(n) for n in options.lengths.split(",")]
    rows = compare_lengths(
        lengths, preset=options.preset, budget_s=options.budget_s, rounds=options.rounds
    )
    settings = {name: value for name, value in vars(options).items() if name != "out"}
    question = "how long do forward + backward take, VCC beside dense PyTorch?"
    result = {"question": question, "environment": measure.environment(settings), "rows": rows}
    measure.save("vcc_vs_torch", result, options.out)
    measure.save_csv("vcc_vs_torch", rows, options.out)
    print(table(rows))


if __name__ == "__main__":
    main()
