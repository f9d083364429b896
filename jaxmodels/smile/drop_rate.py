"""How many tokens capacities lose when routing is uniformly random: a simulation (section 14).

Capacity is per sender and bucket. A bucket of the first level of two holds T / n tokens on
average, one of a single level only T / E: its relative fluctuation is larger, and more is lost.
"""

import numpy as np

from jaxmodels.smile.settings import MoeConfig


def simulate(config: MoeConfig, tokens: int, trials: int = 64, seed: int = 0) -> dict[str, float]:
    """Returns the share of tokens dropped at each level, and "total".

    Args:
      config: of the layer; its training capacities are used.
      tokens: T, of each device.
      trials: independent layers.
      seed: of the random choices.
    """
    rng = np.random.default_rng(seed)
    n, m = config.grid.nodes, config.grid.devices
    capacities = config.capacities(tokens)
    everything = trials * n * m * tokens
    if config.routing == "one_level":
        lost = _lost(_even(rng, np.full((trials, n * m), tokens), config.num_experts), *capacities)
        return {"router": lost / everything, "total": lost / everything}
    sent = _even(rng, np.full((trials, n, m), tokens), n)
    inter = _lost(sent, capacities[0])
    arrived = np.minimum(sent, capacities[0]).sum(1).swapaxes(1, 2)  # [trials, node, rank]
    intra = _lost(_even(rng, arrived, config.experts_per_node), capacities[1])
    shares = {"inter": inter / everything, "intra": intra / everything}
    return shares | {"total": sum(shares.values())}


def _even(rng: np.random.Generator, rows: np.ndarray, buckets: int) -> np.ndarray:
    """Counts of `rows` spread at random over buckets: [...] -> [..., buckets]."""
    return rng.multinomial(rows, np.full(buckets, 1 / buckets))


def _lost(counts: np.ndarray, capacity: int) -> float:
    return float(np.maximum(counts - capacity, 0).sum())
