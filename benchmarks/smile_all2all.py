"""Exchanges of a mixture of experts: python -m benchmarks.smile_all2all [--measure]

Question: when is an exchange in two hops, inside the node and then between nodes, faster than one
over all devices?

Without --measure the cost model answers (`jaxmodels/smile/cost_model.py`): times follow from rates
of links and assumed costs of a message; nothing is run. The gain is one of transport: one-level
routing has all of it with two hops, bi-level routing needs the same messages.

With --measure it is also run, on this machine: a process a node, each in a network namespace of its
own (Linux, root), joined by links of --rate megabits a second each way. Forms run in turn; times
are those of the slowest node. Gloo on a CPU is not a GPU's network: every device is a peer of its
own, devices of one node talk over TCP as well, and messages cost processor time. What carries over
is the number of messages, not the milliseconds. And `smile_dispatch` is run, on one device.
"""

import argparse
import os
import platform
import sys
import time
from collections.abc import Sequence
from typing import Any

from benchmarks import measure, plots, smile_dispatch, smile_links, smile_nodes, smile_report
from benchmarks.smile_exchange_worker import Job
from jaxmodels.smile import cost_model
from train.table import aligned

SHAPES = ((2, 8), (4, 8), (8, 8), (16, 8), (64, 8))
SLICES = ((2, (4, 4, 4), "v5p"), (4, (16, 16), "v5e"), (4, (16, 16), "v6e"))
IDEAL = {"alpha_msg": 0.0, "alpha_nvlink": 0.0, "s_half": 0.0}


def gpu_rows(buffer: cost_model.Buffer) -> list[dict[str, Any]]:
    """Returns a row for every kind of GPU and number of nodes, with and without message costs."""
    rows = []
    for kind, (nvlink, network) in cost_model.GPU_RATES.items():
        for nodes, devices in SHAPES:
            cluster = cost_model.GpuCluster(nodes, devices, nvlink, network)
            ideal = cost_model.GpuCluster(nodes, devices, nvlink, network, **IDEAL)
            costly, free = cluster.predict(buffer), ideal.predict(buffer)
            rows.append(
                {
                    "hardware": kind,
                    "shape": f"{nodes}x{devices}",
                    "peers": f"{costly['peers_flat']} / {costly['peers_two_hop']}",
                    "flat_ms": 1e3 * costly["t_flat"],
                    "two_hop_ms": 1e3 * costly["t_two_hop"],
                    "ratio": costly["t_flat"] / costly["t_two_hop"],
                    "ideal_ratio": free["t_flat"] / free["t_two_hop"],
                }
            )
    return rows


def tpu_rows(buffer: cost_model.Buffer) -> list[dict[str, Any]]:
    """Returns a row for one slice and for several: lower bounds, without costs of messages."""
    rows = []
    for slices, dims, kind in SLICES:
        link, network, host = cost_model.TPU_RATES[kind]
        torus = cost_model.Torus(dims, (True,) * len(dims), link)
        inside = torus.predict(buffer)
        across = cost_model.Multislice(slices, torus, network, host).predict(buffer)
        name = "x".join(map(str, dims))
        rows.append(_tpu_row(f"{kind} {name}", "-", inside["t_flat"], inside["t_two_hop"]))
        peers = f"{across['dcn_peers_flat']} / {across['dcn_peers_two_hop']}"
        bounds = (across["t_flat_lower_bound"], across["t_two_hop_lower_bound"])
        rows.append(_tpu_row(f"{slices} slices of {kind} {name}", peers, *bounds))
    return rows


def _tpu_row(hardware: str, peers: str, flat: float, two_hop: float) -> dict[str, Any]:
    return {
        "hardware": hardware,
        "peers": peers,
        "flat_ms": 1e3 * flat,
        "two_hop_ms": 1e3 * two_hop,
        "ideal_ratio": flat / two_hop,
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Returns rows as aligned text; numbers with three digits."""
    names = list(rows[0])
    shown = [[f"{v:.3g}" if isinstance(v, float) else str(v) for v in r.values()] for r in rows]
    return aligned([tuple(names), *map(tuple, shown)], range(1, len(names)))


def numbers(text: str) -> tuple[int, ...]:
    """Returns "256,4096" as (256, 4096)."""
    return tuple(int(part) for part in text.split(",") if part)


def shapes(text: str) -> tuple[tuple[int, ...], ...]:
    """Returns "64x64x64,512x256x128" as tuples of three."""
    found = tuple(tuple(map(int, part.split("x"))) for part in text.split(",") if part)
    if any(len(shape) != 3 for shape in found):
        raise argparse.ArgumentTypeError(f"{text!r}: give AxBxC, several joined by commas")
    return found


def parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--tokens", type=int, default=16384, help="model: tokens a device")
    made.add_argument("--d_model", type=int, default=768, help="model: width")
    made.add_argument("--capacity_factor", type=float, default=1.0, help="model: buffers")
    made.add_argument("--measure", action="store_true", help="run it as well; needs root")
    made.add_argument("--nodes", type=int, default=4, help="processes, 2 to 8")
    made.add_argument("--devices", type=int, default=8, help="simulated devices a node, 2 to 8")
    made.add_argument("--rate", type=float, default=1000, help="Mbit/s of a node; 0: not shaped")
    made.add_argument("--sizes", type=numbers, default="256,4096,65536", help="bytes to each peer")
    layers = "tokens x d_model x d_ff of MoE layers; empty: none"
    made.add_argument("--layers", type=shapes, default="64x64x64,512x256x128", help=layers)
    dispatch = "tokens x d_model x experts on one device; empty: none"
    made.add_argument(
        "--dispatch", type=shapes, default="512x256x16,1024x256x16,2048x256x16", help=dispatch
    )
    made.add_argument("--rounds", type=int, default=30, help="of a case, at most")
    made.add_argument("--budget_s", type=float, default=150, help="seconds for all rounds")
    made.add_argument("--timeout_s", type=float, help="then nodes are killed; 3 budgets + 240 s")
    made.add_argument("--out", default=str(measure.RESULTS), help="folder of the results")
    return made


def job_of(asked: argparse.Namespace) -> Job:
    """Returns what the nodes are to measure.

    Raises:
      ValueError: sizes that cannot be.
    """
    if not (2 <= asked.nodes <= 8 and 2 <= asked.devices <= 8):
        raise ValueError(f"--nodes {asked.nodes} --devices {asked.devices}: 2 to 8 of each.")
    if not asked.sizes or any(size < 4 or size % 4 for size in asked.sizes):
        raise ValueError(f"--sizes {asked.sizes}: bytes of float32, multiples of 4.")
    cases = len(asked.sizes) + 2 * len(asked.layers)
    timeout = asked.timeout_s or 3 * asked.budget_s + 240
    case_s = 0.7 * asked.budget_s / cases  # the rest is for the dispatch
    sizes = (asked.nodes, asked.devices, asked.sizes, asked.layers)
    return Job(*sizes, rounds=asked.rounds, case_s=case_s, timeout_s=timeout)


def measure_links(job: Job, rate: float) -> smile_nodes.Outcome:
    """Runs a job on links of `rate` Mbit/s; where there can be none, says so and has no rows."""
    why = smile_links.unavailable()
    if why:
        print(f"links between nodes not measured: {why}")
        return smile_nodes.Outcome([], f"not permitted here: {why}", {})
    with smile_links.joined(job.nodes, rate) as links:
        outcome = smile_nodes.run(links, job)
    if outcome.failed:
        print(f"not all cases were measured: {outcome.failed}")
    return outcome


def measured(asked: argparse.Namespace) -> None:
    """Runs both measurements, prints their tables, writes JSON and a plot."""
    began, job = time.perf_counter(), job_of(asked)
    outcome = measure_links(job, asked.rate)
    rate = f"{asked.rate:g} Mbit/s" if asked.rate else "not shaped"
    where = f"{job.nodes} nodes x {job.devices} devices, links {rate}"
    load = f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"
    if outcome.rows:
        print(f"\nmeasured: {where}; {load}\n{smile_report.exchange_table(outcome.rows)}")
        print("\n".join(smile_report.verdict(outcome.rows)))
    dispatch = smile_dispatch.measure_all(asked.dispatch, budget_s=0.3 * asked.budget_s)
    if dispatch:
        print(f"\ndispatch on one device\n{smile_report.dispatch_table(dispatch)}")
    settings = {name: value for name, value in vars(asked).items() if name != "out"}
    result = {
        "question": __doc__,
        "environment": measure.environment(settings),
        "kernel": platform.release(),
        "nodes_run_on": "CPU, simulated devices, gloo",
        "command": " ".join(["python -m benchmarks.smile_all2all", *sys.argv[1:]]),
        "load_by_case": outcome.facts.get("load"),
        "congestion_control": outcome.facts.get("congestion_control"),
        "failed": outcome.failed,
        "verdict": smile_report.verdict(outcome.rows),
        "exchanges": outcome.rows,
        "dispatch": dispatch,
    }
    name = f"smile_all2all_{job.nodes}x{job.devices}_{asked.rate:g}mbit"
    path = measure.save(name, result, asked.out)
    figure = smile_report.figure(outcome.rows, dispatch, f"{where}; simulated on one CPU; {load}")
    plots.save(figure, f"{asked.out}/{name}.png")
    print(f"\n{path} and the same as .png; {time.perf_counter() - began:.0f} s")


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the tables and writes the rows."""
    asked = parser().parse_args(arguments)
    if asked.measure:
        job_of(asked)  # refused before anything is run
    buffer = cost_model.Buffer(asked.tokens, asked.d_model, 2, asked.capacity_factor)
    gpu, tpu = gpu_rows(buffer), tpu_rows(buffer)
    print(f"a model, not a measurement: one exchange of {buffer.size / 1e6:.1f} MB a device")
    print(f"\nGPU nodes (10 us a message, 2 us inside a node; ideal: none)\n{table(gpu)}")
    print(f"\nTPU slices (lower bounds)\n{table(tpu)}")
    settings = {name: vars(asked)[name] for name in ("tokens", "d_model", "capacity_factor")}
    found = {"settings": settings, "buffer_bytes": buffer.size, "gpu": gpu, "tpu": tpu}
    measure.save("smile_all2all", found, asked.out)
    if asked.measure:
        measured(asked)


if __name__ == "__main__":
    main()
