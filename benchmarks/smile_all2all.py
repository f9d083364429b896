"""Exchanges of a mixture of experts: python -m benchmarks.smile_all2all [--tokens 16384]

Question: when is an exchange in two hops, inside the node and then between nodes, faster than one
over all devices? This part answers by the cost model (`jaxmodels/smile/cost_model.py`): times
follow from rates of links and assumed costs of a message; nothing is run. The gain is one of
transport: one-level routing has all of it with two hops, bi-level routing needs the same messages.
"""

import argparse
from collections.abc import Sequence
from typing import Any

from benchmarks import measure
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


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the tables and writes the rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=16384, help="tokens a device")
    parser.add_argument("--d_model", type=int, default=768)
    parser.add_argument("--capacity_factor", type=float, default=1.0)
    asked = parser.parse_args(arguments)
    buffer = cost_model.Buffer(asked.tokens, asked.d_model, 2, asked.capacity_factor)
    gpu, tpu = gpu_rows(buffer), tpu_rows(buffer)
    print(f"a model, not a measurement: one exchange of {buffer.size / 1e6:.1f} MB a device")
    print(f"\nGPU nodes (10 us a message, 2 us inside a node; ideal: none)\n{table(gpu)}")
    print(f"\nTPU slices (lower bounds)\n{table(tpu)}")
    found = {"buffer_bytes": buffer.size, "gpu": gpu, "tpu": tpu}
    measure.save("smile_all2all", {"settings": vars(asked)} | found)


if __name__ == "__main__":
    main()
